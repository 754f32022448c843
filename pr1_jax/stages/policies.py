"""The parameters of a policy, read: all of them, or adapters and the weights beside them.

Checkpoints of a run with adapters hold these alone. The frozen weights are read again from
where the run took them, and a checksum tells whether they are still the same.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

from pr1_jax.model import adapters
from pr1_jax.model.params import unbox
from pr1_jax.stages.experiment import Experiment
from pr1_jax.training.state import shardings_of
from pr1_jax.workdir import checkpoint


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
    settings = made.model, made.adapter_settings
    init = jax.jit(
        lambda key: unbox(adapters.init_adapters(*settings, key)),
        out_shardings=shardings_of(made.abstract_trained()),
    )
    return init(made.key("adapters"))


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
