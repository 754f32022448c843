"""Where every config starts: the defaults of `pr1_jax.defaults`, in one of four sizes.

A size is a variant of each config, as in `configs/rl_alternating.py:smoke`: none (the
task made by code, minutes on a CPU), `smoke`, `smollm2`, `qwen3_4b`. Behind a comma
`qwen3_4b` takes devices, as in `qwen3_4b,v5e:4x4`.
"""

from pr1_jax.defaults import get_config
from pr1_jax.sizes import REAL

__all__ = ["REAL", "get_config"]
