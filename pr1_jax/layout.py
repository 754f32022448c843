"""Positions and visibility of a response, as O(T) integers (docs/method.md, section 2).

A token carries three integers: its rotary position, the block it lies in and its
path within that block (both 0 in the prompt and in the main stream). One rule,
`visible_labels`, turns labels into visibility; the trainer, the sampler and the
inspection helper `visible` all use it, so the trained policy is the sampled one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pr1_jax import tags

VARIANTS = ("structured", "causal")


def check_variant(variant: str) -> None:
    """Raises ValueError for a variant that is not known."""
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {VARIANTS}")


class Layout(NamedTuple):
    """Labels of a prompt and its response, in canonical order.

    Attributes:
      positions: [N] int32, rotary positions.
      block: [N] int32, 1, 2, … for tokens inside a path of that block, else 0.
      path: [N] int32, 1, 2, … within the block, else 0.
    """

    positions: np.ndarray
    block: np.ndarray
    path: np.ndarray


def visible_labels(block_q, path_q, block_k, path_k):
    """Whether a query may see a key that is not after it, by labels alone.

    A key is hidden only from its siblings: the queries of another path in the same
    block. The main stream has block 0 and path 0, so it sees, and is seen by, all.
    Arguments are integer arrays (NumPy or JAX) that broadcast against each other.
    """
    return (block_q != block_k) | (path_q == path_k)


def causal(num_tokens: int) -> Layout:
    """Plain causal layout: positions 0, 1, 2, … and no paths."""
    zeros = np.zeros(num_tokens, np.int32)
    return Layout(np.arange(num_tokens, dtype=np.int32), zeros, zeros.copy())


def structured(
    response_tokens: Sequence[int], tag_ids: Mapping[str, int], prompt_length: int
) -> Layout:
    """Parses a canonical response into its structured layout.

    The prompt is plain causal even where it mentions the tags; structure begins with
    the response. Positions of the worked example in docs/method.md, section 2
    (`A <Parallel> <Path> x y </Path> <Path> z </Path> </Parallel> \\n <Summary> …`)
    are 0 1 2 3 4 5 2 3 4 6 7 8 …. Plans are main stream (section 10).

    Args:
      response_tokens: int [T], canonical order.
      tag_ids: id of each of the six tags, or of eight where blocks are planned
        (`tags.Grammar.tags`).
      prompt_length: number of prompt tokens before the response.

    Returns:
      Layout over prompt and response, [prompt_length + T].

    Raises:
      ValueError: the response is malformed; names the token's index and the reason.
    """
    planned = any(tag in tag_ids for tag in tags.PLAN_TAGS)
    known = tags.Grammar(planned=planned).tags
    missing = [tag for tag in known if tag not in tag_ids]
    if missing:
        raise ValueError(f"tag_ids lacks {missing}")
    if prompt_length < 0:
        raise ValueError(f"prompt_length={prompt_length} is negative")
    names = {int(tag_ids[tag]): tag for tag in known}
    parser = _Parser(planned)
    for index, token in enumerate(np.asarray(response_tokens).tolist()):
        parser.take(index, names.get(token))
    parser.finish()
    block, path = np.array(parser.labels, np.int32).reshape(-1, 2).T
    response = structured_positions(block, path, prompt_length), block, path
    prompt = causal(prompt_length)
    return Layout(*(np.concatenate([p, r]) for p, r in zip(prompt, response)))


def structured_positions(block, path, first: int) -> np.ndarray:
    """Positions of a response under the structured layout, from its labels alone.

    Args:
      block, path: [T] integers, canonical order. first: position of its first token.

    Returns:
      [T] int32.
    """
    positions = np.zeros(len(path), np.int32)
    position = fork = furthest = first  # of the next token; of a block's paths
    inside = 0, 0
    for i, label in enumerate(
        zip(np.asarray(block).tolist(), np.asarray(path).tolist())
    ):
        if label != inside:
            if label[1] == 0:  # the block is closed
                position = furthest
            elif label[0] != inside[0]:
                fork = furthest = position
            else:
                position = fork
            inside = label
        positions[i] = position
        position += 1
        furthest = max(furthest, position)
    return positions


def visible(layout: Layout) -> np.ndarray:
    """Dense visibility, bool [N, N] (query, key). For inspection and small tests."""
    index = np.arange(len(layout.positions))
    labels = visible_labels(
        layout.block[:, None], layout.path[:, None], layout.block, layout.path
    )
    return labels & (index[:, None] >= index)


# What may come next in each state of the parser.
_EXPECTED = {
    "main": "text or <Parallel>",
    "block": "<Path>",
    "plans": "<Plan>",
    "plan": "text or </Plan>",
    "list": "<Plan> or <Path>",
    "path": "text or </Path>",
    "between": "<Path> or </Parallel>",
    "closed": "the newline after </Parallel>",
    "newline": "<Summary>",
    "summary": "text or </Summary>",
}


class _Parser:
    """Reads a response tag by tag; `labels` grows by (block, path)."""

    def __init__(self, planned: bool):
        self.labels: list[tuple[int, int]] = []
        self.planned = planned
        self.state = "main"
        self.block = self.path = 0  # the last ones that were opened
        self.plans = 0  # of the last block

    def take(self, index: int, tag: str | None) -> None:
        """Advances by one token; `tag` is its tag text, or None for other tokens."""
        label = 0, 0
        match self.state, tag:
            case (("main" | "summary" | "plan"), None):
                pass
            case "main", tags.PARALLEL:
                self.block, self.path, self.plans = self.block + 1, 0, 0
                self.state = "plans" if self.planned else "block"
            case (("plans" | "list"), tags.PLAN):
                self.plans += 1
                self.state = "plan"
            case "plan", tags.END_PLAN:
                self.state = "list" if self.plans >= tags.MIN_PATHS else "plans"
            case (("block" | "list" | "between"), tags.PATH) if self._may_open_path():
                self.path += 1
                label = self.block, self.path
                self.state = "path"
            case "path", None:
                label = self.block, self.path
            case "path", tags.END_PATH:
                label = self.block, self.path
                self.state = "between"
            case "between", tags.END_PARALLEL if self.path >= max(
                self.plans, tags.MIN_PATHS
            ):
                self.state = "closed"
            case "closed", None:
                self.state = "newline"
            case "newline", tags.SUMMARY:
                self.state = "summary"
            case "summary", tags.END_SUMMARY:
                self.state = "main"
            case _:
                self._fail(f"token {index}: {tag or 'text'}")
        self.labels.append(label)

    def finish(self) -> None:
        """Raises ValueError if a block or a summary is still open."""
        if self.state != "main":
            self._fail("the response ends")

    def _may_open_path(self) -> bool:
        return not self.planned or self.path < self.plans

    def _fail(self, what: str) -> None:
        expected = _EXPECTED[self.state]
        if self.state == "between" and self.planned:
            expected = "<Path>" if self._may_open_path() else "</Parallel>"
            expected += f" ({self.path} of {self.plans} planned paths)"
        elif self.state == "between" and self.path < tags.MIN_PATHS:
            expected = "<Path> (a block has two or more)"
        raise ValueError(f"malformed response: {what} where {expected} was expected")
