"""What the stages share, made from a config and checked before anything compiles."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from pr1_jax import trajectory
from pr1_jax.data import sources, tasks, tokenizer, tokenizer_files
from pr1_jax.huggingface import tags, usage, weights
from pr1_jax.huggingface.config import read_config, resolve
from pr1_jax.model import adapters
from pr1_jax.model.backend import Backend, choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import (
    abstract_params,
    boxed_shardings,
    init_params,
    param_shardings,
    unbox,
)
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.stages import checks, own, policies
from pr1_jax.system import files, mesh
from pr1_jax.training import micro_batches
from pr1_jax.training.logps import PolicySettings
from pr1_jax.training.optimizer import OptimizerSettings, make_optimizer
from pr1_jax.training.state import abstract_state, shardings_of
from pr1_jax.trajectory import Batch, Trajectory
from pr1_jax.workdir import checkpoint, identity

ORDINARY = checks.MODES[-1]  # decoding with `<Parallel>` banned
# How a model is computed, and not what.
_NUMERICS = (
    "dtype",
    "scan_layers",
    "remat",
    "remat_policy",
    "attention",
    "query_chunk",
)
_ROPE_BASE = 1e4  # of a model without a folder
# Options of the update's compiler on TPU. It would cut products with gathered weights into
# steps of a ring, each too small to be fast. Gathered whole, they come beside other work.
TPU_OPTIONS = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A checked config and the objects that follow from it."""

    config: ml_collections.ConfigDict
    tokenizer: tokenizer.Tokenizer
    model: ModelConfig
    vocab: Vocab
    mesh: Mesh
    settings: Settings

    @functools.cached_property
    def sampling_backend(self) -> Backend:
        """What samplers compute the model with."""
        return choose(self.model, self.config.kernels, self.mesh)

    @functools.cached_property
    def training_backend(self) -> Backend:
        """What updates compute the model with."""
        return choose(self.model, self.config.kernels, self.mesh, training=True)

    @functools.cached_property
    def samplers(self) -> dict[tuple[str, int], Sampler]:
        """Samplers made so far, by mode and group size."""
        return {}

    def sampler(self, group_size: int, mode: str = "") -> Sampler:
        """The sampler of groups of so many responses, in a mode of `checks.MODES`.

        The default mode is that of RL: the variant's own, but for `rollout.shortcut`.
        """
        c, processes = self.config.rollout, jax.process_count()
        mode = mode or ("causal" if c.shortcut else self.settings.variant)
        group_size = min(group_size, c.rows)
        name = mode, group_size
        if name not in self.samplers:
            settings = self.settings
            if mode == ORDINARY:
                settings = dataclasses.replace(settings, max_blocks=0)
            else:
                settings = dataclasses.replace(settings, variant=mode)
            self.samplers[name] = Sampler(
                self.sampling_backend,
                self.vocab,
                settings,
                Batching(
                    rows=-(-c.rows // processes),
                    shards=mesh.batch_shards(mesh.local_mesh(self.mesh)),
                    group_size=group_size,
                    prompts_per_prefill=-(-c.prompts_per_prefill // processes),
                    lane_buckets=c.lane_buckets,
                    steps_per_chunk=c.steps_per_chunk,
                ),
            )
        return self.samplers[name]

    @functools.cached_property
    def benchmarks(self) -> dict[str, sources.Benchmark]:
        """The held-out problems by name; stages that train evaluate on the first."""
        return sources.benchmarks(self.config.data.eval, self.config.eval.samples)

    def source(
        self, name: str, split: str, *, seed: int, traces: bool = False
    ) -> sources.Source:
        """Opens data that the config names, as `sources.open_source` does."""
        c = self.config.data
        given = {"seed": seed, "columns": c.columns}
        given |= {"task": c.task, "strict": c.strict}
        return sources.open_source(name, split, traces=traces, **given)

    @functools.cached_property
    def own(self) -> own.Own:
        """What is the user's: reward function, verifier, template of prompts."""
        return own.Own(self.config, self.settings.path_labels)

    def policy(self, *, sampling: bool) -> PolicySettings:
        """The policy of rollouts, or (`sampling` off) the plain one of SFT."""
        s = self.settings
        drawing = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        buckets = tuple(self.config.model.length_buckets)
        if self.packs:  # all rows but one are more than half full
            buckets = tuple(n for n in buckets if 2 * n > self.row_tokens)
        else:
            drawing["max_trained"] = s.max_response_tokens
        rl, shards = self.config.rl, mesh.batch_shards(self.mesh)
        drawing["group_rows"] = math.gcd(rl.group_size, rl.micro_batch_size // shards)
        drawing["shared_lengths"] = tuple(
            n for n in rl.shared_prompt_tokens if n <= s.max_prompt_tokens
        )
        return PolicySettings(
            special_ids=self.vocab.ban_ids,
            num_tokens=self.vocab.num_tokens,
            logits_chunk=self.config.model.logits_chunk,
            lengths=buckets,
            **(drawing if sampling else {}),
        )

    @property
    def packs(self) -> bool:
        """Whether rows of updates hold several trajectories."""
        return self.config.model.packed_tokens > 0

    @property
    def row_tokens(self) -> int:
        """The length of a row of an update, before it is cut."""
        return self.config.model.packed_tokens or self.settings.max_tokens

    def fill(
        self,
        trajectories: Sequence[Trajectory],
        micro_batch: int,
        policy: PolicySettings,
    ) -> micro_batches.Rows:
        """The rows of this process's trajectories, where rows hold several.

        Args:
          micro_batch: rows of all processes that are computed at once.
        """
        size = micro_batch // jax.process_count()
        limits = {"micro_batch": size, "max_tokens": self.row_tokens}
        return micro_batches.fill(trajectories, policy, **limits)

    def pack_rows(
        self,
        rows: Sequence[Sequence[Trajectory]],
        micro_batch: int,
        **settings: Any,
    ) -> Batch:
        """As `pack`, of rows that hold several; of as many rows as trajectories.

        Args:
          settings: of `trajectory.pack_rows`.
        """
        settings |= {"num_rows": sum(map(len, rows)), "variant": self.config.variant}
        batch = trajectory.pack_rows(rows, self.row_tokens, **settings)
        return _in_micro_batches(batch, micro_batch // jax.process_count())

    def pack(
        self,
        trajectories: Sequence[Trajectory | None],
        micro_batch: int,
        **settings: Any,
    ) -> Batch:
        """Packs this process's trajectories, with leading axes [micro-batches, B].

        Args:
          micro_batch: responses of all processes that are computed at once.
          settings: of `trajectory.pack`.
        """
        length, variant = self.settings.max_tokens, self.config.variant
        batch = trajectory.pack(trajectories, length, variant=variant, **settings)
        return _in_micro_batches(batch, micro_batch // jax.process_count())

    def abstract_batch(self, rows: int, micro_batch: int) -> Batch:
        """A batch of `rows` responses as jax.ShapeDtypeStruct, in micro-batches."""
        length, variant = self.row_tokens, self.config.variant
        if self.packs:
            size = {"num_rows": micro_batch, "variant": variant}
            batch = trajectory.pack_rows([], length, **size)
        else:
            batch = trajectory.pack([None] * micro_batch, length, variant=variant)
        sharding = mesh.batch_sharding(self.mesh, axis=1)
        count = rows // micro_batch
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (count, *x.shape), x.dtype, sharding=sharding
            ),
            batch,
        )

    def lower_update(
        self,
        update: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        batch: Batch,
        *inputs: Any,
    ) -> jax.stages.Lowered:
        """An update (`training.update`), its state donated, on this mesh.

        Args:
          batch, inputs: abstract, as `abstract_batch` makes them.
        """
        state = abstract_state(self.abstract_trained(), optimizer, self.mesh)
        shardings = shardings_of(state), mesh.replicated(self.mesh)
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        jitted = jax.jit(
            update,
            out_shardings=shardings,
            donate_argnums=0,
            compiler_options=TPU_OPTIONS if on_tpu else None,
        )
        with mesh.training(self.mesh):
            return jitted.lower(state, batch, *inputs)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What the parameters go with: kept beside them, and compared where they are read.

        Of the model, every field but those of `numerics`: shapes alone do not tell
        another base of the rotary positions from the right one.
        """
        how = (*_NUMERICS, "param_dtype")
        model = dataclasses.asdict(self.model)
        adapted = self.adapter_settings and dataclasses.asdict(self.adapter_settings)
        return files.plain(
            {
                **({checkpoint.ADAPTERS: adapted} if adapted else {}),
                "tokenizer": self.tokenizer.fingerprint,
                "vocabulary": self.tokenizer.vocabulary,
                "tags": self.tokenizer.tag_ids,
                "eos": self.tokenizer.eos_ids,
                "variant": self.config.variant,
                "model": {n: value for n, value in model.items() if n not in how},
            }
        )

    @property
    def about_model(self) -> dict[str, Any]:
        """`about` without how texts become tokens, which other versions may say otherwise."""
        return {n: value for n, value in self.about.items() if n != "tokenizer"}

    def key(self, purpose: str, step: int = 0) -> jax.Array:
        """A PRNG key that depends on the seed, a purpose and a step alone."""
        purposes = ("params", "tags", "rl", "eval", "coldstart", "adapters")
        key = jax.random.key(self.config.seed)
        key = jax.random.fold_in(key, purposes.index(purpose))
        return jax.random.fold_in(key, step)

    @functools.cached_property
    def adapter_settings(self) -> adapters.Settings | None:
        """What is trained beside frozen weights; None where all weights are trained."""
        return policies.settings(self.config, self.vocab.tag_ids)

    @property
    def makes_whole_gradients(self) -> bool:
        """Whether an update makes the gradients of layers' weights."""
        return not (self.adapter_settings and self.training_backend.adapters_apart)

    @functools.cached_property
    def before(self) -> "Experiment | None":
        """The run in `checkpoint.init`, on our mesh, if it has adapters."""
        init = self.config.checkpoint.init
        config = policies.config_with_adapters(init) if init else None
        if config is None:
            return None
        config.stages, config.kernels = (), "auto"
        config.mesh.update(self.mesh.shape)
        return build(config, devices=[*self.mesh.devices.flat])

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the model's parameters, adapters apart."""
        return self._abstract(abstract_params(self.model))

    def abstract_frozen(self) -> adapters.Frozen | None:
        """Those of weights that are not trained; None where all are."""
        if self.adapter_settings is None:
            return None
        return adapters.Frozen(self.abstract_params(), self.adapter_settings)

    def abstract_trained(self) -> Any:
        """Those of what is trained: all parameters, or adapters."""
        if self.adapter_settings is None:
            return self.abstract_params()
        boxed = adapters.abstract_adapters(self.model, self.adapter_settings)
        return self._abstract(boxed)

    def _abstract(self, boxed: Any) -> Any:
        return jax.tree.map(
            lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
            unbox(boxed),
            boxed_shardings(boxed, self.mesh),
        )

    def initial_params(self) -> Any:
        """Parameters to start from: a checkpoint, a Hugging Face folder, or random.

        Where there are adapters, these are the frozen ones.
        """
        c = self.config
        if c.checkpoint.init:
            number = self.origin.number  # newer ones may have come since
            return policies.read_init(self, number)
        shardings = param_shardings(self.model, self.mesh)
        if c.model.path:
            folder, config = _read_folder(c.model)
            # Straight to its devices; only rows for new tags are moved later.
            first = param_shardings(config, self.mesh)
            params = weights.load_params(folder, config, shardings=first)
            params, _ = tags.resize_embeddings(
                params, config, self.tokenizer, self.key("tags"), shardings=shardings
            )
            return params
        init = jax.jit(
            lambda key: unbox(init_params(self.model, key)), out_shardings=shardings
        )
        return init(self.key("params"))

    @functools.cached_property
    def origin(self) -> identity.Origin:
        """What `initial_params` takes them from."""
        c = self.config
        if path := c.checkpoint.init:
            state = policies.check_init(self)
            given = "checkpoint.init", str(checkpoint.absolute(path))
            number = int(state.parent.name)
            read = functools.cache(lambda: checkpoint.digest(state))
            return identity.Origin(*given, number, read, self.about)
        if path := c.model.path:
            folder = resolve(path)
            read = functools.cache(lambda: weights.digest(folder))
            return identity.Origin("model.path", path, None, read, self.about)
        return identity.Origin("", "", None, lambda: "", self.about)

    def check_weights(self) -> None:
        """Checks the Hugging Face folder that a run starts from, if it is one.

        Raises:
          FileNotFoundError, ValueError: names the file and what is wrong.
        """
        c = self.config
        if c.model.path and not c.checkpoint.init:
            folder, config = _read_folder(c.model)
            weights.check_weights(folder, config, self.tokenizer)
            labels = self.settings.path_labels
            usage.warn_of_other_use(folder, self.own.template, labels)

    def optimizer(
        self, stage: str
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer of a stage, and its learning rate by update."""
        c = self.config[stage]
        settings = OptimizerSettings(
            lr=c.lr,
            steps=c.steps * (c.mini_batches if stage == "rl" else 1),
            schedule=c.lr_schedule,
            warmup_share=c.warmup_share,
            **self.config.optimizer,
        )
        return make_optimizer(settings, self.vocab.tag_ids), settings.learning_rate()


def _in_micro_batches(batch: Batch, size: int) -> Batch:
    """Rows with leading axes [micro-batches, size]."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)


def build(
    config: ml_collections.ConfigDict, *, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """Checks a config and makes what the stages share.

    Args:
      devices: of the mesh; default all.

    Raises:
      ValueError, FileNotFoundError: names the field and its value.
    """
    checks.check(config, devices=devices)
    settings = checks.decode_settings(config)
    if config.model.path:
        folder, shape = _read_folder(config.model)
        own_tokenizer = tokenizer_files.load(folder)
        if settings.planned:
            own_tokenizer.use_plans()
        vocab_size = max(shape.vocab_size, own_tokenizer.vocab_size)
    else:
        own_tokenizer = tasks.make(config.data.task).tokenizer()
        if settings.planned:
            own_tokenizer.use_plans()
        vocab_size = own_tokenizer.vocab_size
        names = [f.name for f in dataclasses.fields(ModelConfig)]
        fields = {n: config.model[n] for n in names if n in config.model}
        fields |= numerics(config.model)
        shape = ModelConfig(vocab_size=vocab_size, rope_base=_ROPE_BASE, **fields)
    own_tokenizer.use_bos(config.data.bos)
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    vocab = Vocab.of(own_tokenizer, settings.grammar)
    settings.check_vocab(vocab)
    made = Experiment(
        config=config,
        tokenizer=own_tokenizer,
        model=shape,
        vocab=vocab,
        mesh=mesh.make_mesh(**config.mesh, devices=devices),
        settings=settings,
    )
    if config.kernels in ("tpu", "cpu"):  # do they run? before anything compiles
        updates = {"sft", "rl"} & {*config.stages}
        for training in {False, bool(updates)}:
            choose(made.model, config.kernels, made.mesh, training=training)
    if config.checkpoint.init:
        about = {n: x for n, x in made.about.items() if n != checkpoint.ADAPTERS}
        if not {"sft", "rl"} & {*config.stages} and config.stages:
            del about["variant"]  # the other stages name the modes that they decode in
        policies.check_init(made, about)
    return made


def reopen(config: ml_collections.ConfigDict, device: jax.Device) -> Experiment:
    """The experiment of a run on one device, whatever machine the run was on."""
    config.stages = ()  # nothing is trained; what only training refuses may be there
    if not config.model.lora_rank:  # else its weights are there, and adapters here
        config.checkpoint.init = ""
    config.kernels = "auto"
    config.mesh.update(data=1, fsdp=1, tensor=1)
    return build(config, devices=[device])


def _read_folder(c: ml_collections.ConfigDict) -> tuple[pathlib.Path, ModelConfig]:
    """The Hugging Face folder that the section `model` names, and its model."""
    folder = resolve(c.path)
    return folder, read_config(folder, **numerics(c))


def numerics(c: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that a Hugging Face folder does not set."""
    stored = {"param_dtype": c["dtype"]} if c["lora_rank"] else {}  # else float32
    return {n: c[n] for n in _NUMERICS} | stored
