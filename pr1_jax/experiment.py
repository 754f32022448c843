"""What the stages share, made from a config and checked before anything compiles."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from pr1_jax import (
    checkpoint,
    data,
    decode,
    embedded,
    hf,
    layout,
    losses,
    model,
    rewards,
    sharding,
    tokenizer,
    train_state,
)
from pr1_jax.sampler import Sampler

STAGES = ("sft", "rl")
TEMPLATES = data.TEMPLATES


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and the objects that follow from it."""

    config: ml_collections.ConfigDict
    tokenizer: tokenizer.Tokenizer
    model: model.ModelConfig
    vocab: decode.Vocab
    mesh: Mesh
    settings: decode.Settings

    @functools.cached_property
    def samplers(self) -> dict[bool, Sampler]:
        """Samplers made so far: with blocks, and with `<Parallel>` banned."""
        return {}

    def sampler(self, *, banned: bool = False) -> Sampler:
        """The one sampler of all stages, or its twin that bans `<Parallel>`."""
        c = self.config.rollout
        if banned not in self.samplers:
            settings = self.settings
            if banned:
                settings = dataclasses.replace(settings, max_blocks=0)
            self.samplers[banned] = Sampler(
                self.model,
                self.vocab,
                settings,
                rows=c.rows,
                prompts_per_prefill=min(c.prompts_per_prefill, c.rows),
                lane_buckets=c.lane_buckets,
                steps_per_chunk=c.steps_per_chunk,
                refill_share=c.refill_share,
            )
        return self.samplers[banned]

    def policy(self, *, sampling: bool) -> train_state.PolicySettings:
        """The policy of rollouts, or (`sampling` off) the plain one of SFT."""
        s = self.settings
        drawing = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        return train_state.PolicySettings(
            special_ids=self.vocab.special_ids,
            num_tokens=self.vocab.num_tokens,
            logits_chunk=self.config.model.logits_chunk,
            query_chunk=self.config.model.query_chunk,
            **(drawing if sampling else {}),
        )

    def key(self, purpose: str, step: int = 0) -> jax.Array:
        """A PRNG key that depends on the seed, a purpose and a step alone."""
        purposes = ("params", "tags", "rl", "eval")
        key = jax.random.key(self.config.seed)
        key = jax.random.fold_in(key, purposes.index(purpose))
        return jax.random.fold_in(key, step)

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the parameters."""
        places = sharding.param_shardings(self.model, self.mesh)
        boxed = jax.eval_shape(lambda: model.init_params(self.model, jax.random.key(0)))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            model.unbox(boxed),
            places,
        )

    def initial_params(self) -> Any:
        """Parameters to start from: a checkpoint, a Hugging Face folder, or random."""
        c = self.config
        if c.checkpoint.init:
            return checkpoint.restore_params(c.checkpoint.init, self.abstract_params())
        places = sharding.param_shardings(self.model, self.mesh)
        if c.model.path:
            folder = hf.resolve(c.model.path)
            config = hf.read_config(folder, **_numerics(c.model))
            params = hf.load_params(folder, config)
            params, _ = hf.resize_embeddings(
                params, config, self.tokenizer, self.key("tags")
            )
            return jax.device_put(params, places)
        init = lambda key: model.unbox(model.init_params(self.model, key))
        return jax.jit(init, out_shardings=places)(self.key("params"))

    def optimizer(self, stage: str):
        """The optimizer of a stage, and its learning rate by update."""
        c = self.config[stage]
        settings = train_state.OptimizerSettings(
            lr=c.lr,
            steps=c.steps * (c.mini_batches if stage == "rl" else 1),
            schedule=c.lr_schedule,
            warmup_share=c.warmup_share,
            **self.config.optimizer,
        )
        tag_ids = self.vocab.special_ids[:-1]
        return train_state.make_optimizer(settings, tag_ids), settings.learning_rate()

    def train_lengths(self) -> tuple[int, ...]:
        """Lengths, prompt included, that training batches are padded to."""
        return tuple(sorted(self.config.model.length_buckets)) or (self.settings.slots,)


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Checks a config and makes what the stages share.

    Raises:
      ValueError, FileNotFoundError: names the field and its value.
    """
    check(config)
    if config.model.path:
        folder = hf.resolve(config.model.path)
        own_tokenizer = tokenizer.load(folder)
        shape = hf.read_config(folder, **_numerics(config.model))
        vocab_size = max(shape.vocab_size, own_tokenizer.vocab_size)
    else:
        own_tokenizer = embedded.make_tokenizer()
        vocab_size = own_tokenizer.vocab_size
        names = [f.name for f in dataclasses.fields(model.ModelConfig)]
        fields = {n: config.model[n] for n in names if n in config.model}
        shape = model.ModelConfig(vocab_size=vocab_size, **fields)
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    return Experiment(
        config=config,
        tokenizer=own_tokenizer,
        model=shape,
        vocab=decode.Vocab.of(own_tokenizer),
        mesh=sharding.make_mesh(**config.mesh),
        settings=settings_of(config),
    )


def settings_of(config: ml_collections.ConfigDict) -> decode.Settings:
    """The decode settings in `config.rollout`."""
    names = {f.name for f in dataclasses.fields(decode.Settings)}
    fields = {n: v for n, v in config.rollout.items() if n in names}
    return decode.Settings(variant=config.variant, **fields)


def _numerics(c: Mapping[str, Any]) -> dict[str, Any]:
    return {n: c[n] for n in ("dtype", "param_dtype", "scan_layers", "remat")}


# --- Checks -------------------------------------------------------------------------


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError, with field and value, for what cannot work."""
    one_of(config, "variant", layout.VARIANTS)
    for stage in config.stages:
        if stage not in STAGES:
            raise ValueError(f"stages={config.stages}: {stage!r} is not in {STAGES}")
    settings = settings_of(config)
    one_of(config, "reward.schedule", rewards.SCHEDULES)
    one_of(config, "rl.aggregation", losses.AGGREGATIONS)
    one_of(config, "data.template", TEMPLATES)
    for stage in STAGES:
        one_of(config, f"{stage}.lr_schedule", train_state.SCHEDULES)
    for name in (
        *("sft.steps", "sft.batch_size", "sft.micro_batch_size"),
        *("rl.steps", "rl.prompts_per_step", "rl.group_size", "rl.mini_batches"),
        *("rl.micro_batch_size", "rollout.rows", "rollout.steps_per_chunk"),
        *("rollout.prompts_per_prefill", "eval.problems", "eval.samples"),
        *("checkpoint.every_steps", "checkpoint.keep"),
    ):
        if field(config, name) < 1:
            raise ValueError(f"{name}={field(config, name)} must be at least 1")
    responses = config.rl.prompts_per_step * config.rl.group_size
    divides(config, "rl.prompts_per_step", "rl.mini_batches")
    mini_batch = responses // config.rl.mini_batches
    if mini_batch % config.rl.micro_batch_size:
        raise ValueError(
            f"rl.micro_batch_size={config.rl.micro_batch_size} does not divide the "
            f"mini-batch of {mini_batch} responses (rl.prompts_per_step · "
            "rl.group_size / rl.mini_batches)"
        )
    divides(config, "sft.batch_size", "sft.micro_batch_size")
    if "rl" in config.stages and config.rl.group_size < 2:
        raise ValueError(f"rl.group_size={config.rl.group_size} must be at least 2")
    if "rl" in config.stages and not settings.temperature:
        raise ValueError("rollout.temperature=0.0: GRPO needs samples that differ")
    buckets = tuple(config.model.length_buckets)
    if buckets and max(buckets) < settings.slots:
        raise ValueError(
            f"model.length_buckets={buckets} do not hold rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens = {settings.slots}"
        )
    for name in ("checkpoint.init", "model.path"):
        path = field(config, name)
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if path and looks_local and not pathlib.Path(os.path.expanduser(path)).exists():
            raise FileNotFoundError(f"{name}={path} does not exist")
    mesh = sharding.make_mesh(**config.mesh)
    for name in ("sft.micro_batch_size", "rl.micro_batch_size"):
        if field(config, name) % sharding.batch_shards(mesh):
            raise ValueError(
                f"{name}={field(config, name)} cannot be split over "
                f"{sharding.batch_shards(mesh)} devices (mesh={dict(config.mesh)})"
            )


def field(config: ml_collections.ConfigDict, name: str) -> Any:
    """The value of a dotted field name."""
    return functools.reduce(lambda c, part: c[part], name.split("."), config)


def one_of(config: ml_collections.ConfigDict, name: str, known) -> None:
    """Raises ValueError unless the field's value is known."""
    if field(config, name) not in known:
        raise ValueError(f"{name}={field(config, name)!r} is not one of {known}")


def divides(config: ml_collections.ConfigDict, whole: str, part: str) -> None:
    """Raises ValueError unless `part` divides `whole`."""
    if field(config, whole) % field(config, part):
        raise ValueError(
            f"{part}={field(config, part)} does not divide "
            f"{whole}={field(config, whole)}"
        )
