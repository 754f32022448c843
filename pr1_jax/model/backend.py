"""Which backend computes a model: XLA, or kernels for TPU or in C++ on CPU."""

import jax
from absl import logging
from jax.sharding import Mesh

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.xla import Xla

KERNELS = ("auto", "xla", "tpu", "cpu")
Backend = Xla  # what all of them are


def choose(
    config: ModelConfig,
    kernels: str = "auto",
    mesh: Mesh | None = None,
    *,
    training: bool = False,
) -> Backend:
    """The backend of a sampler, or of updates, on a mesh or on JAX's default device.

    Args:
      kernels: of `KERNELS`; `auto` takes `tpu` or `cpu` where they run.
      training: for updates, whose C++ kernels run on one device alone. Those on TPU are
        not a backend's: `model.attention` chooses them.

    Raises:
      ValueError: `tpu` or `cpu` cannot run here, and why.
    """
    _set_precision(config.dtype)
    if kernels == "xla":
        return Xla(config)
    from pr1_jax.model import cpu, tpu  # no other module names them

    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    if kernels == "tpu" or (kernels == "auto" and device.platform == "tpu"):
        name, reason = "tpu", tpu.why_not(config, mesh)
        make = Xla if training else lambda config: tpu.make(config, mesh)
    else:
        name, reason = "cpu", cpu.why_not(config, mesh, training=training)
        make = cpu.Cpu
    if not reason:
        return make(config)
    if kernels == name:
        raise ValueError(f"kernels={name}: {reason}")
    what = "compute updates" if training else "decode"
    logging.info("XLA's kernels %s: %s", what, reason)
    return Xla(config)


def _set_precision(dtype: str) -> None:
    """Makes products of float32 exact to float32 in this process.

    TPUs round their operands to bfloat16 by default, and GPUs to TF32. Who has set
    JAX_DEFAULT_MATMUL_PRECISION gets what it says.
    """
    chosen = jax.config.jax_default_matmul_precision
    if dtype == "float32" and chosen is None and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
