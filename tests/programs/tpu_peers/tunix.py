"""Lowers google-tunix's decode step and GRPO update on Qwen3-4B; see `worker.py`.

What its release runs on a TPU, at its best: bfloat16 weights and activations, splash
attention in updates, every layer computed again in the backward pass, and its default
sharding, fsdp × tp. Its code asks in two places whether the process sits at a CPU; here
it is told that it does not. It has no log-probs over chunks.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, common
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

from pr1_jax.model import costs
from pr1_jax.plan import hardware, shapes, timing
from tests.programs.tpu_peers import worker
from tests.programs.tpu_peers.worker import Program

PAD, END = 0, 1
FLASH_TILE = 1024  # its default


@contextlib.contextmanager
def on_tpus(mesh: Mesh) -> Iterator[None]:
    """Under a mesh, with sharding constraints as on TPUs."""

    def shard(x, spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    was, qwen3.shard = qwen3.shard, shard
    try:
        with mesh:
            yield
    finally:
        qwen3.shard = was


def make_mesh(devices, **sizes: int) -> Mesh:
    """Of axes such as fsdp and tp, in the order of the topology."""
    shape = tuple(sizes.values())
    return Mesh(
        np.array(devices).reshape(shape),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(shape),
    )


def make_model(layers: int, mesh: Mesh, remat: str, **sharding: bool) -> nnx.Module:
    """Qwen3-4B of so many layers, of shapes with shardings; remat of "DECODER" layers."""
    config = dataclasses.replace(
        qwen3.ModelConfig.qwen3_4b(),
        num_layers=layers,
        shd_config=qwen3.ShardingConfig.get_default_sharding(**sharding),
        remat_config=qwen3.RematConfig[remat],
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        use_flash_attention=True,
        flash_attention_block_size=FLASH_TILE,
    )
    model = nnx.eval_shape(lambda: qwen3.Qwen3(config, rngs=nnx.Rngs(params=0)))
    nnx.update(model, placed(nnx.state(model), mesh))
    return model


def placed(state: Any, mesh: Mesh) -> Any:
    """A state of shapes with the shardings that its variables ask for."""
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(struct, state, nnx.get_named_sharding(state, mesh))


class Ids:
    """A tokenizer that only knows its padding and its end."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def bos_id(self) -> None: ...
    def eos_id(self) -> int:
        return END

    def pad_id(self) -> int:
        return PAD


def decode(topology: hardware.Topology, layers: int) -> Program:
    """Steps of the vanilla sampler, on the devices that share one copy of the weights."""
    devices = hardware.open_devices(worker.part(topology))
    mesh = make_mesh(devices, fsdp=1, tp=worker.TENSOR)
    steps = worker.PROMPT + worker.RESPONSE
    with on_tpus(mesh):
        model = make_model(layers, mesh, "NONE", is_sampling=True)
        c = model.config
        cache = sampler.CacheConfig(steps, layers, c.num_kv_heads, c.head_dim)
        drawer = sampler.Sampler(model, Ids(), cache)
        drawer.eos_ids = np.array([END])
        prompts = jax.ShapeDtypeStruct((worker.ROWS, worker.PROMPT), jnp.int32)
        state = jax.eval_shape(
            lambda ids: drawer.init_sample_state(
                ids,
                total_sampling_steps=steps,
                include_logits=False,
                forbidden_token_ids=None,
                temperature=1.0,
                top_p=1.0,  # with no top_k it draws without sorting
                top_k=None,
                seed=jax.random.PRNGKey(0),
                beam_size=None,
            ),
            prompts,
        )
        # Heads of the cache over tp, as the keys and values that are written into it.
        spec = lambda x: P("fsdp", None, "tp") if x.ndim == 4 else P()
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))
            ),
            state,
        )

        def run(weights, state):  # so many steps at most, which the compiler then knows
            state = dataclasses.replace(state, total_sampling_steps=steps)
            return drawer._decode_fn(weights, state)

        weights = drawer._flattened_transformer_state
        lowered = jax.jit(run, donate_argnums=1).lower(weights, state)

    ours = model_of(layers)
    half = worker.RESPONSE // 2
    cost = costs.decode_step(
        ours, rows=worker.ROWS, prompt=worker.PROMPT, response=half
    )
    read = lambda slots: (
        (costs.weight_bytes(ours) + cache_bytes(c, slots)) / worker.TENSOR
    )
    return Program(
        timing.Work(
            "decode step",
            lambda: lowered,
            runs=steps,
            flops=cost.flops / worker.TENSOR,
            needed_bytes=read(worker.ROWS * (worker.PROMPT + half)),
        ),
        tokens=worker.ROWS * topology.num_devices // worker.TENSOR,
        mesh=mesh.shape,
        setting=f"{worker.ROWS} rows a shard, a cache of {steps:,} slots, all attended",
        own_bytes=read(worker.ROWS * steps),
    )


def cache_bytes(config: qwen3.ModelConfig, slots: int) -> int:
    """Keys and values of all layers."""
    return 2 * 2 * slots * config.num_layers * config.num_kv_heads * config.head_dim


def model_of(layers: int):
    """Our description of the same model, which FLOPs and bytes are counted of."""
    config, _ = shapes.published("Qwen/Qwen3-4B", dtype="bfloat16")
    return dataclasses.replace(config, num_layers=layers)


def update(
    topology: hardware.Topology,
    layers: int,
    *,
    tp: int = worker.TENSOR,
    every: int = 256,
) -> Program:
    """`GRPOLearner`'s train step on a micro-batch of unpacked sequences.

    Args:
      tp: devices that share the heads. Each group of these takes a sequence at least.
      every: micro-batches that gradients are accumulated over.
    """
    fsdp = topology.num_devices // tp
    mesh = make_mesh(hardware.open_devices(topology), fsdp=fsdp, tp=tp)
    rows = max(worker.sequences(topology), fsdp)
    place = NamedSharding(mesh, P("fsdp"))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(
        (rows, *shape), dtype, sharding=place
    )
    prompt, response = worker.TOKENS - worker.TRAINED, worker.TRAINED
    batch = common.TrainExample(
        prompt_ids=array(jnp.int32, prompt),
        prompt_mask=array(jnp.int32, prompt),
        completion_ids=array(jnp.int32, response),
        completion_mask=array(jnp.int32, response),
        advantages=array(jnp.float32),
        ref_per_token_logps=None,  # no KL
        old_per_token_logps=None,  # one iteration
    )
    lowered = train_step(layers, mesh, batch, every)
    tiles = worker.TOKENS // FLASH_TILE
    return Program(
        _work(lowered, layers, rows, topology),
        tokens=rows * worker.TOKENS,
        mesh=mesh.shape,
        setting=f"{rows} × {worker.TOKENS:,}, {_accumulated(every)}",
        busy_steps=(tiles + 1) / 2 / tiles,  # the causal ones
    )


def update_packed(topology: hardware.Topology, layers: int) -> Program:
    """The train step on one packed row, whose tokens are split over devices as well."""
    parts = topology.num_devices // worker.TENSOR
    rows = worker.sequences(topology)
    length = rows * worker.TOKENS
    devices = hardware.open_devices(topology)
    mesh = make_mesh(devices, fsdp=1, sp=parts, tp=worker.TENSOR)
    place = NamedSharding(mesh, P("fsdp", "sp"))
    array = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype, sharding=place)
    nothing = jax.ShapeDtypeStruct((1, 0), jnp.int32, sharding=NamedSharding(mesh, P()))
    batch = common.TrainExample(
        prompt_ids=nothing,
        prompt_mask=nothing,
        completion_ids=array(jnp.int32),
        completion_mask=array(jnp.int32),
        advantages=array(jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
        segment_ids=array(jnp.int32),
        segment_positions=array(jnp.int32),
    )
    lowered = train_step(layers, mesh, batch, 256)
    tiles = length // FLASH_TILE
    own = (
        tiles // parts
    )  # of the last part, which sees most, and which the others await
    return Program(
        _work(lowered, layers, rows, topology),
        tokens=length,
        mesh=mesh.shape,
        setting=f"packed into 1 × {length:,}, {_accumulated(256)}",
        busy_steps=1 - (own - 1) / 2 / tiles,
    )


def _accumulated(every: int) -> str:
    return f"gradients of {every} summed" if every > 1 else "an optimizer step at each"


def _work(
    lowered: jax.stages.Lowered, layers: int, rows: int, topology: hardware.Topology
) -> timing.Work:
    flops = costs.update_flops(
        model_of(layers), rows=rows, tokens=worker.TOKENS, trained=worker.TRAINED
    )
    return timing.Work(
        "update", lambda: lowered, runs=1, flops=flops / topology.num_devices
    )


def train_step(
    layers: int, mesh: Mesh, batch: common.TrainExample, every: int
) -> jax.stages.Lowered:
    """`Trainer._train_step` with GRPO's loss, an optimizer, and what jit is told."""
    config = grpo_learner.GRPOConfig(num_generations=8, beta=0.0)
    config.temperature = 1.0  # as the learner sets it
    trainer = types.SimpleNamespace(
        gen_model_input_fn=lambda x: {"train_example": x, "algo_config": config},
        loss_fn=lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
            model, train_example, algo_config=config, pad_id=PAD, eos_id=END
        ),
        _lora_enabled=False,
        _has_aux=True,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    if every > 1:
        optimizer = optax.MultiSteps(optimizer, every)
    with on_tpus(mesh):
        model = make_model(layers, mesh, "DECODER", enable_sp="sp" in mesh.shape)
        trained = nnx.eval_shape(
            lambda m: nnx.Optimizer(m, optimizer, wrt=nnx.Param), model
        )
        nnx.update(trained, placed(nnx.state(trained), mesh))
        structure, weights, moments = nnx.split((model, trained), nnx.Param, ...)

        def run(weights, moments, batch):
            model, trained = nnx.merge(structure, weights, moments)
            out = peft_trainer.PeftTrainer._train_step(trainer, model, trained, batch)
            return out, nnx.split((model, trained), nnx.Param, ...)[1:]

        return jax.jit(run, donate_argnums=1).lower(weights, moments, batch)


if __name__ == "__main__":
    packages = ("google-tunix", "jax", "libtpu", "flax", "optax", "qwix")
    works = {
        "decode": decode,
        "update": update,
        "update_once": functools.partial(update, every=1),
        "update_tp2": functools.partial(update, tp=2),
        "update_tp1": functools.partial(update, tp=1),
        "update_packed": update_packed,
    }
    worker.main("tunix", packages, works)
