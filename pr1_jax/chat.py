"""Asks a model questions, and shows its paths side by side while they are sampled.

    python -m pr1_jax.chat --checkpoint=runs/quickstart

A checkpoint is the workdir of a run, a folder that `pr1_jax.export` wrote, or any
Qwen3, Qwen2 or Llama folder. In a terminal one asks and watches; `--question` asks once;
in a pipe each line of the input is a question, and the answers are plain text, or JSON
lines with `--json`. The model decodes on one device. In a notebook:

    chat = load("runs/quickstart")
    chat.ask("Which two add to 26? 17 9 5 15")["response"]
"""

import dataclasses
import functools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from pr1_jax import (
    answers,
    checkpoint,
    cli,
    data,
    decode,
    embedded,
    experiment,
    hf,
    hf_tensors,
    layout,
    model,
    rollout,
    run,
    tags,
    tokenizer,
)
from pr1_jax.sampler import Sampler
from pr1_jax.trajectory import Trajectory

_FOLDER_TOKENS = 1024  # of a response, where a folder does not say
_FEWEST_PROMPT_TOKENS = 64  # for which is compiled, and twice as many, and so on
_EXAMPLE = "A train leaves at 9:40 and arrives at 13:05. How many minutes does it take?"


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a checkpoint holds; its parameters are not read yet."""

    model: model.ModelConfig
    tokenizer: tokenizer.Tokenizer
    settings: decode.Settings
    template: str  # one of `data.TEMPLATES`
    read_params: Callable[[], Any]


class Chat:
    """A model that answers questions, with settings that may change in between.

    Attributes:
      settings: how responses are decoded. parallel: whether blocks may be opened.
      seed: of the draws. asked: questions so far; each draws anew.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        parallel: bool = True,
        seed: int = 0,
        steps_per_chunk: int = 4,
        notify: Callable[[str], None] = lambda text: None,
        decode_fn: decode.DecodeFn | None = None,
    ):
        """Reads and compiles nothing yet.

        Args:
          steps_per_chunk: decode steps between two looks at a response.
          notify: is told what takes long.
          decode_fn: stands in for the model (tests).
        """
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.settings, self.template = opened.settings, opened.template
        self.parallel, self.seed, self.asked = parallel, seed, 0
        self._read_params, self._notify = opened.read_params, notify
        self._decode_fn = decode_fn
        self._steps_per_chunk = steps_per_chunk
        self._samplers: dict[decode.Settings, Sampler] = {}
        self._warm: dict[decode.Settings, int] = {}  # prompt tokens compiled for

    @functools.cached_property
    def params(self) -> Any:
        """The parameters, read when first needed."""
        self._notify("reading the parameters")
        return self._read_params()

    @functools.cached_property
    def is_embedded(self) -> bool:
        """Whether the model speaks the language of the embedded task alone."""
        vocab = lambda x: x.hf_tokenizer.get_vocab()
        return vocab(self.tokenizer) == vocab(embedded.make_tokenizer())

    @property
    def about(self) -> str:
        """What is asked, in a few words."""
        leaves = jax.tree.leaves(self.params)
        count = sum(math.prod(x.shape) for x in leaves) / 1e6
        s = self.settings
        return (
            f"{count:,.1f} M parameters, {s.variant}, {s.num_paths} paths, "
            f"template {self.template}, up to {s.max_response_tokens} tokens"
        )

    def example(self) -> str:
        """A question that suits the model."""
        if not self.is_embedded:
            return _EXAMPLE
        problems = embedded.Problems("hard", "eval", seed=self.seed)
        return problems[self.asked]["question"].strip()

    def change(self, **settings: Any) -> None:
        """Changes fields of `settings`; ValueError names what is wrong."""
        self.settings = _changed(self.settings, settings)

    def prompt(self, question: str) -> np.ndarray:
        """Token ids of a question in its template, int32.

        Raises:
          ValueError: the tokenizer cannot spell it, or it is empty or too long.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        if self.template == "plain" and self.is_embedded:
            question = question.strip() + "\n"  # as problems of the task end
        try:
            found = data.prompt_tokens(question, self.tokenizer, template=self.template)
        except ValueError as error:
            if not self.is_embedded:
                raise
            raise ValueError(
                f"the model only knows questions like: {self.example()} ({error})"
            ) from error
        limit = self.settings.max_prompt_tokens
        if len(found) > limit:
            raise ValueError(
                f"the question has {len(found)} tokens in the template "
                f"{self.template}, and prompts may have {limit}: ask a shorter one"
            )
        return found

    def warm_up(self, prompt_tokens: int = 1) -> None:
        """Compiles what a prompt of so many tokens needs, unless that is done."""
        settings = self._decoding
        limit = settings.max_prompt_tokens
        needed = max(prompt_tokens, min(_FEWEST_PROMPT_TOKENS, limit))
        if self._warm.get(settings, 0) >= needed:
            return
        params = self.params
        began = time.perf_counter()
        self._notify("compiling, once …")
        size = min(2 ** math.ceil(math.log2(needed)), limit)
        self._sampler.warm_up(params, size)
        self._warm[settings] = size
        self._notify(f"compiled in {time.perf_counter() - began:.1f} s")

    def ask(
        self, question: str, *, watch: Callable[[Trajectory], None] | None = None
    ) -> dict[str, Any]:
        """Samples a response.

        Args:
          watch: called every few steps with the response as far as it is written, and
            at last with all of it. What it raises ends the response. The time that it
            takes does not count.

        Returns:
          Its record, see `record`.

        Raises:
          ValueError: as `prompt`.
        """
        prompt = self.prompt(question)
        self.warm_up(len(prompt))
        key = jax.random.fold_in(jax.random.key(self.seed), self.asked)
        self.asked += 1
        watched_sec = 0.0

        def on_chunk(unfinished: Mapping[int, Trajectory]) -> None:
            nonlocal watched_sec
            began = time.perf_counter()
            for trajectory in unfinished.values():
                watch(trajectory)
            watched_sec += time.perf_counter() - began

        began = time.perf_counter()
        (trajectory,) = self._sampler.sample(
            self.params, [prompt], 1, key, on_chunk=on_chunk if watch else None
        )
        seconds = time.perf_counter() - began - watched_sec
        if watch:
            watch(trajectory)
        return self.record(question, trajectory, seconds)

    def record(
        self, question: str, trajectory: Trajectory, seconds: float
    ) -> dict[str, Any]:
        """What is known of a response, as JSON: that of `rollout`, without a reference.

        Also `final_answer`, what it answers; `seconds` that it took; `logp`, the sum of
        its sampled log-probs; and the `trace` of its tokens (`Scored.trace`).
        """
        text = self.tokenizer.decode(trajectory.tokens)
        problem = data.Problem(question, "", trajectory.prompt)
        faults = tags.check_format(text)
        scored = rollout.Scored(problem, trajectory, text, "", "", not faults)
        record = scored.record()
        for name in ("answer", "verdict", "reason"):
            del record[name]
        return record | {
            "final_answer": answers.extract(text),
            "seconds": round(seconds, 4),
            "logp": round(float(trajectory.logps.sum()), 3),
            "trace": scored.trace(self.tokenizer),
        }

    @property
    def _decoding(self) -> decode.Settings:
        blocks = {} if self.parallel else {"max_blocks": 0}
        return dataclasses.replace(self.settings, **blocks)

    @property
    def _sampler(self) -> Sampler:
        settings = self._decoding
        if settings not in self._samplers:
            sampler = Sampler(
                None if self._decode_fn else model.with_kernels(self.model),
                decode.Vocab.of(self.tokenizer),
                settings,
                rows=1,
                steps_per_chunk=self._steps_per_chunk,
                decode_fn=self._decode_fn,
            )
            sampler.slot_sizes = sampler.slot_sizes[-1:]  # none is compiled midway
            self._samplers[settings] = sampler
        return self._samplers[settings]


def load(
    path: str | os.PathLike[str],
    *,
    number: int | None = None,
    template: str | None = None,
    parallel: bool = True,
    seed: int = 0,
    steps_per_chunk: int = 4,
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
      parallel, seed, steps_per_chunk, notify: as of `Chat`.

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
    if "model_type" not in hf_tensors.read_json(folder / "config.json"):
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
        settings=_changed(opened.settings, given),
        template=template or opened.template,
    )
    return Chat(
        opened,
        parallel=parallel,
        seed=seed,
        steps_per_chunk=steps_per_chunk,
        notify=notify,
    )


def _changed(settings: decode.Settings, given: Mapping[str, Any]) -> decode.Settings:
    try:
        return dataclasses.replace(settings, **given)
    except ValueError as error:
        text = str(error).replace("rollout.max_response_tokens", "--max_tokens")
        raise ValueError(text.replace("rollout.", "--")) from error


def _open_run(folder: pathlib.Path, number: int | None) -> Opened:
    config = run.read_config(folder)
    config.checkpoint.init = ""
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
    shape = hf.read_config(folder, dtype=dtype, param_dtype=dtype)
    own_tokenizer = tokenizer.load(folder)
    hf.check_weights(folder, shape, own_tokenizer)
    positions = hf.max_positions(folder)
    tokens = given.get("max_response_tokens", min(_FOLDER_TOKENS, 3 * positions // 4))
    if tokens >= positions:
        raise ValueError(
            f"--max_tokens={tokens}: the model has {positions} positions, prompt included"
        )
    share = lambda part, most: max(8, min(tokens // part, most))
    settings = decode.Settings(
        max_prompt_tokens=positions - tokens,
        max_response_tokens=tokens,
        min_path_tokens=share(32, 64) // 2,
        summary_reserve=share(16, 128),
        answer_reserve=share(16, 128),
    )
    try:
        own_tokenizer.encode(data.INSTRUCTION)
        template = "instruction"
    except ValueError:
        template = "plain"

    def read_params() -> Any:
        params = hf.load_params(folder, shape)
        key = jax.random.key(0)
        return hf.resize_embeddings(params, shape, own_tokenizer, key)[0]

    size = max(shape.vocab_size, own_tokenizer.vocab_size)
    resized = dataclasses.replace(shape, vocab_size=size)
    return Opened(resized, own_tokenizer, settings, template, read_params)


def main(argv: list[str]) -> None:
    """Reads the flags; what is wrong is one line and exit code 2."""
    del argv
    from pr1_jax import chat_command

    cli.require([_CHECKPOINT])
    question = _QUESTION.value
    drawn = chat_command.can_draw() and not _JSON.value
    try:
        chat = load(
            _CHECKPOINT.value,
            number=_NUMBER.value,
            template=_TEMPLATE.value,
            parallel=not _NO_PARALLEL.value,
            seed=_SEED.value,
            steps_per_chunk=1 if drawn else 32,
            notify=lambda text: print(text, file=sys.stderr, flush=True),
            variant=_VARIANT.value,
            num_paths=_NUM_PATHS.value,
            max_response_tokens=_MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
        )
        try:
            first = chat.prompt(chat.example() if question is None else question)
        except ValueError as error:
            if question is None:
                raise
            raise ValueError(f"--question={question[:60]}: {error}") from error
        chat.warm_up(len(first))
    except (ValueError, OSError) as error:
        cli.stop(error)
    except KeyboardInterrupt:
        sys.exit(130)
    pace = _PACE.value
    if pace is None:
        pace = 30.0 if chat.is_embedded else 0.0
    sys.exit(
        chat_command.run(chat, question, drawn=drawn, as_json=_JSON.value, pace=pace)
    )


if __name__ == "__main__":
    # Not above: `load` is for programs with flags of their own, too.
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "Workdir of a run, or a Hugging Face folder."
    )
    _NUMBER = flags.DEFINE_integer(
        "checkpoint_number", None, "Of a run's checkpoints, as its folder; the newest."
    )
    _QUESTION = flags.DEFINE_string("question", None, "Asks this and ends.")
    _TEMPERATURE = flags.DEFINE_float(
        "temperature", None, "Of the draws, 0 = greedy; as trained.", lower_bound=0
    )
    _TOP_P = flags.DEFINE_float(
        "top_p", None, "Share of the likeliest tokens.", lower_bound=0, upper_bound=1
    )
    _TOP_K = flags.DEFINE_integer(
        "top_k", None, "Number of the likeliest tokens, 0 = all.", lower_bound=0
    )
    _NUM_PATHS = flags.DEFINE_integer(
        "num_paths", None, "Of a block.", lower_bound=2, upper_bound=8
    )
    _MAX_TOKENS = flags.DEFINE_integer(
        "max_tokens", None, "Of a response.", lower_bound=1
    )
    _SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
    _NO_PARALLEL = flags.DEFINE_bool(
        "no_parallel", False, "Bans <Parallel>: ordinary decoding."
    )
    _VARIANT = flags.DEFINE_enum(
        "variant", None, layout.VARIANTS, "Of attention; as trained, or structured."
    )
    _TEMPLATE = flags.DEFINE_enum(
        "template", None, ["plain", "instruction", "chat"], "Of prompts; as trained."
    )
    _JSON = flags.DEFINE_bool("json", False, "Writes a JSON object a line.")
    _PACE = flags.DEFINE_float(
        "pace",
        None,
        "Steps a second that are shown in a terminal, at most; 0 = no limit. Default: "
        "30 for the embedded model, which is too fast to watch, else 0.",
        lower_bound=0,
    )
    cli.run(main)
