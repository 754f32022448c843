"""Writes a training checkpoint as a Hugging Face folder that `transformers` loads.

    python -m pr1_jax.export --workdir=runs/quickstart --out=exported

The folder holds config.json, safetensors in parts, the tokenizer with the tags, and in
`pr1_jax.json` how the model was trained to be asked: `pr1_jax.chat` heeds that. It serves
as `model.path` again. Adapters are merged into their weights, or written by themselves:

    python -m pr1_jax.export --workdir=runs/lora --out=adapters --adapters
"""

import pathlib

from absl import flags

from pr1_jax.system import cli


def export(
    workdir: str,
    out: str,
    *,
    number: int | None = None,
    dtype: str | None = None,
    apart: bool = False,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes checkpoint `number` of a run, or its newest one, to the folder `out`.

    Args:
      dtype: of the weights; as trained without it.
      apart: writes adapters alone, for `peft`; in float32, as trained.
      max_shard_bytes: size of a safetensors file.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: one line; nothing is written.
    """
    # Imported late: JAX is slow to, and the flags may be wrong.
    import dataclasses

    import jax

    from pr1_jax.huggingface import adapters, usage, weights
    from pr1_jax.huggingface.config import max_positions, resolve
    from pr1_jax.stages import experiment, policies
    from pr1_jax.workdir.folder import read_config

    weights.check_free(out)
    config = read_config(workdir)
    try:
        host = jax.devices("cpu")[0]  # holds models that an accelerator may not
    except RuntimeError:  # JAX_PLATFORMS names others
        host = jax.devices()[0]
    made = experiment.reopen(config, host)
    folder = config.checkpoint.folder or workdir
    which = {"number": number, "field": "--workdir"}
    asked = usage.Usage(
        made.own.template, config.data.bos, dataclasses.asdict(made.settings)
    )
    if apart:
        _check_adapters(made, workdir, dtype)
        base = "" if config.checkpoint.init else config.model.path
        both = policies.read_adapters(made, folder, **which)
        rest = {"base": base, "usage": asked}
        adapters.save_adapters(out, *both, made.model, made.tokenizer, **rest)
        return
    params = policies.read(made, folder, dtype=dtype, **which)
    origin = config.model.path and resolve(config.model.path)
    weights.save_params(
        out,
        params,
        made.model,
        made.tokenizer,
        usage=asked,
        max_shard_bytes=max_shard_bytes,
        max_positions=max_positions(origin) if origin else made.settings.max_tokens,
    )


def _check_adapters(made, workdir: str, dtype: str | None) -> None:
    if made.adapter_settings is None:
        raise ValueError(
            f"--workdir={workdir} has no adapters (model.lora_rank=0): leave --adapters "
            "away, for all of its weights"
        )
    if dtype:
        raise ValueError(f"--dtype={dtype}: adapters are written in float32 alone")


def main(argv: list[str]) -> None:
    """Reads the flags; what is wrong is one line and exit code 2."""
    del argv
    cli.require([_WORKDIR, _OUT])
    try:
        export(
            _WORKDIR.value,
            _OUT.value,
            number=_CHECKPOINT.value,
            dtype=_DTYPE.value,
            apart=_ADAPTERS.value,
            max_shard_bytes=int(_PART_GIB.value * 2**30),
        )
    except (ValueError, OSError) as error:
        cli.stop(error)
    print(f"written: {pathlib.Path(_OUT.value).absolute()}")


if __name__ == "__main__":
    # Not above: `export` is for programs with flags of their own, too.
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    _OUT = flags.DEFINE_string(
        "out", None, "Folder to write; must not exist, or be empty."
    )
    _CHECKPOINT = flags.DEFINE_integer(
        "checkpoint", None, "Number of a checkpoint, as its folder; default the newest."
    )
    _DTYPE = flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        "Of the weights; default as trained.",
    )
    _ADAPTERS = flags.DEFINE_bool(
        "adapters", False, "Write adapters alone, for peft; not merged into weights."
    )
    _PART_GIB = flags.DEFINE_float(
        "part_gib", 4.0, "Largest size of a safetensors file, GiB.", lower_bound=1e-6
    )
    cli.run(main)
