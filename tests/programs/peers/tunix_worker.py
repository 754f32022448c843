"""Times google-tunix (JAX) on all CPU devices: sampling, an update, a GRPO step.

In an environment of requirements-tunix.txt; called as `worker.py` says. The model is
its Qwen3 in float32, the sampler its vanilla one, the update and the step are those of
its `GRPOLearner`: all on one mesh, so that the rollout reads the actor's own weights.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import hooks

from tests.programs.peers import worker
from tests.programs.peers.worker import GROUP_SIZE, Run


class Ids:
    """A tokenizer whose text is the ids themselves: "17 4 2051".

    Its end and padding are an id past the vocabulary. It is never drawn, so no
    response ends early, and no step pays for forbidding it.
    """

    def __init__(self, never: int):
        self._never = never

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """None begins."""

    def eos_id(self) -> int:
        return self._never

    def pad_id(self) -> int:
        return self._never


class StepClock(hooks.TrainingHooks):
    """Notes when the trainer has finished an update, its last work in a step."""

    def __init__(self):
        self.ends: list[float] = []

    def on_train_end(self, train_ctx) -> None:
        """Called after each micro-batch; only the last of them updates."""
        if train_ctx.train_steps > len(self.ends):
            jax.block_until_ready(nnx.state(train_ctx.model))
            self.ends.append(time.perf_counter())

    def on_train_start(self, train_ctx) -> None: ...
    def on_train_step_start(self, train_ctx) -> None: ...
    def on_train_step_end(self, train_ctx, train_step, train_loss) -> None: ...
    def on_eval_step_start(self, train_ctx) -> None: ...
    def on_eval_step_end(self, train_ctx, eval_loss) -> None: ...


def load(args: argparse.Namespace) -> tuple[qwen3.Qwen3, Mesh]:
    """Qwen3 with its defaults: float32, nothing recomputed in the backward pass."""
    # As Tunix's examples do: with "fsdp" of 1 its sharding rules apply to one device.
    auto = AxisType.Auto
    mesh = jax.make_mesh(
        (jax.device_count(), 1), ("fsdp", "tp"), axis_types=(auto, auto)
    )
    hf = json.loads((args.weights / "config.json").read_text())
    config = qwen3.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        # Transformers 5 writes the base inside `rope_parameters`.
        rope_theta=hf.get("rope_theta") or hf["rope_parameters"]["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        use_tied_embedding=hf["tie_word_embeddings"],
    )
    model = params.create_model_from_safe_tensors(
        str(args.weights), config, mesh, dtype=jnp.float32
    )
    return jax.block_until_ready(model), mesh


def prompt_texts(count: int, args: argparse.Namespace) -> list[str]:
    return [" ".join(map(str, row)) for row in worker.prompts(count, args)]


def sampling(model: qwen3.Qwen3, mesh: Mesh, args: argparse.Namespace) -> Run:
    """Temperature 1 without limits; no log-probs, as `GRPOLearner` asks for none."""
    del mesh  # the weights lie on it
    config, length = model.config, args.prompt_tokens + args.new_tokens
    cache = sampler.CacheConfig(
        length, config.num_layers, config.num_kv_heads, config.head_dim
    )
    sample = sampler.Sampler(model, Ids(config.vocab_size), cache)
    texts = prompt_texts(args.prompts, args)

    def draw(unit: int) -> list[jax.Array]:
        output = sample(
            texts,
            max_generation_steps=args.new_tokens,
            max_prompt_length=args.prompt_tokens,
            temperature=1.0,
            top_p=1.0,  # with no top_k this draws without sorting
            seed=unit,
        )
        return output.tokens

    return worker.sample(draw, config.vocab_size, args)


def share_of_odd(completions: list[str], **_) -> list[float]:
    return [worker.share_of_odd([*map(int, text.split())]) for text in completions]


def learner(
    model: qwen3.Qwen3, mesh: Mesh, args: argparse.Namespace
) -> grpo_learner.GRPOLearner:
    """Tunix's learner with actor and rollout on one mesh, hence one copy of weights."""
    groups, micro_groups = (
        sequences // GROUP_SIZE for sequences in (args.prompts, args.micro_batch)
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(  # the same as TRL's default
            optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)
        ),
        max_steps=args.units,
        eval_every_n_steps=1_000_000,
        mini_batch_size=groups,
        # None, not the whole: even one accumulated batch is wrapped in `MultiSteps`.
        train_micro_batch_size=None if micro_groups == groups else micro_groups,
        rollout_micro_batch_size=groups,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=args.new_tokens,
        max_prompt_length=args.prompt_tokens,
        kv_cache_size=args.prompt_tokens + args.new_tokens,
        temperature=1.0,
        top_p=1.0,
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Ids(model.config.vocab_size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )
    # With its one iteration it needs no log-probs of the old policy; it clips at 0.2.
    config = grpo_learner.GRPOConfig(num_generations=GROUP_SIZE, beta=0.0)
    return grpo_learner.GRPOLearner(cluster, config, reward_fns=share_of_odd)


def logged(grpo: grpo_learner.GRPOLearner, *names: str) -> dict[str, list[float]]:
    """What Tunix logged under names such as "actor/loss", a value a step."""
    logger = grpo.rl_cluster.actor_trainer.metrics_logger
    history = {
        name: logger.get_metric_history(*name.split("/", 1), "train") for name in names
    }
    return {name: [float(x) for x in values] for name, values in history.items()}


def update(model: qwen3.Qwen3, mesh: Mesh, args: argparse.Namespace) -> Run:
    """`RLCluster.update_actor`, as the learner calls it, on a given batch."""
    grpo = learner(model, mesh, args)
    cluster = grpo.rl_cluster
    ids, advantages = map(jnp.asarray, worker.batch(args))
    prompt, completion = jnp.split(ids, [args.prompt_tokens], axis=1)
    start = time.perf_counter()
    old_logps = cluster.get_old_per_token_logps(prompt, completion)
    old_logps.block_until_ready()
    setup_sec = time.perf_counter() - start
    batch = grpo_learner.TrainExample(
        prompt_ids=prompt,
        prompt_mask=jnp.ones(prompt.shape, bool),
        completion_ids=completion,
        completion_mask=jnp.ones(completion.shape, bool),
        advantages=advantages.astype(jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=old_logps,
    )
    micro_batches = [
        rl_utils.get_batch_slice(batch, rows)
        for rows in rl_utils.chunk_slices_by_size(args.prompts, args.micro_batch)
    ]
    clock = StepClock()
    cluster.actor_trainer.with_training_hooks(clock)
    for _ in range(args.units):
        for micro_batch in micro_batches:
            cluster.update_actor([micro_batch], None)
    cluster.close()
    checks = {
        "old_logps_mean": float(old_logps.mean()),
        "updates": cluster.actor_trainer.train_steps,
        "micro_batch": args.micro_batch,
        **logged(grpo, "actor/loss", "actor/grad_norm"),
    }
    return Run(clock.ends, checks, setup_sec)


def step(model: qwen3.Qwen3, mesh: Mesh, args: argparse.Namespace) -> Run:
    """`GRPOLearner.train`: rollout, rewards, advantages and one update a step."""
    grpo = learner(model, mesh, args)
    clock = StepClock()
    grpo.rl_cluster.actor_trainer.with_training_hooks(clock)
    texts = prompt_texts(args.units * args.prompts // GROUP_SIZE, args)
    grpo.train({"prompts": batch} for batch in np.split(np.array(texts), args.units))
    actor = leaves(grpo.rl_cluster.actor_trainer.model)
    rollout = leaves(grpo.rl_cluster.rollout.model())
    checks = {
        "updates": grpo.rl_cluster.actor_trainer.train_steps,
        "rollout_has_new_weights": worker.largest_change(actor, rollout) == 0,
        "micro_batch": args.micro_batch,
        **logged(grpo, "actor/loss", "actor/grad_norm", "completions/min_length"),
        **logged(grpo, "rewards/score/min", "rewards/score/max"),
    }
    return Run(clock.ends, checks)


def leaves(model: nnx.Module) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model))


def finish(
    run: Run, model: qwen3.Qwen3, mesh: Mesh, args: argparse.Namespace
) -> dict[str, Any]:
    change = worker.largest_change(leaves(load(args)[0]), leaves(model))
    return {"max_parameter_change": change}


if __name__ == "__main__":
    packages = ("google-tunix", "jax", "jaxlib", "flax", "optax", "numpy")
    flags, works = worker.parser(__doc__), (sampling, update, step)
    worker.main("tunix", packages, flags, load, works, finish)
