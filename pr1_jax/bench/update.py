"""Suite of the GRPO update: speed, share of the matmul peak, memory."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr1_jax.bench import timing
from pr1_jax.bench.shapes import Bench
from pr1_jax.model import costs
from pr1_jax.model.backend import choose
from pr1_jax.model.params import init_params, unbox
from pr1_jax.system.tables import Table
from pr1_jax.training.logps import PolicySettings
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import TrainState
from pr1_jax.training.update import GrpoSettings, grpo_update
from pr1_jax.trajectory import Batch

_PROMPT_SHARE = 1 / 3  # of a sequence's tokens
_PROMPT_SHARES = (0.25, 0.5, 0.75)  # of those with a group's prompt


def make_batch(
    vocab_size: int,
    rows: int,
    tokens: int,
    micro_batch: int,
    *,
    prompt: int,
    group_rows: int = 1,
) -> Batch:
    """Random sequences in micro-batches, as if sampled without blocks.

    Args:
      prompt: tokens of a sequence that are not trained, the same in `group_rows` rows.
    """
    rng = np.random.default_rng(0)
    ints = lambda x: np.broadcast_to(x, (rows, tokens)).astype(np.int32)
    trained = ints(np.arange(tokens)) >= prompt
    ids = rng.integers(0, vocab_size, (rows // group_rows, group_rows, tokens))
    ids[:, :, :prompt] = ids[:, :1, :prompt]
    batch = Batch(
        tokens=ints(ids.reshape(rows, tokens)),
        positions=ints(np.arange(tokens)),
        block=ints(0),
        path=ints(0),
        bans=ints(0),
        loss_mask=trained,
        old_logps=np.where(trained, -np.log(vocab_size), 0).astype(np.float32),
        advantages=rng.normal(size=rows).astype(np.float32),
        shared=np.full(rows, prompt if group_rows > 1 else 0, np.int32),
    )
    return jax.tree.map(lambda x: x.reshape(-1, micro_batch, *x.shape[1:]), batch)


class Update:
    """A compiled update of random parameters on a random batch; a call makes it."""

    def __init__(
        self,
        bench: Bench,
        states: list[TrainState],
        *,
        rows: int,
        tokens: int,
        micro_batch: int,
        prompt_share: float = _PROMPT_SHARE,
        group_rows: int = 1,
        shares: bool = False,
    ):
        """Compiles it.

        Args:
          states: empty, or the one state that updates of any size follow each other on.
          prompt_share: of a row's tokens.
          group_rows: rows with the same prompt.
          shares: compute it once for them.
        """
        shape, prompt = bench.shape, round(tokens * prompt_share)
        model = dataclasses.replace(shape.model, param_dtype="float32")
        self.rows, self.tokens, self._states = rows, tokens, states
        self.trained = tokens - prompt  # of a row
        self.computes = group_rows if shares else 1  # rows with one prompt
        optimizer = make_optimizer(OptimizerSettings(lr=1e-6, steps=1000))
        policy = PolicySettings(
            special_ids=bench.vocab.special_ids,
            logits_chunk=shape.logits_chunk,
            max_trained=self.trained,
            group_rows=self.computes,
            shared_lengths=(prompt,),
        )
        update = functools.partial(
            grpo_update,
            backend=choose(model, bench.kernels, training=True),
            optimizer=optimizer,
            policy=policy,
            grpo=GrpoSettings(),
        )

        def init() -> TrainState:
            params = unbox(init_params(model, jax.random.key(0)))
            return TrainState(jnp.int32(0), params, optimizer.init(params))

        self._init = jax.jit(init)
        sizes = {"prompt": prompt, "group_rows": group_rows}
        vocab_size = model.vocab_size
        self._batch = make_batch(vocab_size, rows, tokens, micro_batch, **sizes)
        jitted = jax.jit(update, donate_argnums=0)
        self._program = jitted.lower(jax.eval_shape(init), self._batch).compile()

    def __call__(self) -> Mapping[str, float]:
        """One update."""
        state = self._states.pop() if self._states else self._init()
        state, metrics = jax.block_until_ready(self._program(state, self._batch))
        self._states.append(state)
        on_device = jax.devices()[0].memory_stats() or {}  # none of a CPU
        peak_bytes = on_device.get("peak_bytes_in_use", 0)
        return {"skipped": float(metrics["skipped"]), "peak_bytes": peak_bytes}

    @property
    def temporary_bytes(self) -> int | None:
        """What the program holds beside its inputs and outputs, as XLA plans it."""
        analysis = self._program.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)


def figures(bench: Bench, update: Update, run: timing.Runs) -> dict[str, Any]:
    """Columns of a table that all updates have."""
    assert not any(f["skipped"] for f in run.figures), "an update was not finite"
    flops = costs.update_flops(
        bench.config,
        rows=update.rows,
        tokens=update.tokens,
        trained=update.trained,
        group_rows=update.computes,
    )
    per_sec = run.sec.rate(flops)
    return {
        "seconds": run.sec,
        "tokens per second": run.sec.rate(update.rows * update.tokens),
        "MFU": per_sec.times(1 / bench.limits.flops_per_sec),
        "limit seconds": flops / bench.limits.flops_per_sec,
    }


def update(bench: Bench) -> list[Table]:
    """One batch in micro-batches of several sizes."""
    rows, tokens = bench.sizes.update_rows, bench.sizes.update_tokens
    states, sizes = [], {"rows": rows, "tokens": tokens}
    works = {
        str(size): Update(bench, states, micro_batch=size, **sizes)
        for size in bench.sizes.micro_batches  # ascending: the device's peak only grows
    }
    runs = timing.alternate(works, bench.repeats)
    on_cpu = jax.default_backend() == "cpu"
    table = []
    for size, made in works.items():
        run = runs[size]
        row = {"micro-batch": int(size)} | figures(bench, made, run)
        if made.temporary_bytes is not None:
            row["temporary MB"] = made.temporary_bytes / 1e6
        if not on_cpu:
            row["peak MB so far"] = run.figures[0]["peak_bytes"] / 1e6
        table.append(row)
    note = (
        "MFU: 6 FLOPs a weight and token and causal attention's, per second, of the "
        "matmul peak. temporary: as XLA plans it. peak: the most that the process has "
        "held on the device so far."
    )
    title = f"GRPO update of {rows} × {tokens} tokens"
    return [Table(title, table, note), _shared_prompts(bench, states)]


def _shared_prompts(bench: Bench, states: list[TrainState]) -> Table:
    """Groups with one prompt, which is computed once or with every response."""
    rows, tokens = bench.sizes.update_rows, bench.sizes.update_tokens
    group = bench.sizes.group_size
    sizes = {"rows": rows, "tokens": tokens, "micro_batch": group, "group_rows": group}
    table = []
    for share in _PROMPT_SHARES:
        works = {
            name: Update(
                bench, states, prompt_share=share, shares=name == "once", **sizes
            )
            for name in ("once", "each")
        }
        runs = timing.alternate(works, bench.repeats)
        for name, made in works.items():
            row = {"prompt tokens": tokens - made.trained, "computed": name}
            ratio = runs[name].sec.over(runs["each"].sec)
            row |= figures(bench, made, runs[name]) | {"ratio": ratio}
            table.append(row)
    title = f"{rows} × {tokens} tokens in groups of {group} with one prompt"
    note = (
        "computed: the prompt once for its group, or with each response. ratio: of "
        "seconds, to the latter. MFU counts what is computed."
    )
    return Table(title, table, note)
