"""The jitted pieces of a sampler."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from pr1_jax.model.backend import Backend
from pr1_jax.sampler import cache, forward, loop
from pr1_jax.sampler.loop import Decoding
from pr1_jax.sampler.schedule import Schedule
from pr1_jax.sampler.state import State, admit, drop
from pr1_jax.system.mesh import (
    RULES,
    batch_sharding,
    batch_shards,
    local_mesh,
    localize,
    replicated,
)


class Programs:
    """The jitted pieces of a sampler, on this process's part of the parameters' mesh.

    The shardings of a state are said once for all pieces, since a piece is compiled anew
    for inputs that lie elsewhere: rows are split into shards; keys and values also over
    `tensor` by head, if they can be.
    """

    def __init__(
        self,
        backend: Backend | None,
        decoding: Decoding,
        schedule: Schedule,
        params_sharding: Sharding,
    ):
        """Compiles nothing yet.

        Args:
          backend: None where `decoding.decode` needs no cache.
          params_sharding: of one of the parameters that will be given.

        Raises:
          ValueError: the schedule has another number of shards than their mesh.
        """
        self._backend, self._schedule = backend, schedule
        self._mesh = self._weights = self._whole = self._by_row = None
        if isinstance(params_sharding, NamedSharding):
            whole_mesh = params_sharding.mesh
            self._mesh = local_mesh(whole_mesh)
            self._whole, self._by_row = (
                replicated(self._mesh),
                batch_sharding(self._mesh),
            )
            if backend is not None:
                self._weights = backend.prepared_shardings(whole_mesh)
        self._is_split = self._mesh is not None and batch_shards(self._mesh) > 1
        shards = batch_shards(self._mesh) if self._mesh else 1
        if shards != schedule.shards:
            raise ValueError(
                f"shards={schedule.shards}, but the parameters' mesh splits rows "
                f"into {shards}"
            )
        self._decoding = dataclasses.replace(
            decoding, draw=self._by_vocabulary(decoding.draw)
        )
        self.empty = functools.partial(
            cache.empty, backend, decoding.settings, schedule
        )
        self._shardings = self._state_shardings()
        self._compile()
        self._chunks: dict[int, Callable[..., Any]] = {}

    def _state_shardings(self):
        """The sharding of every array of a state; None on one device."""
        if self._mesh is None:
            return None
        rows = heads = self._by_row
        if self._backend is not None:
            num_heads = self._backend.config.num_kv_heads
            if num_heads % self._mesh.shape["tensor"] == 0:
                spec = PartitionSpec(*rows.spec, "tensor")
                heads = NamedSharding(self._mesh, spec)
        state = jax.eval_shape(lambda: self.empty(1, 1))
        return jax.tree.map(lambda x: heads if x.ndim > 3 else rows, state)

    def _compile(self) -> None:
        """Makes the jitted functions, but for chunks."""
        backend, state = self._backend, self._shardings
        prompts, bare = state, state
        if state is not None:
            prompts, bare = state.prompts, without_slots(state)
        grow = functools.partial(cache.grow, backend)
        take = self._by_shard(cache.take, 0)
        rejoin = functools.partial(
            forward.rejoin, backend, self._decoding.vocab, self._schedule.readers
        )
        self.init = jax.jit(self.empty, static_argnums=(0, 1), out_shardings=state)
        self.admit = jax.jit(_admit, donate_argnums=0, out_shardings=bare)
        self.drop = jax.jit(drop, donate_argnums=0, out_shardings=bare)
        self.grow = jax.jit(grow, static_argnums=1, out_shardings=state)
        self.take = jax.jit(take, out_shardings=state)
        self.rejoin = jax.jit(
            self._by_shard(rejoin), donate_argnums=1, out_shardings=state
        )
        if backend is not None:
            prefill = self._by_shard(functools.partial(forward.prefill, backend))
            self.prefill = jax.jit(prefill, donate_argnums=1, out_shardings=prompts)
            self._convert = jax.jit(backend.prepare, out_shardings=self._weights)

    def convert(self, params) -> Any:
        """Parameters as the backend prepares them, on this process's devices."""
        if self._backend is None:
            return params
        params = self._convert(params)
        return params if self._mesh is None else localize(params, self._mesh)

    def abstract_params(self, params) -> Any:
        """What `convert` gives, as jax.ShapeDtypeStruct."""
        abstract = jax.eval_shape(self._backend.prepare, params)
        return _with_shardings(abstract, jax.tree.broadcast(self._weights, abstract))

    def abstract_state(self, slots: int, prompt_tokens: int) -> Any:
        """What `init` gives, as jax.ShapeDtypeStruct."""
        state = jax.eval_shape(lambda: self.init(slots, prompt_tokens))
        return _with_shardings(state, self._shardings)

    def chunk(self, num_lanes: int) -> Callable[..., Any]:
        """`loop.run_chunk` for so many lanes of each shard."""
        if num_lanes not in self._chunks:
            run = functools.partial(
                loop.run_chunk,
                decoding=self._decoding,
                steps=self._schedule.steps_per_chunk,
                num_lanes=num_lanes,
                axes=RULES["batch"] if self._is_split else (),
            )
            # The number of idle rows to stop at is whole.
            chunk = lambda stop, params, state: run(params, state, stop)
            rows = RULES["batch"]
            out = PartitionSpec(rows), PartitionSpec(None, rows), PartitionSpec()
            chunk = self._by_shard(chunk, 2, out)
            log = None if self._mesh is None else batch_sharding(self._mesh, 1)
            self._chunks[num_lanes] = jax.jit(
                lambda params, state, stop: chunk(stop, params, state),
                donate_argnums=1,
                out_shardings=(self._shardings, log, self._whole),
            )
        return self._chunks[num_lanes]

    def _by_vocabulary(self, draw):
        """A draw for which devices of `tensor` do not exchange their logits."""
        tensor = self._mesh.shape["tensor"] if self._mesh else 1
        split = functools.partial(draw, axis="tensor")

        def run(logits, *rows):
            if tensor == 1 or logits.shape[-1] % tensor:
                return draw(logits, *rows)
            return jax.shard_map(
                split,
                mesh=None if self._is_split else self._mesh,  # None: that around it
                in_specs=(
                    PartitionSpec(None, "tensor"),
                    *(PartitionSpec(),) * len(rows),
                ),
                out_specs=PartitionSpec(),
                axis_names={"tensor"},
                check_vma=False,
            )(logits, *rows)

        return run

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


def without_slots(state: State) -> State:
    """What of a state has no slots, so that work on it is compiled once."""
    return state.replace(cache=None, prompts=None, slot_block=None, slot_path=None)


def _admit(state: State, base_key, ids, rows, limits) -> State:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base_key, ids)
    return admit(state, *rows, keys, limits)


def _with_shardings(abstract, shardings):
    struct = lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
    )
    return jax.tree.map(struct, abstract, shardings)
