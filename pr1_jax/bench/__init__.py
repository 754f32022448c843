"""Speed, measured: `python -m pr1_jax.bench` (see `__main__`)."""
