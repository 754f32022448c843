"""Which backend computes a model: XLA, or kernels in C++ on CPU."""

from absl import logging
from jax.sharding import Mesh

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.xla import Xla

KERNELS = ("auto", "xla", "cpu")
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
      kernels: of `KERNELS`; `auto` takes `cpu` where it runs.
      training: for updates, whose C++ kernels run on one device alone.

    Raises:
      ValueError: `cpu` cannot run here, and why.
    """
    if kernels == "xla":
        return Xla(config)
    from pr1_jax.model import cpu  # the one place that knows of it

    reason = cpu.why_not(config, mesh, training=training)
    if not reason:
        return cpu.Cpu(config)
    if kernels == "cpu":
        raise ValueError(f"kernels=cpu: {reason}")
    what = "compute updates" if training else "decode"
    logging.info("XLA's kernels %s: %s", what, reason)
    return Xla(config)
