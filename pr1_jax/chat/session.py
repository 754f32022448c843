"""Asks a model one question at a time, on one device.

chat = opening.load("runs/quickstart")
chat.ask("Which number has a partner 4 larger? A 12 16 B 51 30")["response"]
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import Result
from pr1_jax.data import prompts, tasks, tokenizer
from pr1_jax.model.backend import choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import param_count
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import DecodeFn
from pr1_jax.stages.responses import Response, trace
from pr1_jax.trajectory import Trajectory

FEWEST_PROMPT_TOKENS = 64  # for which is compiled, and twice as many, and so on


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a checkpoint holds; its parameters are not read yet."""

    model: ModelConfig
    tokenizer: tokenizer.Tokenizer
    settings: Settings
    template: prompts.Template
    source: str  # where settings and template are from, in a few words
    read_params: Callable[[], Any]
    labels: tuple[str, ...] = ()  # of paths, as trained; the settings may have none
    num_paths: int = 2  # of a block, as trained


_FLAGS = {
    **{name: f"--{name}" for name in ("num_paths", "temperature", "top_k", "top_p")},
    "max_response_tokens": "--max_tokens",
    "max_sequential_steps": "--max_steps",
}


def changed(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings with some fields changed; ValueError names the flag that is wrong."""
    paths = given.get("num_paths", settings.num_paths)
    labels = given.get("path_labels", settings.path_labels)
    if settings.planned and not labels:
        raise ValueError(
            "--no_labels, /labels: the model plans its paths, and without labels no path "
            "knows which plan is its own; leave them as they are"
        )
    if labels and len(labels) < paths <= 8:
        without = ", or leave the labels away with --no_labels or /labels"
        raise ValueError(
            f"--num_paths={paths}: the model has labels for {len(labels)} paths; take "
            f"fewer{without * (not settings.planned)}"
        )
    try:
        return dataclasses.replace(settings, **given)
    except ValueError as error:
        name = lambda match: _FLAGS.get(match[1], match[1])
        raise ValueError(re.sub(r"\brollout\.(\w+)", name, str(error))) from error


_EXAMPLE = "A train leaves at 9:40 and arrives at 13:05. How many minutes does it take?"


class Chat:
    """A model that answers questions, with settings that may change in between.

    Attributes:
      settings: how responses are decoded. parallel: whether blocks may be opened.
      labels: of paths, as trained; `settings.path_labels` are those, or none.
      seed: of the draws. asked: questions so far; each draws anew.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        parallel: bool = True,
        seed: int = 0,
        steps_per_chunk: int = 4,
        kernels: str = "auto",
        notify: Callable[[str], None] = lambda text: None,
        decode_fn: DecodeFn | None = None,
    ):
        """Reads and compiles nothing yet.

        Args:
          kernels: of `model.backend.KERNELS`.
          steps_per_chunk: decode steps between two looks at a response.
          notify: is told what takes long.
          decode_fn: stands in for the model (tests).
        """
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.settings, self.template = opened.settings, opened.template
        self.labels = opened.labels
        self._trained_paths = opened.num_paths
        self._source = opened.source
        self.parallel, self.seed, self.asked = parallel, seed, 0
        self._read_params, self._notify = opened.read_params, notify
        self._decode_fn = decode_fn
        self._kernels = kernels
        self._steps_per_chunk = steps_per_chunk
        self._samplers: dict[Settings, Sampler] = {}
        self._warm: dict[Settings, int] = {}  # prompt tokens compiled for

    @functools.cached_property
    def params(self) -> Any:
        """The parameters, read when first needed."""
        self._notify("reading the parameters")
        params = self._read_params()
        self._notify(f"{param_count(params) / 1e6:,.1f} M parameters")
        return params

    @functools.cached_property
    def task(self) -> tasks.Task | None:
        """The task made by code whose language is all that the model speaks, if one."""
        return tasks.spoken(self.tokenizer, self._trained_paths)

    @property
    def about(self) -> str:
        """How the model is asked, and why so, in a few words."""
        s = self.settings
        paths, limit = f"{s.num_paths} paths", f"up to {s.max_response_tokens} tokens"
        if s.planned:
            paths = f"2 to {s.num_paths} planned paths"
        if s.path_labels:
            names = [label.strip() or repr(label) for label in s.path_labels]
            paths += f" with the labels {', '.join(names[: s.num_paths])}"
        elif self.labels:
            paths += " without their labels"
        if s.max_sequential_steps:
            limit += f" and {s.max_sequential_steps} sequential steps{self.too_few}"
        return (
            f"template {self.template}, {s.variant}, {paths}, {limit}: {self._source}"
        )

    @property
    def too_few(self) -> str:
        """What to say of a deadline that leaves no room for a block; else ""."""
        s = self.settings
        with_blocks = bool(s.max_sequential_steps and s.max_blocks)
        return " (too few for a block)" if with_blocks and not s.may_open_blocks else ""

    def example(self) -> str:
        """A question that suits the model."""
        if self.task is None:
            return _EXAMPLE
        problems = self.task.records("hard", "eval", seed=self.seed)
        return problems[self.asked]["question"].strip()

    def change(self, **settings: Any) -> None:
        """Changes fields of `settings`; ValueError names what is wrong."""
        self.settings = changed(self.settings, settings)

    def switch_labels(self) -> None:
        """Leaves the labels of paths away, or takes those that were trained again.

        Raises:
          ValueError: there are none, or fewer than paths.
        """
        if not self.labels:
            raise ValueError("the model was trained without labels of paths")
        self.change(path_labels=() if self.settings.path_labels else self.labels)

    def prompt(self, question: str) -> np.ndarray:
        """Token ids of a question in its template, int32.

        Raises:
          ValueError: the tokenizer cannot spell it, or it is empty or too long.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        if self.template.name == "plain" and self.task is not None:
            question = self.task.as_asked(question)
        try:
            tokens = prompts.prompt_tokens(
                question, self.tokenizer, template=self.template
            )
        except ValueError as error:
            if self.task is None:
                raise
            raise ValueError(
                f"the model only knows questions like: {self.example()} ({error})"
            ) from error
        limit = self.settings.max_prompt_tokens
        if len(tokens) > limit:
            raise ValueError(
                f"the question has {len(tokens)} tokens in the template "
                f"{self.template}, and prompts may have {limit}: ask a shorter one"
            )
        return tokens

    def warm_up(self, prompt_tokens: int = 1) -> None:
        """Compiles what a prompt of so many tokens needs, unless that is done."""
        settings = self._decoding
        limit = settings.max_prompt_tokens
        needed = max(prompt_tokens, min(FEWEST_PROMPT_TOKENS, limit))
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
        (trajectory,), _ = self._sampler.sample(
            self.params, [prompt], 1, key, on_chunk=on_chunk if watch else None
        )
        seconds = time.perf_counter() - began - watched_sec
        if watch:
            watch(trajectory)
        return self.record(question, trajectory, seconds)

    def record(
        self, question: str, trajectory: Trajectory, seconds: float
    ) -> dict[str, Any]:
        """What is known of a response, as JSON: as in a run, but for the reference.

        Also `final_answer`, what it answers; `cut_off`, where it did not finish: at its
        "deadline" of sequential steps or its limit of "tokens", or null; `seconds` that
        it took; `logp`, the sum of its sampled log-probs; and the `trace` of its tokens.
        """
        text = self.tokenizer.decode(trajectory.tokens, continues=True)
        problem, settings = (
            prompts.Problem(question, "", trajectory.prompt),
            self.settings,
        )
        made = Response.of(
            problem, trajectory, text, Result("", ""), grammar=settings.grammar
        )
        record = made.record()
        for name in ("answer", "verdict", "reason", "string_correct"):
            del record[name]
        steps = made.sequential_steps
        cut_off = "deadline" if steps == settings.max_sequential_steps else None
        if made.total_tokens == settings.max_response_tokens:
            cut_off = cut_off or "tokens"
        return record | {
            "final_answer": extract(text),
            "cut_off": None if made.finished else cut_off,
            "seconds": round(seconds, 4),
            "logp": round(float(trajectory.logps.sum()), 3),
            "trace": trace(trajectory, self.tokenizer),
        }

    @property
    def _decoding(self) -> Settings:
        blocks = {} if self.parallel else {"max_blocks": 0}
        return dataclasses.replace(self.settings, **blocks)

    @property
    def _sampler(self) -> Sampler:
        settings = self._decoding
        if settings not in self._samplers:
            sampler = Sampler(
                None if self._decode_fn else choose(self.model, self._kernels),
                Vocab.of(self.tokenizer, settings.grammar),
                settings,
                Batching(rows=1, steps_per_chunk=self._steps_per_chunk, one_size=True),
                decode_fn=self._decode_fn,
            )
            self._samplers[settings] = sampler
        return self._samplers[settings]
