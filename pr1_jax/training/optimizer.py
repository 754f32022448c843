"""AdamW with schedules, clipping, and updates that are skipped when not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. `steps` counts updates; warm-up is linear, from 0."""

    lr: float
    steps: int
    schedule: str = "constant"
    warmup_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global norm; 0 = no clipping
    tag_lr_multiplier: float = 1.0  # of the tags' embedding (and output) rows

    def learning_rate(self) -> optax.Schedule:
        """Learning rate by update, from 0."""
        warmup = round(self.warmup_share * self.steps)
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.lr, max(self.steps - warmup, 1))
        elif self.schedule == "constant":
            after = optax.constant_schedule(self.lr)
        else:
            raise ValueError(f"schedule={self.schedule!r} is not one of {SCHEDULES}")
        start = optax.linear_schedule(self.lr / max(warmup, 1), self.lr, max(warmup, 1))
        return optax.join_schedules([start, after], [warmup])


def make_optimizer(
    settings: OptimizerSettings, tag_ids: tuple[int, ...] = ()
) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; a gradient without a finite norm is skipped.

    Then parameters and moments stay, and the schedule goes on: update number n, skipped
    ones included, has the learning rate of n. `total_notfinite` of the state counts
    skipped updates, `notfinite_count` those in a row.
    """
    parts = []
    if settings.clip_norm:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
    if settings.weight_decay:
        # By name: stacked norm scales and biases have two axes as well.
        names = ("kernel", "embedding", "head", "a", "b")
        decays = lambda path, _: path[-1].key in names and path[0].key != "rows"
        matrices = functools.partial(jax.tree_util.tree_map_with_path, decays)
        parts.append(optax.add_decayed_weights(settings.weight_decay, matrices))
    if settings.tag_lr_multiplier != 1.0:
        parts.append(_scale_rows(tag_ids, settings.tag_lr_multiplier))
    parts.append(_scale_by_rate(settings.learning_rate()))
    forever = jnp.iinfo(jnp.int32).max
    chain = optax.apply_if_finite(optax.chain(*parts), max_consecutive_errors=forever)

    def init(params):
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            dtype = getattr(x, "dtype", jnp.float32)  # optax inits with placeholders
            if dtype != jnp.float32:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"parameter {name} is {dtype}; only float32 is trained"
                )
        return chain.init(params)

    def update(gradients, state, params=None):
        # Finite numbers may have a norm that is not: clipped by it, they would be 0.
        is_usable = jnp.isfinite(optax.tree.norm(gradients))
        usable = lambda x: jnp.where(is_usable, x, jnp.nan)
        gradients = jax.tree.map(usable, gradients)
        return chain.update(gradients, state, params, skipped=state.total_notfinite)

    return optax.GradientTransformation(init, update)


def _scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, told how many updates were `skipped` before."""
    plain = optax.scale_by_learning_rate(rate)

    def update(updates, state, params=None, *, skipped):
        counted = state._replace(count=state.count + skipped)
        updates, _ = plain.update(updates, counted, params)
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def _scale_rows(rows: tuple[int, ...], factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of some rows of the embedding and the head.

    Of adapters all rows that are trained are such.
    """

    def update(updates, params=None):
        del params
        if "rows" in updates:
            more = jax.tree.map(lambda x: x * factor, updates["rows"])
            return updates | {"rows": more}
        scale = lambda x: x.at[jnp.array(rows)].multiply(factor)
        named = {n: scale(updates[n]) for n in ("embedding", "head") if n in updates}
        return updates | named

    return optax.stateless(update)
