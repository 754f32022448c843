"""Prompts in, trajectories out: the host's side of decoding (spec section 3).

Decoding runs in jitted chunks of steps (`decode.run_chunk`). Between chunks the host
collects finished rows, refills them with waiting responses, picks the lane bucket for
the next chunk and, in the causal variant, lays closed blocks out anew. All shapes are
known when the sampler is made, and `warm_up` compiles them.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pr1_jax import decode, kv_cache, model
from pr1_jax.trajectory import Trajectory

_FIELDS = [f.name for f in dataclasses.fields(decode.Emission)]


class Sampler:
    """Decodes any number of responses through a fixed batch of rows."""

    def __init__(
        self,
        config: model.ModelConfig | None,
        vocab: decode.Vocab,
        settings: decode.Settings,
        *,
        rows: int,
        prompts_per_prefill: int | None = None,
        lane_buckets: Sequence[float] = (1.0, 2.0),
        steps_per_chunk: int = 32,
        refill_share: float = 0.25,
        decode_fn: decode.DecodeFn | None = None,
    ):
        """Prepares the jitted pieces; nothing is compiled yet.

        Args:
          config: the model; None where `decode_fn` needs no cache.
          rows: responses decoded at the same time.
          prompts_per_prefill: prompts a prefill takes, at most; default `rows`.
          lane_buckets: compiled sizes of the list of live lanes, in units of `rows`.
            1 (main streams only) and `num_paths` are always there.
          steps_per_chunk: decode steps between two looks of the host.
          refill_share: finished rows are refilled once they are this share of all.
          decode_fn: stands in for the model (tests).
        """
        self.settings, self.rows = settings, rows
        self.prompts_per_prefill = min(prompts_per_prefill or rows, rows)
        self._refill_rows = max(1, round(refill_share * rows))
        self._rejoin_rows = max(1, rows // 4)
        # Under jit: every buffer is its own, and can be donated.
        self._init = jax.jit(
            lambda: decode.init_state(
                settings, rows, config and kv_cache.empty(config, settings, rows)
            )
        )
        decode_fn = decode_fn or kv_cache.model_decode(config, settings)

        chunk = functools.partial(
            decode.run_chunk,
            steps=steps_per_chunk,
            decode=decode_fn,
            vocab=vocab,
            settings=settings,
        )
        shares = {1.0, float(settings.num_paths), *map(float, lane_buckets)}
        sizes = {round(s * rows) for s in shares if 1 <= s <= settings.num_paths}
        if not settings.max_blocks:
            sizes = {rows}
        self._chunks = {
            size: jax.jit(functools.partial(chunk, num_lanes=size), donate_argnums=1)
            for size in sorted(sizes)
        }

        def start(params, state, base_key, ids, source, prompts, lengths):
            cache = None
            if config is not None:
                cache = kv_cache.prefill(config, params, prompts)
            last = np.arange(self.prompts_per_prefill), lengths - 1
            keys = jax.vmap(jax.random.fold_in, (None, 0))(base_key, ids)
            return decode.admit(
                state,
                settings,
                self.prompts_per_prefill,
                lengths,
                prompts[last],
                source,
                keys,
                cache,
            )

        self._start = jax.jit(start, donate_argnums=1)
        self._rejoin = jax.jit(
            functools.partial(kv_cache.rejoin, config, settings, vocab),
            donate_argnums=1,
        )
        self._vocab = vocab
        self._state = None
        # Half-precision copies for the decode loop, made once a call.
        casts = config is not None and config.dtype != config.param_dtype
        cast = jax.jit(functools.partial(model.compute_params, config))
        self._compute_params = cast if casts else lambda params: params
        self.stats: dict[str, float] = {}

    def warm_up(self, params) -> None:
        """Compiles every shape on an idle batch, so that sampling compiles nothing."""
        params = self._compute_params(params)
        state = self._init()
        prompts = np.zeros(
            (self.prompts_per_prefill, self.settings.max_prompt_tokens), np.int32
        )
        idle = np.full(self.rows, -1, np.int32)
        state = self._start(
            params,
            state,
            jax.random.key(0),
            idle,
            idle,
            prompts,
            np.ones(len(prompts), np.int32),
        )
        for chunk in self._chunks.values():
            state, _, _ = chunk(params, state, np.int32(0))
        if self.settings.variant == "causal" and self.settings.max_blocks:
            state = self._rejoin(params, state, *self._rejoin_arguments([]))
        self._state = jax.block_until_ready(state)

    def sample(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        samples: int,
        key: jax.Array,
        *,
        first: int = 0,
        on_finished: Callable[[int, Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decodes `samples` responses to every prompt.

        Args:
          prompts: token ids, each 1 to `max_prompt_tokens` long.
          key: PRNG key; response i (prompt-major) draws from `fold_in(key, first + i)`,
            so what is sampled does not depend on how rows are batched.
          first: number of the first response, where these are a part of more.
          on_finished: called with i and response i as soon as it is complete.

        Returns:
          Trajectories, prompt-major.

        Raises:
          ValueError: a prompt is empty or longer than its budget.
        """
        limit = self.settings.max_prompt_tokens
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; "
                    f"rollout.max_prompt_tokens={limit}"
                )
        params = self._compute_params(params)
        run = _Run(prompts, samples, self.rows, self.settings, self._vocab)
        state = self._init() if self._state is None else self._state
        self._state = None  # donated
        seconds = dict.fromkeys(("prefill", "decode"), 0.0)
        stepped = useful = 0
        while run.waiting or run.occupied.any():
            began = time.perf_counter()
            while run.wants_refill(self._refill_rows):
                response, source, *rest = run.admit(self.prompts_per_prefill)
                state = self._start(params, state, key, response + first, source, *rest)
                run.live[source >= 0, 0] = True
            seconds["prefill"] += time.perf_counter() - began

            began = time.perf_counter()
            stop = min(self.rows, run.idle + run.refill_size(self._refill_rows))
            state, log, taken = self._pick_chunk(run)(params, state, np.int32(stop))
            taken = int(taken)
            useful += run.record(jax.device_get(log), taken)
            stepped += taken * self.rows
            # Copies: views would be of buffers that the next call takes over.
            run.phase, run.live = np.array(state.phase), np.array(state.live)
            seconds["decode"] += time.perf_counter() - began
            for index in run.collect():
                if on_finished is not None:
                    on_finished(index, run.results[index])
            while (rows := np.flatnonzero(run.phase == decode.JOIN)).size:
                rows = rows[: self._rejoin_rows]
                state = self._rejoin(params, state, *self._rejoin_arguments(rows, run))
                run.close_block(rows)
        self._state = state
        self.stats = {
            "prefill_sec": seconds["prefill"],
            "decode_sec": seconds["decode"],
            "decode_steps": stepped / self.rows,
            "useful_row_steps": useful / max(stepped, 1),
        }
        return run.results

    def _pick_chunk(self, run: "_Run"):
        """The smallest compiled chunk that can feed all live lanes."""
        needed = int(run.live.sum())
        sizes = sorted(self._chunks)
        if not run.live[:, 1:].any():
            return self._chunks[sizes[0]]
        return self._chunks[next(s for s in sizes[1:] if s >= needed)]

    def _rejoin_arguments(self, rows, run: "_Run | None" = None):
        """Closed blocks of some rows, padded to the compiled shape."""
        W, T = self._rejoin_rows, self.settings.max_response_tokens
        tokens = np.zeros((W, T), np.int32)
        first, length = np.zeros(W, np.int32), np.zeros(W, np.int32)
        padded = np.full(W, self.rows, np.int32)
        for i, row in enumerate(rows):
            inside = run.open_block(row)
            tokens[i, : len(inside)] = run.fields["token"][row, inside]
            first[i] = self.settings.max_prompt_tokens + inside.min()
            length[i] = len(inside)
            padded[i] = row
        return padded, tokens, first, length


class _Run:
    """What the host knows of one `sample` call: the queue, the rows, their records."""

    def __init__(self, prompts, samples, rows, settings, vocab):
        self.prompts = [np.asarray(p, np.int32) for p in prompts]
        self.samples, self.settings, self.vocab = samples, settings, vocab
        self.waiting = deque(range(len(prompts) * samples))
        self.results: list[Trajectory | None] = [None] * len(self.waiting)
        self.occupied = np.zeros(rows, bool)
        self.response = np.zeros(rows, np.int32)  # which response a row decodes
        self.phase = np.full(rows, decode.DONE)
        self.live = np.zeros((rows, settings.num_paths), bool)
        # Records in order of emission, [rows, max_response_tokens] each.
        shape = (rows, settings.max_response_tokens)
        self.fields = {
            name: np.zeros(shape, np.float32 if name == "logp" else np.int32)
            for name in _FIELDS
        }
        self.count = np.zeros(rows, np.int32)
        self.steps = np.zeros(rows, np.int32)

    @property
    def idle(self) -> int:
        """Rows without a response."""
        return int((~self.occupied).sum())

    def refill_size(self, rows: int) -> int:
        """Rows that must be free before a refill; all of them when none waits."""
        waiting = len(self.waiting)
        return min(rows, waiting) if waiting else len(self.occupied)

    def wants_refill(self, rows: int) -> bool:
        """Whether enough rows are free to fill them."""
        return bool(self.waiting) and self.idle >= self.refill_size(rows)

    def admit(self, max_prompts: int):
        """Fills free rows from the queue; the arguments of the jitted start."""
        T = self.settings.max_prompt_tokens
        prompts = np.zeros((max_prompts, T), np.int32)
        lengths = np.ones(max_prompts, np.int32)
        source = np.full(len(self.occupied), -1, np.int32)
        chosen: dict[int, int] = {}  # prompt -> its place in the prefill
        for row in np.flatnonzero(~self.occupied):
            if not self.waiting:
                break
            prompt = self.waiting[0] // self.samples
            if prompt not in chosen:
                if len(chosen) == max_prompts:
                    break
                chosen[prompt] = len(chosen)
                tokens = self.prompts[prompt]
                prompts[chosen[prompt], : len(tokens)] = tokens
                lengths[chosen[prompt]] = len(tokens)
            source[row] = chosen[prompt]
            self.response[row] = self.waiting.popleft()
            self.occupied[row] = True
            self.count[row] = self.steps[row] = 0
        return self.response, source, prompts, lengths

    def record(self, log: decode.Emission, taken: int) -> int:
        """Appends a chunk's emissions; returns the row-steps that wrote something."""
        wrote = log.token[:taken] >= 0  # [taken, B, P]
        step, row, lane = np.nonzero(wrote)
        order = np.lexsort((lane, step, row))
        step, row, lane = step[order], row[order], lane[order]
        new = np.bincount(row, minlength=len(self.count))
        start = np.cumsum(new) - new
        place = self.count[row] + np.arange(len(row)) - start[row]
        for name, values in self.fields.items():
            values[row, place] = getattr(log, name)[step, row, lane]
        self.count += new
        active = wrote.any(axis=2)
        self.steps += active.sum(axis=0)
        return int(active.sum())

    def open_block(self, row: int) -> np.ndarray:
        """Places of the newest block's path tokens, in canonical order."""
        block, path = (
            self.fields[f][row, : self.count[row]] for f in ("block", "path")
        )
        places = np.flatnonzero((block == block.max()) & (path > 0))
        return places[np.argsort(path[places], kind="stable")]

    def close_block(self, rows: np.ndarray) -> None:
        """Records the `</Parallel>` that a rejoin wrote."""
        for row in rows:
            place = self.count[row]
            for values in self.fields.values():
                values[row, place] = 0
            self.fields["token"][row, place] = self.vocab.special_ids[
                decode.END_PARALLEL
            ]
            self.fields["forced"][row, place] = 1
            self.live[row, 0] = True
        self.phase[rows] = decode.NEWLINE
        self.count[rows] += 1
        self.steps[rows] += 1

    def collect(self) -> list[int]:
        """Turns finished rows into trajectories and frees them; their numbers."""
        rows = np.flatnonzero(self.occupied & (self.phase == decode.DONE))
        for row in rows:
            self.occupied[row] = False
            self.results[self.response[row]] = self._trajectory(row)
        return self.response[rows].tolist()

    def _trajectory(self, row: int) -> Trajectory:
        n = self.count[row]
        record = {name: values[row, :n] for name, values in self.fields.items()}
        eos = self.vocab.special_ids[decode.EOS]
        finished = bool(n) and record["token"][-1] == eos and record["path"][-1] == 0
        prompt = self.prompts[self.response[row] // self.samples]
        # Canonical order: a block's tokens stand where its first one does, path by path.
        index = np.arange(n)
        block, path = record["block"], record["path"]
        first = np.full(block.max(initial=0) + 1, n)
        np.minimum.at(first, block, index)
        anchor = np.where(path > 0, first[block], index)
        order = np.lexsort((index, path, anchor))
        record = {name: values[order] for name, values in record.items()}
        positions = record["position"]
        if self.settings.variant == "causal":
            positions = np.arange(len(prompt), len(prompt) + n, dtype=np.int32)
        return Trajectory(
            prompt=prompt,
            tokens=record["token"],
            positions=positions,
            block=record["block"],
            path=record["path"],
            forced=record["forced"].astype(bool),
            bans=record["bans"],
            logps=record["logp"],
            finished=bool(finished),
            sequential_steps=int(self.steps[row]),
        )
