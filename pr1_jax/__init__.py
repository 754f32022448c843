"""Parallel-R1 in JAX: language models that think in parallel (arXiv 2509.07980)."""
