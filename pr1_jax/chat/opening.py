"""Opens what a chat talks to: the workdir of a run, or an exported folder."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pr1_jax.chat.session import Chat, Opened, changed
from pr1_jax.data import prompts, tokenizer_files
from pr1_jax.huggingface import tags, tensors, weights
from pr1_jax.huggingface.config import max_positions
from pr1_jax.sampler.settings import Settings
from pr1_jax.stages import experiment
from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.folder import read_config

_FOLDER_TOKENS = 1024  # of a response, where a folder does not say


def load(
    path: str | os.PathLike[str],
    *,
    number: int | None = None,
    template: str | None = None,
    parallel: bool = True,
    seed: int = 0,
    steps_per_chunk: int = 4,
    kernels: str = "auto",
    notify: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Chat:
    """Opens a checkpoint to ask it; its parameters are read at the first question.

    Args:
      path: workdir of a run, or a Hugging Face folder.
      number: of a run's checkpoint; default the newest.
      template: of prompts; default the run's, or for a folder `instruction` where its
        tokenizer can spell that, and else `plain`.
      settings: fields of `decode.Settings`; None = as the run has them.
      parallel, seed, steps_per_chunk, kernels, notify: as of `Chat`.

    Raises:
      ValueError, OSError: one line that names what is wrong.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--checkpoint={path}: no such folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--checkpoint={path} has no config.json: neither the workdir of a run nor "
            "a Hugging Face folder"
        )
    if "model_type" not in tensors.read_json(folder / "config.json"):
        opened = _open_run(folder, number)
    elif number is not None:
        raise ValueError(
            f"--checkpoint_number={number}: {path} is a Hugging Face folder, which "
            "holds one model; leave the flag away"
        )
    else:
        opened = _open_folder(folder, given)
    opened = dataclasses.replace(
        opened,
        settings=changed(opened.settings, given),
        template=template or opened.template,
    )
    return Chat(
        opened,
        parallel=parallel,
        seed=seed,
        steps_per_chunk=steps_per_chunk,
        kernels=kernels,
        notify=notify,
    )


def _open_run(folder: pathlib.Path, number: int | None) -> Opened:
    config = read_config(folder)
    config.checkpoint.init = ""
    config.kernels = "auto"  # as this machine allows, whatever the run's one did
    config.mesh.update(data=1, fsdp=1, tensor=1)
    try:
        made = experiment.build(config, devices=jax.devices()[:1])
    except (ValueError, OSError) as error:
        raise ValueError(f"--checkpoint={folder}: its config.json: {error}") from error
    which = {"number": number, "field": "--checkpoint"}
    wanted, where = made.abstract_params(), config.checkpoint.folder or folder
    try:
        checkpoint.check_params(where, wanted, **which)
    except FileNotFoundError as error:
        if number is None:
            raise
        raise FileNotFoundError(f"--checkpoint_number={number}: {error}") from error
    return Opened(
        made.model,
        made.tokenizer,
        made.settings,
        config.data.template,
        lambda: checkpoint.restore_params(where, wanted, **which),
    )


def _open_folder(folder: pathlib.Path, given: Mapping[str, Any]) -> Opened:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = read_config(folder, dtype=dtype, param_dtype=dtype)
    own_tokenizer = tokenizer_files.load(folder)
    weights.check_weights(folder, shape, own_tokenizer)
    positions = max_positions(folder)
    tokens = given.get("max_response_tokens", min(_FOLDER_TOKENS, 3 * positions // 4))
    if tokens >= positions:
        raise ValueError(
            f"--max_tokens={tokens}: the model has {positions} positions, prompt included"
        )
    share = lambda part, most: max(8, min(tokens // part, most))
    settings = Settings(
        max_prompt_tokens=positions - tokens,
        max_response_tokens=tokens,
        min_path_tokens=share(32, 64) // 2,
        summary_reserve=share(16, 128),
        answer_reserve=share(16, 128),
    )
    try:
        own_tokenizer.encode(prompts.INSTRUCTION)
        template = "instruction"
    except ValueError:
        template = "plain"

    def read_params() -> Any:
        params = weights.load_params(folder, shape)
        key = jax.random.key(0)
        return tags.resize_embeddings(params, shape, own_tokenizer, key)[0]

    size = max(shape.vocab_size, own_tokenizer.vocab_size)
    resized = dataclasses.replace(shape, vocab_size=size)
    return Opened(resized, own_tokenizer, settings, template, read_params)
