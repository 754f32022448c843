"""How responses are decoded: token ids that the runtime knows, and budgets."""

import dataclasses

from pr1_jax import layout


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ids that the runtime knows.

    `special_ids` are the six tags, then the EOS ids: one, or several that all end a
    response.
    """

    special_ids: tuple[int, ...]
    newline_id: int
    num_tokens: int | None = None  # ids from here on are never written

    @classmethod
    def of(cls, tokenizer) -> "Vocab":
        """The ids of a tokenizer."""
        ids = (*tokenizer.tag_ids.values(), *tokenizer.eos_ids)
        special_ids = tuple(int(i) for i in ids)
        return cls(special_ids, int(tokenizer.newline_id), tokenizer.vocab_size)

    @property
    def tag_ids(self) -> tuple[int, ...]:
        """Ids of the six tags."""
        return self.special_ids[:EOS]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of which any ends a response."""
        return self.special_ids[EOS:]


# Bits of `bans`, in the order of `Vocab.special_ids`; EOS is the first of its ids.
PARALLEL, END_PARALLEL, PATH, END_PATH, SUMMARY_OPEN, END_SUMMARY, EOS = range(7)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How responses are decoded. Lengths are in tokens and count tags.

    Budgets are planned before a fork, so a block always closes: `<Parallel>` is
    allowed only where the smallest block, a summary of `summary_reserve` and an
    answer of `answer_reserve` still fit after it. A path's budget is what remains
    after those, divided by the paths.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    num_paths: int = 2
    max_blocks: int = 4  # 0 = `<Parallel>` is always banned (ordinary decoding)
    min_path_tokens: int = 4
    max_path_tokens: int = 0  # 0 = no other limit than the plan
    max_summary_tokens: int = 0  # 0 = no other limit than the plan
    summary_reserve: int = 8
    answer_reserve: int = 8
    temperature: float = 1.0  # 0 = greedy, with log-probs at temperature 1
    top_k: int = 0
    top_p: float = 1.0
    variant: str = "structured"
    ban_illegal: bool = True  # ban tags, and EOS, that are illegal in a state

    def __post_init__(self):
        def need(name, ok, what):
            if not ok:
                raise ValueError(f"rollout.{name}={getattr(self, name)} {what}")

        need("max_prompt_tokens", self.max_prompt_tokens >= 1, "must be at least 1")
        need("max_response_tokens", self.max_response_tokens >= 1, "must be at least 1")
        need("num_paths", 2 <= self.num_paths <= 8, "must be from 2 to 8")
        need("max_blocks", self.max_blocks >= 0, "must not be negative")
        need("min_path_tokens", self.min_path_tokens >= 2, "must hold both tags (2)")
        limit = self.max_path_tokens
        need(
            "max_path_tokens",
            limit == 0 or limit >= self.min_path_tokens,
            f"must be 0 or at least min_path_tokens={self.min_path_tokens}",
        )
        need("max_summary_tokens", self.max_summary_tokens >= 0, "must not be negative")
        need("summary_reserve", self.summary_reserve >= 1, "must hold </Summary> (1)")
        need("answer_reserve", self.answer_reserve >= 0, "must not be negative")
        need("temperature", self.temperature >= 0, "must not be negative")
        need("top_k", self.top_k >= 0, "must not be negative")
        need("top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        known = self.variant in layout.VARIANTS
        need("variant", known, f"is not one of {layout.VARIANTS}")

    @property
    def smallest_block(self) -> int:
        """Tokens that must be left after `<Parallel>`: paths, closing tags, reserves."""
        closing = 3  # </Parallel>, newline, <Summary>
        paths = self.num_paths * self.min_path_tokens
        return paths + closing + self.summary_reserve + self.answer_reserve

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.max_prompt_tokens + self.max_response_tokens
