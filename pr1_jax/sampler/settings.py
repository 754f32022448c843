"""How responses are decoded: token ids that the runtime knows, and budgets."""

import dataclasses

from pr1_jax import layout, policy, tags


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ids that the runtime knows.

    `special_ids` are the six tags, then the EOS ids: one, or several that all end a
    response. `plan_ids` are `<Plan>` and `</Plan>` where blocks are planned.
    """

    special_ids: tuple[int, ...]
    newline_id: int
    num_tokens: int | None = None  # ids from here on are never written
    label_ids: tuple[tuple[int, ...], ...] = ()  # what paths begin with; () = nothing
    plan_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer, grammar: tags.Grammar = tags.PLAIN) -> "Vocab":
        """The ids of a tokenizer, which has those of plans where these are planned.

        Raises:
          ValueError: a label is no tokens of the tokenizer; names it.
        """
        ids = [*(tokenizer.tag_ids[tag] for tag in tags.TAGS), *tokenizer.eos_ids]
        plans = tags.PLAN_TAGS if grammar.planned else ()
        return cls(
            tuple(int(i) for i in ids),
            int(tokenizer.newline_id),
            tokenizer.vocab_size,
            tokenizer.label_ids(grammar.labels) if grammar.labels else (),
            tuple(int(tokenizer.tag_ids[tag]) for tag in plans),
        )

    @property
    def tag_ids(self) -> tuple[int, ...]:
        """Ids of the tags, in the order of `Grammar.tags`."""
        return self.special_ids[:EOS] + self.plan_ids

    @property
    def ban_ids(self) -> tuple[int, ...]:
        """Ids that bans speak of, in the order of their bits."""
        return self.special_ids + self.plan_ids

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of which any ends a response."""
        return self.special_ids[EOS:]


# Bits of `bans`, in the order of `Vocab.ban_ids`; EOS is the first of its ids.
PARALLEL, END_PARALLEL, PATH, END_PATH, SUMMARY_OPEN, END_SUMMARY, EOS = range(7)
PLAN, END_PLAN = -2, -1  # in `Vocab.ban_ids`, from its end
CLOSING = 3  # tokens that close a block: </Parallel>, newline, <Summary>


@dataclasses.dataclass(frozen=True)
class Settings:
    """How responses are decoded. Lengths are in tokens and count tags.

    Budgets are planned before a fork, so a block always closes: `<Parallel>` is
    allowed only where the smallest block, a summary of `summary_reserve` and an
    answer of `answer_reserve` still fit after it. A path's budget is what remains
    after those, divided by the paths. `max_sequential_steps` limits the critical path
    likewise, on which a block counts as its longest path. Where blocks are planned, a
    block has from 2 to `num_paths` paths, and the smallest has two plans and two paths.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    max_sequential_steps: int = 0  # 0 = no other limit than the tokens
    num_paths: int = 2  # of a block; where it is planned, at most
    max_blocks: int = 4  # 0 = `<Parallel>` is always banned (ordinary decoding)
    min_path_tokens: int = 4
    max_path_tokens: int = 0  # 0 = no other limit than the plan
    path_labels: tuple[str, ...] = ()  # text that each path begins with; () = none
    planned: bool = False  # the model writes a plan of each path before they fork
    min_plan_tokens: int = 3
    max_plan_tokens: int = 0  # 0 = no other limit than the block's
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

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            large = isinstance(value, int) and value >= 2**31
            need(field.name, not large, "must be below 2^31")
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
        need(
            "min_plan_tokens", self.min_plan_tokens >= 3, "must hold both tags and one"
        )
        limit = self.max_plan_tokens
        need(
            "max_plan_tokens",
            limit == 0 or limit >= self.min_plan_tokens,
            f"must be 0 or at least min_plan_tokens={self.min_plan_tokens}",
        )
        need("max_summary_tokens", self.max_summary_tokens >= 0, "must not be negative")
        need("summary_reserve", self.summary_reserve >= 1, "must hold </Summary> (1)")
        need("answer_reserve", self.answer_reserve >= 0, "must not be negative")
        steps = self.max_sequential_steps
        need("max_sequential_steps", steps >= 0, "must not be negative")
        need(
            "max_sequential_steps",
            steps == 0 or steps >= self.answer_reserve,
            "leaves no room for an answer: it must be 0 (no limit) or at least "
            f"rollout.answer_reserve={self.answer_reserve}",
        )
        need("temperature", self.temperature >= 0, "must not be negative")
        need("top_k", self.top_k >= 0, "must not be negative")
        need("top_p", 0 < self.top_p <= 1, "must be in (0, 1]")
        known = self.variant in layout.VARIANTS
        need("variant", known, f"is not one of {layout.VARIANTS}")
        self._check_labels()

    def _check_labels(self) -> None:
        labels = self.path_labels
        given = f"rollout.path_labels={labels!r}"
        is_text = lambda label: isinstance(label, str) and label.strip()
        if not isinstance(labels, tuple | list) or not all(map(is_text, labels)):
            raise ValueError(
                f"{given} must hold texts, none of them blank, one a path, as (' 1', ' 2'); "
                "() = no labels"
            )
        object.__setattr__(self, "path_labels", tuple(labels))  # JSON gives a list
        if labels and len(labels) < self.num_paths:
            raise ValueError(
                f"{given} is too few for rollout.num_paths={self.num_paths}: give "
                "one for each path, or () for none"
            )
        if self.planned and not labels:
            raise ValueError(
                f"rollout.planned=True needs rollout.path_labels, not {labels!r}: paths "
                "could not know which plan is theirs; give a label for each path"
            )
        if len({*labels}) < len(labels):
            raise ValueError(
                f"{given} has a label twice: paths must have different ones"
            )

    @property
    def grammar(self) -> tags.Grammar:
        """The grammar of responses."""
        return tags.Grammar(self.path_labels, self.planned)

    def check_vocab(self, vocab: Vocab) -> None:
        """Checks that paths have room for their labels, and bans for their bits.

        Raises:
          ValueError: names rollout.min_path_tokens, or rollout.planned, and what it must
            be.
        """
        assert bool(vocab.plan_ids) == self.planned, (vocab.plan_ids, self.planned)
        if self.planned and len(vocab.ban_ids) > policy.ORDINARY:
            raise ValueError(
                f"rollout.planned=True: the model has {len(vocab.eos_ids)} EOS ids, and "
                f"at most {policy.ORDINARY - EOS - len(vocab.plan_ids)} have a bit in bans "
                "beside the tags: set it to False, or take ids from eos_token_id in its "
                "generation_config.json"
            )
        labels = vocab.label_ids
        assert not labels or len(labels) >= self.num_paths, (labels, self.num_paths)
        assert bool(labels) == bool(self.path_labels), (labels, self.path_labels)
        longest = max(map(len, labels), default=0)
        if self.min_path_tokens < longest + 2:
            raise ValueError(
                f"rollout.min_path_tokens={self.min_path_tokens} must hold both tags and "
                f"the longest label of rollout.path_labels={self.path_labels!r} (2 + "
                f"{longest} tokens): set it to {longest + 2} or more, or shorten the labels"
            )

    @property
    def smallest_block(self) -> int:
        """Tokens that must be left after `<Parallel>`: paths, closing tags, reserves."""
        return self.smallest_block_of(self.num_paths)

    def smallest_block_of(self, paths):
        """`smallest_block` where a response has so many paths a block, or [B]."""
        if self.planned:
            return self._least(tags.MIN_PATHS, tags.MIN_PATHS)
        return self._least(0, paths)

    @property
    def smallest_block_steps(self) -> int:
        """Sequential steps that must be left after `<Parallel>`: one path, not all."""
        return self._least(tags.MIN_PATHS if self.planned else 0, 1)

    def _least(self, plans: int, paths: int) -> int:
        """Tokens of so many smallest plans and paths, closing tags and reserves."""
        inside = plans * self.min_plan_tokens + paths * self.min_path_tokens
        return inside + self.after_paths

    @property
    def after_paths(self) -> int:
        """Tokens, and steps, that must be left once all paths of a block have ended."""
        return CLOSING + self.summary_reserve + self.answer_reserve

    @property
    def may_open_blocks(self) -> bool:
        """Whether a block is allowed, and the smallest fits at a response's beginning."""
        steps = self.max_sequential_steps or self.max_response_tokens
        fits = self.max_response_tokens > self.smallest_block
        return bool(self.max_blocks) and fits and steps > self.smallest_block_steps

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.max_prompt_tokens + self.max_response_tokens
