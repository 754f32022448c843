"""What of a run is the user's: reward function, verifier, template (docs/rewards.md)."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import ml_collections

from pr1_jax import rewards, tags
from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result
from pr1_jax.data import prompts
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.stages.responses import Response
from pr1_jax.trajectory import Trajectory
from pr1_jax.workdir import folder
from pr1_jax.workers.own import OwnFunction

UNVERIFIED = Result("", "")  # until the user's verifier has decided
_VERDICTS = {True: CORRECT, False: INCORRECT, None: UNDECIDED}


class Functions(NamedTuple):
    """The functions that `reward.function` and `reward.verifier` name; None = none."""

    reward: OwnFunction | None = None
    verifier: OwnFunction | None = None

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> Self:
        """Those of `config.reward`; they are not loaded yet."""
        c = config.reward
        how = {"limit_sec": c.function_sec, "size": c.workers}
        reward = verifier = None
        if c.function:
            reward = OwnFunction("reward.function", c.function, "reward", **how)
        if c.verifier:
            how["processor_sec"] = c.timeout_sec
            verifier = OwnFunction("reward.verifier", c.verifier, "verifier", **how)
        return cls(reward, verifier)

    def without_rewards(self) -> Self:
        """The verifier alone."""
        return self._replace(reward=None)

    @property
    def calls_at_once(self) -> int:
        """How many threads can wait for these functions."""
        return sum(f.size for f in self if f is not None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of a reward; () without a reward function that is loaded."""
        if self.reward is None or not self.reward.parts:
            return ()
        return (rewards.SCHEDULE, *map(_part, self.reward.parts))


NONE = Functions()


def _part(name: str) -> str:
    """The part of a reward that a function calls `name`; "" is that of a number."""
    return f"{rewards.FUNCTION}.{name}" if name else rewards.FUNCTION


class Own:
    """The functions and texts that a config names.

    Attributes:
      functions: not loaded before `load`.
    """

    def __init__(self, config: ml_collections.ConfigDict, labels: Sequence[str]):
        """Reads nothing yet.

        Args:
          labels: of paths, which a template may name.
        """
        self._config, self._labels = config, labels
        self.functions = Functions.of(config)

    @functools.cached_property
    def template(self) -> prompts.Template:
        """How problems are put to the model.

        Raises:
          FileNotFoundError, ValueError: a file that the config names is not there.
        """
        c = self._config.data
        return prompts.read_template(c.template, c.instruction, labels=self._labels)

    def load(self) -> None:
        """Loads the functions that the stages need, and tries them.

        Raises:
          ValueError: names the function, or the weights of its parts, and what is wrong.
        """
        needed = self.functions
        if "rl" not in self._config.stages:
            needed = needed.without_rewards()
        for function in filter(None, needed):
            function.load()
        assert self.part_weights or needed.reward is None

    @functools.cached_property
    def part_weights(self) -> dict[str, float]:
        """Weights of the parts of a reward, once loaded; {} without a function.

        Raises:
          ValueError: `reward.weights` does not go with the function's parts.
        """
        parts = self.functions.parts
        given = self._config.reward.weights
        return rewards.part_weights(given, parts) if parts else {}

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """The user's files as the workdir of a run keeps them; once loaded."""
        texts = {
            folder.TEMPLATE: self.template.text,
            folder.INSTRUCTION: self.template.instruction,
        }
        for name, function in (
            (folder.FUNCTION, self.functions.reward),
            (folder.VERIFIER, self.functions.verifier),
        ):
            if function is not None and function.file:
                file = pathlib.Path(function.file)
                texts[name] = file.read_text("utf-8", errors="replace")
        return {name: text for name, text in texts.items() if text}


def judge(
    response: Response,
    functions: Functions,
    tokenizer: Tokenizer,
    grammar: tags.Grammar,
) -> Response:
    """A response with the verdict of the user's verifier and the parts of its reward.

    Args:
      response: `UNVERIFIED` where there is a verifier.

    Raises:
      OwnCodeError: a function failed.
    """
    if functions.verifier is not None:
        verdict = functions.verifier.verify(_record(response, tokenizer, grammar))
        response = dataclasses.replace(
            response, verdict=_VERDICTS[verdict], reason="says reward.verifier"
        )
    if functions.reward is not None:
        parts = functions.reward.score(_record(response, tokenizer, grammar))
        parts = {_part(name): value for name, value in parts.items()}
        response = dataclasses.replace(response, parts=parts)
    return response


def _record(
    response: Response, tokenizer: Tokenizer, grammar: tags.Grammar
) -> rewards.Record:
    paths, plans, summaries = read(response.trajectory, tokenizer, grammar)
    return rewards.Record(
        question=response.question,
        response=response.response,
        reference=response.answer,
        answer=extract(response.response),
        verdict=response.verdict,
        num_blocks=response.num_blocks,
        paths=paths,
        plans=plans,
        summaries=summaries,
        total_tokens=response.total_tokens,
        sequential_steps=response.sequential_steps,
        format_ok=response.format_ok,
        truncated=not response.finished,
    )


def read(
    trajectory: Trajectory, tokenizer: Tokenizer, grammar: tags.Grammar
) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The texts of paths, plans and summaries of each block, by the tags that are tokens.

    A tag that the model only spelled, in other tokens, is text.
    """
    ids, tokens = {i: tag for tag, i in tokenizer.tag_ids.items()}, trajectory.tokens
    at = [n for n, token in enumerate(tokens.tolist()) if token in ids]
    blocks: list[dict[str, list[str]]] = []
    for start, end in zip(at, [*at[1:], len(tokens)]):
        tag = ids[int(tokens[start])]
        if tag == tags.PARALLEL:
            blocks.append({tags.PLAN: [], tags.PATH: [], tags.SUMMARY: []})
        elif blocks and tag in blocks[-1]:
            text = tokenizer.decode(tokens[start + 1 : end], continues=True)
            texts = blocks[-1][tag]
            if tag == tags.PATH:
                text = tags.unlabelled(text, grammar, len(texts))
            texts.append(text)
    paths, plans = (tuple(tuple(b[t]) for b in blocks) for t in (tags.PATH, tags.PLAN))
    summaries = tuple("".join(b[tags.SUMMARY]) for b in blocks)
    return paths, plans if any(plans) else (), summaries
