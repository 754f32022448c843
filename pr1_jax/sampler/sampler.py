"""Prompts in, trajectories out: the host's side of decoding (docs/method.md, section 3).

A call opens a batch of rows (`session.Session`), lets its responses wait there, and goes
on until all are done.

On several devices rows are split into shards, over `data` and `fsdp`. Each shard holds
its rows' prompts and caches, and decodes them by itself; the shards only agree on when
to stop. What is sampled does not depend on how many there are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.model.backend import Backend
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.forward import model_decode
from pr1_jax.sampler.loop import Decoding
from pr1_jax.sampler.programs import Programs
from pr1_jax.sampler.schedule import Batching, Schedule, fit
from pr1_jax.sampler.session import Figures, Session
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.sampler.state import DecodeFn
from pr1_jax.trajectory import Trajectory


class Sampler:
    """Decodes any number of responses through a fixed batch of rows.

    Attributes:
      backend, vocab, settings: as given. schedule: the shapes that follow.
    """

    def __init__(
        self,
        backend: Backend | None,
        vocab: Vocab,
        settings: Settings,
        batching: Batching,
        *,
        decode_fn: DecodeFn | None = None,
    ):
        """Nothing is compiled yet.

        Args:
          backend: computes the model; None where `decode_fn` needs no cache.
          decode_fn: stands in for the model (tests).

        Raises:
          ValueError: paths have no room for their labels.
        """
        settings.check_vocab(vocab)
        self.backend, self.vocab, self.settings = backend, vocab, settings
        self.schedule = Schedule(settings, batching)
        decode_fn = decode_fn or model_decode(backend, self.schedule.readers)
        draw = Xla.draw if backend is None else backend.draw
        self._decoding = Decoding(decode_fn, draw, vocab, settings)
        self._prompt_size = self.schedule.prompt_sizes[0]
        self._programs: Programs | None = None

    def _make(self, params) -> Programs:
        sharding = jax.tree.leaves(params)[0].sharding
        return Programs(self.backend, self._decoding, self.schedule, sharding)

    def _prepare(self, params) -> Any:
        """Makes the jitted pieces at the first call; converted parameters."""
        if self._programs is None:
            self._programs = self._make(params)
        return self._programs.convert(params)

    def lower(
        self, abstract_params, *, slots: int, prompt_tokens: int, num_lanes: int
    ) -> dict[str, jax.stages.Lowered]:
        """The prefill and a chunk of decoding, for the devices of these parameters.

        Args:
          abstract_params: tree of jax.ShapeDtypeStruct with shardings on one mesh.
          slots: of a response's cache. num_lanes: of one shard.
        """
        programs = self._make(abstract_params)
        params = programs.abstract_params(abstract_params)
        state = programs.abstract_state(slots, prompt_tokens)
        wide = self.schedule.shards * self.schedule.prompts_per_prefill
        prompts = np.zeros((wide, prompt_tokens), np.int32)
        lengths, entries = np.zeros((2, wide), np.int32)
        prefill = programs.prefill.lower(
            params, state.prompts, prompts, lengths, entries
        )
        chunk = programs.chunk(num_lanes).lower(params, state, np.int32(0))
        return {"prefill": prefill, "decode": chunk}

    def warm_up(self, params, prompt_tokens: int = 1) -> None:
        """Compiles, on idle batches, all shapes of the fewest slots that there are.

        Where responses outgrow those, or prompts the size that `prompt_tokens` fit
        in, more shapes are compiled as they come.
        """
        for rows in self.schedule.row_sizes:
            self.open(params, jax.random.key(0), prompt_tokens).warm_up(rows)

    def open(self, params, key: jax.Array, prompt_tokens: int) -> Session:
        """An idle batch, for prompts of up to so many tokens.

        Args:
          key: PRNG key that all draws follow from.
        """
        size = fit(self.schedule.prompt_sizes, prompt_tokens)
        self._prompt_size = max(self._prompt_size, size)  # it stays so in later calls
        params = self._prepare(params)
        return Session(
            self._programs,
            self.schedule,
            self.settings,
            self.vocab,
            params,
            key,
            self._prompt_size,
        )

    def sample(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        key: jax.Array,
        *,
        ids: Sequence[int] | None = None,
        on_finished: Callable[[int, Trajectory], None] | None = None,
        on_chunk: Callable[[dict[int, Trajectory]], None] | None = None,
    ) -> tuple[list[Trajectory], Figures]:
        """Decodes `samples` responses to every prompt.

        Args:
          prompts: token ids, each 1 to `max_prompt_tokens` long.
          key: PRNG key; response i (prompt-major) draws from `fold_in(key, ids[i])`,
            so what is sampled does not depend on how rows are batched.
          ids: the responses' numbers, where these are a part of more; default 0, 1, ….
          on_finished: called with i and response i as soon as it is complete.
          on_chunk: called after every chunk with the responses that are not, by i, as
            far as they are written. What it raises ends the sampling.

        Returns:
          Trajectories, prompt-major, and what they took.

        Raises:
          ValueError: a prompt is empty or longer than its budget.
        """
        self._check(prompts)
        if ids is None:
            ids = np.arange(len(prompts) * samples)
        longest = max((len(prompt) for prompt in prompts), default=1)
        session = self.open(params, key, longest)
        for prompt, some in zip(prompts, np.reshape(ids, (len(prompts), samples))):
            session.add(prompt, some)
        results: dict[int, Trajectory] = {}
        while session.is_busy:
            finished = session.advance()
            results |= finished
            if on_finished is not None:
                for number, trajectory in finished.items():
                    on_finished(number, trajectory)
            if on_chunk is not None:
                on_chunk(session.unfinished())
        return [results[number] for number in sorted(results)], session.figures

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        limit = self.settings.max_prompt_tokens
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; "
                    f"rollout.max_prompt_tokens={limit}"
                )
