"""The paper's claims put to test in miniature, by runs of `pr1_jax.main` as processes.

It may import the report, `kernels`, `layout` and `system`.
"""
