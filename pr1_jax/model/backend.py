"""Which kernels compute the model."""

import dataclasses

from absl import logging
from jax.sharding import Mesh

from pr1_jax.kernels.cpu import library
from pr1_jax.model.config import ModelConfig

KERNELS = ("auto", "xla", "cpu")


def with_kernels(
    config: ModelConfig,
    kernels: str = "auto",
    mesh: Mesh | None = None,
    *,
    training: bool = False,
) -> ModelConfig:
    """The config for a sampler, or for updates, on a mesh or on JAX's default device.

    Args:
      kernels: of `KERNELS`; `auto` takes `cpu` where it runs.
      training: for updates, whose kernels run on one device alone.

    Raises:
      ValueError: `cpu` cannot run here, and why.
    """
    if kernels == "xla":
        return config
    if training and mesh is not None and mesh.size > 1:
        reason = f"the mesh has {mesh.size} devices"
    elif mesh is not None and mesh.shape["tensor"] > 1:
        reason = f"mesh.tensor={mesh.shape['tensor']} splits heads"
    elif mesh is not None and (platform := mesh.devices.flat[0].platform) != "cpu":
        reason = f"the device is a {platform}"
    else:
        reason = library.why_not(config.dtype)
    if reason and kernels == "cpu":
        raise ValueError(f"kernels=cpu: {reason}")
    if reason:
        what = "compute updates" if training else "decode"
        logging.info("XLA's kernels %s: %s", what, reason)
    return dataclasses.replace(config, cpu_kernels=not reason)
