"""The folder of a run: its config, checkpoints, metrics, alarms and progress.

May import `pr1_jax.system` and `pr1_jax.defaults`.
"""
