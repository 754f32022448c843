"""Benchmark of the sampler and the update: `python -m pr1_jax.bench`.

Ours alone, with random weights. Figures are ratios within one run and shares of what
the machine was measured to be able to do; `--suite` names what to run:

  limits         peak of matrix products, memory bandwidth
  sampling       32 prompts × 64 tokens → 128 tokens
  update         one GRPO update in micro-batches of several sizes, its memory
  blocks         parallel blocks against the published scheme, on real lengths
  lanes          a decode step with none, some or all rows in a block
  sweeps         cost against capacities, lengths, rows and paths
  refill         how busy rows are kept
  prompts        long prompts kept once a group or once a row
  decode_limits  decoding and updates by batch against the limits, and a profile

Every figure is of `--repeats` calls after one to warm up, taking turns with what it is
compared with: the median, and the least and the greatest in brackets.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from pr1_jax import cli

_SUITES = (
    "limits",
    "sampling",
    "update",
    "blocks",
    "lanes",
    "sweeps",
    "refill",
    "prompts",
    "decode_limits",
)
_SHAPES = ("small", "qwen3_0_6b", "tiny")

_SUITE = flags.DEFINE_list(
    "suite", ["all"], f"Suites to run: all, or of {', '.join(_SUITES)}."
)
_SHAPE = flags.DEFINE_enum("shape", "small", _SHAPES, "Shape of the model.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder for results.json, results.md and a picture of each suite."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Tiny sizes: does everything still run?")
_TRACES = flags.DEFINE_string(
    "traces",
    None,
    "JSON lines with question and response, whose lengths the blocks have; the default "
    "are deciles of 338 published cold-start traces.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Hugging Face folder or name: counts the tokens of --traces; by default words, "
    "digits, punctuation and newlines are counted.",
)


def _chosen() -> list[str]:
    """The suites that were asked for, in their order; stops at others."""
    asked = _SUITE.value
    for name in asked:
        if name not in (*_SUITES, "all"):
            known = ", ".join(("all", *_SUITES))
            cli.stop(f"--suite={','.join(asked)}: {name!r} is not one of {known}")
    if not asked:
        cli.stop("--suite= names no suite")
    return [name for name in _SUITES if name in asked or "all" in asked]


def _out() -> Path | None:
    """The folder for results, made; stops where there can be none."""
    if _OUT.value is None:
        return None
    folder = Path(_OUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        cli.stop(f"--out={_OUT.value}: {error.strerror or error}")
    return folder


def _traces() -> tuple[tuple, str]:
    """Lengths of traces and where they are from; stops at a file that is none."""
    from pr1_jax import tokenizer
    from pr1_jax.bench import plans

    count, how = plans.count_pieces, "words, digits, punctuation and newlines"
    if _TOKENIZER.value is not None:
        if _TRACES.value is None:
            cli.stop(f"--tokenizer={_TOKENIZER.value}: --traces is missing")
        try:
            loaded = tokenizer.load(_TOKENIZER.value)
        except (ValueError, OSError) as error:
            cli.stop(f"--tokenizer={_TOKENIZER.value}: {error}")
        count = lambda text: len(loaded.encode(text, allow_tags=False))
        how = f"tokens of {_TOKENIZER.value}"
    if _TRACES.value is None:
        traces = plans.builtin_traces()
        return traces, f"deciles of 338 published cold-start traces, in {how}"
    try:
        traces = plans.read_traces(_TRACES.value, count)
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        cli.stop(f"--traces={_TRACES.value}: {reason}")
    return traces, f"{len(traces)} traces of {_TRACES.value}, in {how}"


def _suite_functions() -> dict[str, Any]:
    from pr1_jax.bench import blocks, decode_limits, limits, sampling, update

    return {
        "limits": limits.suite,
        "sampling": sampling.sampling,
        "update": update.update,
        "blocks": blocks.blocks,
        "lanes": blocks.lanes,
        "sweeps": sampling.sweeps,
        "refill": blocks.refill,
        "prompts": sampling.prompts,
        "decode_limits": decode_limits.decode_limits,
    }


def main(argv: list[str]) -> None:
    """Runs the suites; one that fails is told, and the exit code is then 1."""
    del argv
    names, out = _chosen(), _out()
    traces, traces_from = _traces()

    import jax
    import rich.console

    from pr1_jax import metrics
    from pr1_jax.bench import limits, report, shapes

    shape = shapes.SHAPES[_SHAPE.value]
    bench = shapes.Bench(
        shape=shape,
        sizes=shapes.QUICK if _QUICK.value else shapes.Sizes(),
        repeats=_REPEATS.value,
        limits=limits.measure(shape.model, quick=_QUICK.value),
        traces=traces,
        traces_from=traces_from,
        quick=_QUICK.value,
    )
    device = jax.devices()[0]
    about = {
        "shape": shape.name,
        "quick": bench.quick,
        "repeats": bench.repeats,
        "device": f"{device.platform} {device.device_kind}",
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "flops_per_sec": bench.limits.flops_per_sec,
        "bytes_per_sec": bench.limits.bytes_per_sec,
    }
    head = "# Benchmark\n\n" + "".join(f"- {k}: {v}\n" for k, v in about.items()) + "\n"
    console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
    functions, found = _suite_functions(), {}
    for name in names:
        began = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            found[name] = {"tables": functions[name](bench)}
        except Exception as error:  # noqa: BLE001 (the other suites are wanted)
            found[name] = {"tables": [], "error": f"{type(error).__name__}: {error}"}
            print(f"{name} failed: {found[name]['error']}", file=sys.stderr)
        found[name]["sec"] = time.perf_counter() - began
        if not _JSON.value:
            for table in found[name]["tables"]:
                console.print(report.terminal(table))
        if out is not None:  # what there is so far: a long run may be cut off
            metrics.write_json(out / "results.json", report.json_data(found, about))
            text = report.markdown(found, head)
            metrics.replace_file(out / "results.md", text.encode())
            report.draw(out, name, found[name]["tables"])
    if _JSON.value:
        print(json.dumps(report.json_data(found, about), indent=1, ensure_ascii=False))
    if any("error" in suite for suite in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
