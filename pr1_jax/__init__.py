"""Parallel-R1 in JAX: language models that think in parallel (arXiv 2509.07980).

The method:  tags, layout, trajectory, policy, losses, rewards, evaluate, diversity,
             answers/, workers/
Machinery:   system/ → kernels/ → model/ → sampler/, training/ (data/ and huggingface/
             beside them) → workdir/ → stages/; each imports only what is left of it
Tools:       report/, chat/, plan/, bench/, study/, on top of all that
Commands:    python -m pr1_jax.main, .export, and every tool: pr1_jax.chat and so on
"""

import importlib.util
import os
import shlex
import sys

__version__ = "0.1.0"


def _check_environment() -> None:
    """Ends a command that a Python without our dependencies runs, with one line."""
    needed = ("absl", "jax", "flax", "ml_collections")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.relpath(os.path.join(folder, ".venv", "bin", "python"))
    if os.path.exists(python):
        given = getattr(sys, "orig_argv", ["", "-m", "pr1_jax.…"])[1:]
        command = " ".join(map(shlex.quote, [python, *given]))
        advice = f"use the environment's, {command}, or activate it first"
    else:
        advice = "install it with its dependencies: pip install -e . (see README.md)"
    print(
        f"error: {sys.executable} has no {', '.join(missing)}: {advice}",
        file=sys.stderr,
    )
    sys.exit(2)


if sys.argv[:1] == ["-m"]:  # so it is while `python -m` looks for a command
    _check_environment()
