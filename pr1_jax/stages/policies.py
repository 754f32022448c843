"""The parameters of a policy, read: all of them, or adapters and the weights beside them.

Checkpoints of a run with adapters hold these alone. The frozen weights are read again from
where the run took them, and a checksum tells whether they are still the same.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import ml_collections
from etils import epath

from pr1_jax.model import adapters
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import unbox
from pr1_jax.training.state import shardings_of
from pr1_jax.workdir import checkpoint
from pr1_jax.workdir.folder import read_config


class Experiment(Protocol):
    """What is needed here of `stages.experiment.Experiment`, which imports this module."""

    config: ml_collections.ConfigDict
    model: ModelConfig
    adapter_settings: adapters.Settings | None
    before: "Experiment | None"
    about: dict[str, Any]
    about_model: dict[str, Any]

    def abstract_params(self) -> Any: ...
    def abstract_trained(self) -> Any: ...
    def initial_params(self) -> Any: ...
    def key(self, purpose: str) -> jax.Array: ...


def settings(
    config: ml_collections.ConfigDict, tag_ids: Iterable[int]
) -> adapters.Settings | None:
    """What `config.model` says is trained beside frozen weights; None: all weights are."""
    c = config.model
    if not c.lora_rank:
        return None
    ids = sorted(map(int, tag_ids)) if adapters.TAGS in c.lora_targets else ()
    names = adapters.projections(tuple(c.lora_targets))
    return adapters.Settings(c.lora_rank, float(c.lora_alpha), names, tuple(ids))


def read_frozen(made: Experiment) -> tuple[adapters.Frozen | None, dict[str, Any]]:
    """The weights that are not trained, None where all are.

    Returns:
      Them, and what checkpoints go with: `Experiment.about`, and their checksum.
    """
    if made.adapter_settings is None:
        return None, made.about
    params = made.initial_params()
    frozen = adapters.Frozen(params, made.adapter_settings)
    return frozen, made.about | {checkpoint.FROZEN: adapters.checksum(params)}


def first_trained(made: Experiment) -> Any:
    """What a run trains, as it is at the start: all parameters, or fresh adapters."""
    if made.adapter_settings is None:
        return made.initial_params()
    what = made.model, made.adapter_settings
    init = jax.jit(
        lambda key: unbox(adapters.init_adapters(*what, key)),
        out_shardings=shardings_of(made.abstract_trained()),
    )
    return init(made.key("adapters"))


def check_init(made: Experiment, about: Mapping[str, Any] | None = None) -> epath.Path:
    """The state that `checkpoint.init` names: of all parameters, or of adapters alone.

    Args:
      about: what they must go with, as of `checkpoint.check_params`.

    Raises:
      FileNotFoundError, ValueError: as there.
    """
    path, other = made.config.checkpoint.init, made.before
    if other is None:
        return checkpoint.check_params(path, made.abstract_params(), about=about)
    if about:
        checkpoint.check_about(other.about, about, f"checkpoint.init={path}")
    here, there = made.model.scan_layers, other.model.scan_layers
    if here != there:
        raise ValueError(
            f"model.scan_layers={here}, and the run with adapters in "
            f"checkpoint.init={path} has {there}: set that"
        )
    return checkpoint.check_params(path, other.abstract_trained(), about=other.about)


def read_init(made: Experiment, number: int | None) -> Any:
    """The parameters in `checkpoint.init`; adapters are merged into their weights.

    Args:
      number: of the checkpoint.
    """
    path, other = made.config.checkpoint.init, made.before
    wanted = made.abstract_params()
    if other is None:
        return checkpoint.restore_params(path, wanted, number=number)
    params = read(other, path, number=number, field="checkpoint.init")
    cast = lambda x, like: x.astype(like.dtype)
    merged = jax.jit(
        lambda tree: jax.tree.map(cast, tree, wanted),
        out_shardings=shardings_of(wanted),
    )
    return merged(params)


def config_with_adapters(path: str) -> ml_collections.ConfigDict | None:
    """The config of the run in a workdir, None where its checkpoints hold all parameters."""
    file = os.path.join(path, "config.json")
    if checkpoint.ADAPTERS not in checkpoint.about_of(path) or not os.path.exists(file):
        return None
    return read_config(path)


def check(made: Experiment, where: str | os.PathLike[str], **which: Any) -> None:
    """Raises as `checkpoint.check_params` does; reads no parameters."""
    about = made.about_model
    checkpoint.check_params(where, made.abstract_trained(), about=about, **which)


def read(
    made: Experiment,
    where: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    **which: Any,
) -> Mapping[str, Any]:
    """All parameters of a checkpoint's policy, adapters merged.

    Args:
      dtype: of the parameters; as trained without it.
      where, which: as of `checkpoint.check_params`: `number` and `field`.

    Raises:
      FileNotFoundError, ValueError: as there, or the frozen weights are other ones.
    """
    if made.adapter_settings is None:
        wanted = made.abstract_params()
        if dtype:
            wanted = jax.tree.map(lambda x: x.update(dtype=dtype), wanted)
        which["about"] = made.about_model
        return checkpoint.restore_params(where, wanted, **which)
    frozen, trained = read_adapters(made, where, **which)
    params = adapters.merge_all(frozen.with_adapters(trained))
    return jax.tree.map(lambda x: x.astype(dtype), params) if dtype else params


def read_adapters(
    made: Experiment, where: str | os.PathLike[str], **which: Any
) -> tuple[adapters.Frozen, Any]:
    """The frozen weights and the adapters of a checkpoint; as `read`."""
    check(made, where, **which)  # before the frozen weights are read, which takes long
    frozen, about = read_frozen(made)
    about = {name: x for name, x in about.items() if name != "tokenizer"}
    wanted = made.abstract_trained()
    return frozen, checkpoint.restore_params(where, wanted, about=about, **which)
