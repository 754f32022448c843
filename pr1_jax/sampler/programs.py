"""The jitted pieces of a sampler."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pr1_jax.model.params import param_shardings
from pr1_jax.sampler import cache
from pr1_jax.sampler.forward import decoding_config, decoding_params
from pr1_jax.sampler.forward import prefill as forward_prefill
from pr1_jax.sampler.forward import rejoin as forward_rejoin
from pr1_jax.sampler.state import State, admit
from pr1_jax.system.mesh import (
    RULES,
    SAMPLING_RULES,
    batch_sharding,
    batch_shards,
    local_mesh,
    localize,
    replicated,
)


class Programs:
    """The jitted pieces of a sampler, on this process's part of the parameters' mesh.

    Where states live is said once for all pieces, since a piece is compiled anew for
    inputs that lie elsewhere: rows split into shards; keys and values also over
    `tensor` by head, if they can be.
    """

    def __init__(self, sampler, params_sharding: jax.sharding.Sharding):
        config, vocab, seats = sampler.config, sampler.vocab, sampler.seats
        self._config, self._run_chunk = config, sampler.run_chunk
        self._mesh = self._places = self._whole = self._weights = None
        state = jax.eval_shape(lambda: sampler.empty(1, 1))
        self._is_split = False
        if isinstance(params_sharding, NamedSharding):
            whole_mesh = params_sharding.mesh
            self._mesh = mesh = local_mesh(whole_mesh)
            self._whole = replicated(mesh)
            self._is_split = batch_shards(mesh) > 1
            rows = batch_sharding(mesh)
            heads = rows
            if config is not None:
                if config.num_kv_heads % mesh.shape["tensor"] == 0:
                    heads = NamedSharding(mesh, PartitionSpec(*rows.spec, "tensor"))
                decoding = decoding_config(config)
                if decoding.packed:  # never split
                    self._weights = replicated(whole_mesh)
                else:
                    self._weights = param_shardings(
                        decoding, whole_mesh, SAMPLING_RULES
                    )
            self._places = jax.tree.map(lambda x: heads if x.ndim > 3 else rows, state)
        shards = batch_shards(self._mesh) if self._mesh else 1
        if shards != sampler.shards:
            raise ValueError(
                f"shards={sampler.shards}, but the parameters' mesh splits rows "
                f"into {shards}"
            )
        prompts, bare = self._places, self._places
        if self._places is not None:
            prompts, bare = self._places.prompts, without_slots(self._places)
        self.init = jax.jit(
            sampler.empty, static_argnums=(0, 1), out_shardings=self._places
        )
        self.admit = jax.jit(_admit, donate_argnums=0, out_shardings=bare)
        self.grow = jax.jit(cache.grow, static_argnums=1, out_shardings=self._places)
        self.take = jax.jit(self._by_shard(cache.take, 0), out_shardings=self._places)
        rejoin = functools.partial(forward_rejoin, config, vocab, seats)
        self.rejoin = jax.jit(
            self._by_shard(rejoin), donate_argnums=1, out_shardings=self._places
        )
        if config is not None:
            prefill = functools.partial(forward_prefill, config)
            self.prefill = jax.jit(
                self._by_shard(prefill), donate_argnums=1, out_shardings=prompts
            )
            convert = functools.partial(decoding_params, config)
            self._convert = jax.jit(convert, out_shardings=self._weights)
        self._chunks: dict[int, Callable[..., Any]] = {}

    def convert(self, params) -> Any:
        """`kv_cache.decoding_params`, on this process's devices."""
        if self._config is None:
            return params
        params = self._convert(params)
        return params if self._mesh is None else localize(params, self._mesh)

    def abstract_params(self, params) -> Any:
        """What `convert` gives, as jax.ShapeDtypeStruct."""
        convert = functools.partial(decoding_params, self._config)
        struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        abstract = jax.eval_shape(convert, params)
        places = jax.tree.broadcast(self._weights, abstract)
        return jax.tree.map(struct, abstract, places)

    def place(self, state) -> Any:
        """An abstract state with its shardings."""
        struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.tree.map(struct, state, self._places)

    def _by_shard(self, function, whole: int = 1, out=None):
        """A function that every shard runs on its part of the arguments.

        Args:
          whole: so many arguments, the first ones, are whole in every shard.
          out: PartitionSpec of the outputs; default: split as the rest.
        """
        if not self._is_split:
            return function
        axes = RULES["batch"]
        split = PartitionSpec(axes)

        def run(*args):
            specs = [PartitionSpec()] * whole + [split] * (len(args) - whole)
            return jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=tuple(specs),
                out_specs=split if out is None else out,
                axis_names=set(axes),
                check_vma=False,
            )(*args)

        return run

    def chunk(self, num_lanes: int) -> Callable[..., Any]:
        """`decode_loop.run_chunk` for so many lanes of each shard."""
        if num_lanes not in self._chunks:
            run = functools.partial(self._run_chunk, num_lanes=num_lanes)
            # The number of idle rows to stop at is whole.
            chunk = lambda stop, params, state: run(params, state, stop)
            rows = RULES["batch"]
            out = PartitionSpec(rows), PartitionSpec(None, rows), PartitionSpec()
            chunk = self._by_shard(chunk, 2, out)
            log = None if self._mesh is None else batch_sharding(self._mesh, 1)
            self._chunks[num_lanes] = jax.jit(
                lambda params, state, stop: chunk(stop, params, state),
                donate_argnums=1,
                out_shardings=(self._places, log, self._whole),
            )
        return self._chunks[num_lanes]


def without_slots(state: State) -> State:
    """What of a state has no slots, so that work on it is compiled once."""
    return state.replace(cache=None, prompts=None, slot_block=None, slot_path=None)


def _admit(state: State, base_key, ids, *rows) -> State:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base_key, ids)
    return admit(state, *rows, keys)
