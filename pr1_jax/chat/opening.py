"""Opens what a chat talks to: the workdir of a run, or a Hugging Face folder."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pr1_jax.chat.session import Chat, Opened, changed
from pr1_jax.data import prompts, tokenizer_files
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.huggingface import tags, usage, weights
from pr1_jax.huggingface.config import max_positions
from pr1_jax.huggingface.config import read_config as read_shape
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.stages import experiment, policies
from pr1_jax.system import files
from pr1_jax.workdir.folder import read_config

_FOLDER_TOKENS = 1024  # of a response, where a folder does not say


def load(
    path: str | os.PathLike[str],
    *,
    number: int | None = None,
    template: str | None = None,
    parallel: bool = True,
    labels: bool = True,
    seed: int = 0,
    steps_per_chunk: int = 4,
    kernels: str = "auto",
    notify: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Chat:
    """Opens a checkpoint to ask it; its parameters are read at the first question.

    A run is asked as it was trained, and so is a folder that `pr1_jax.export` wrote. For
    any other folder the template is `instruction` where its tokenizer can spell that,
    and else `plain`.

    Args:
      path: workdir of a run, or a Hugging Face folder.
      number: of a run's checkpoint; default the newest.
      template: of prompts, instead.
      settings: fields of `sampler.settings.Settings`, instead; None changes nothing.
      labels: whether paths get the labels that were trained, if any were.
      parallel, seed, steps_per_chunk, kernels, notify: as of `Chat`.

    Raises:
      ValueError, OSError: one line that names what is wrong.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {} if labels else {"path_labels": ()}
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--checkpoint={path}: no such folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--checkpoint={path} has no config.json: neither the workdir of a run nor "
            "a Hugging Face folder"
        )
    if "model_type" not in files.read_object(folder / "config.json"):
        opened = _open_run(folder, number)
    elif number is not None:
        raise ValueError(
            f"--checkpoint_number={number}: {path} is a Hugging Face folder, which "
            "holds one model; leave the flag away"
        )
    else:
        opened = _open_folder(folder, given)
    trained = opened.settings
    opened = dataclasses.replace(
        opened, labels=trained.path_labels, num_paths=trained.num_paths
    )
    if template or given:
        opened = dataclasses.replace(
            opened,
            settings=changed(opened.settings, given),
            template=_given(template, opened.template),
            source=f"{opened.source}, but for what is given",
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
    try:
        made = experiment.reopen(config, jax.devices()[0])
    except (ValueError, OSError) as error:
        raise ValueError(f"--checkpoint={folder}: its config.json: {error}") from error
    which = {"number": number, "field": "--checkpoint"}
    where = config.checkpoint.folder or folder
    try:
        policies.check(made, where, **which)
    except FileNotFoundError as error:
        if number is None:
            raise
        raise FileNotFoundError(f"--checkpoint_number={number}: {error}") from error
    return Opened(
        made.model,
        made.tokenizer,
        made.settings,
        made.own.template,
        f"as {folder} was trained",
        lambda: policies.read(made, where, **which),
    )


def _open_folder(folder: pathlib.Path, given: Mapping[str, Any]) -> Opened:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = read_shape(folder, dtype=dtype, param_dtype=dtype)
    tokenizer = tokenizer_files.load(folder)
    weights.check_weights(folder, shape, tokenizer)
    trained = usage.read(folder)
    tokenizer.use_bos("auto" if trained is None else trained.bos)
    if trained is None:
        template, source = (
            prompts.Template(_guessed_template(tokenizer)),
            f"guessed, since {folder} has no {usage.FILE}",
        )
    else:
        template, source = trained.template, f"as {folder / usage.FILE} says"
    try:
        settings = _folder_settings(trained, given, max_positions(folder))
        if settings.planned:
            tokenizer.use_plans()
        settings.check_vocab(Vocab.of(tokenizer, settings.grammar))
    except ValueError as error:
        if trained is None or str(error).startswith("--"):
            raise
        raise ValueError(f"{folder / usage.FILE}: {error}") from error

    def read_params() -> Any:
        params = weights.load_params(folder, shape)
        key = jax.random.key(0)
        return tags.resize_embeddings(params, shape, tokenizer, key)[0]

    size = max(shape.vocab_size, tokenizer.vocab_size)
    resized = dataclasses.replace(shape, vocab_size=size)
    return Opened(resized, tokenizer, settings, template, source, read_params)


def _folder_settings(
    trained: usage.Usage | None, given: Mapping[str, Any], positions: int
) -> Settings:
    """Settings of a folder, whose model has so many positions.

    What it does not say is guessed, for a model that may not know the tags.
    """
    known = {} if trained is None else _known_settings(trained.sampling)
    tokens = given.get("max_response_tokens") or known.get(
        "max_response_tokens", min(_FOLDER_TOKENS, 3 * positions // 4)
    )
    if tokens >= positions:
        raise ValueError(
            f"--max_tokens={tokens}: the model has {positions} positions, prompt included"
        )
    left = positions - tokens
    share = lambda part, most: max(8, min(tokens // part, most))
    guessed = {
        "min_path_tokens": share(32, 64) // 2,
        "summary_reserve": share(16, 128),
        "answer_reserve": share(16, 128),
    }
    budgets = {
        "max_prompt_tokens": min(known.get("max_prompt_tokens", left), left),
        "max_response_tokens": tokens,
    }
    return Settings(**guessed | known | budgets)


def _known_settings(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Settings` in a mapping; ValueError names one of another type."""
    known = {}
    for field in dataclasses.fields(Settings):
        value = sampling.get(field.name)
        if value is None:
            continue
        kinds = (int, float) if field.type is float else (field.type,)
        if field.type == tuple[str, ...]:
            kinds = (list,)  # in JSON
        if type(value) not in kinds:
            kind = kinds[-1].__name__
            raise ValueError(f"{field.name}={value!r:.200} is not of type {kind}")
        known[field.name] = value
    return known


def _given(name: str | None, trained: prompts.Template) -> prompts.Template:
    """The template of this name, with the instruction that was trained."""
    return dataclasses.replace(trained, name=name, text="") if name else trained


def _guessed_template(tokenizer: Tokenizer) -> str:
    try:
        tokenizer.encode(prompts.INSTRUCTION)
    except ValueError:
        return "plain"
    return "instruction"
