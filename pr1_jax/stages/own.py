"""The functions of the user in a run: what they are told, and what follows from it."""

import dataclasses
from typing import NamedTuple, Self

import ml_collections

from pr1_jax import rewards, tags
from pr1_jax.answers.extract import extract
from pr1_jax.answers.verdicts import CORRECT, INCORRECT, UNDECIDED, Result
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.stages.responses import Response
from pr1_jax.trajectory import Trajectory
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
        """Names of the parts of a reward, once loaded; () without a reward function."""
        if self.reward is None:
            return ()
        return (rewards.SCHEDULE, *map(_part, self.reward.parts))


NONE = Functions()


def _part(name: str) -> str:
    """The part of a reward that a function calls `name`; "" is that of a number."""
    return f"{rewards.FUNCTION}.{name}" if name else rewards.FUNCTION


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
