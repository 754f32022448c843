"""Benchmark of the sampler and the update: `python -m pr1_jax.bench`.

Ours alone, with random weights. Figures are ratios within one run and shares of what
the machine was measured to be able to do; `--suite` names what to run:

  limits    peak of matrix products, memory bandwidth
  sampling  32 prompts × 64 tokens → 128 tokens
  update    one GRPO update in micro-batches of several sizes, its memory
  blocks    parallel blocks against the published scheme, on real lengths
  lanes     a decode step with none, some or all rows in a block

Every figure is of `--repeats` calls after one to warm up, taking turns with what it is
compared with: the median, and the least and the greatest in brackets.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from pr1_jax.system import cli

_SUITE = flags.DEFINE_list("suite", ["all"], "Suites to run, or all.")
_SHAPE = flags.DEFINE_enum("shape", "small", ["small", "qwen3_0_6b", "tiny"], "Model.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_OUT = flags.DEFINE_string("out", None, "Folder for results.json and results.md.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Least sizes: does everything still run?")
_KERNELS = flags.DEFINE_enum(
    "kernels",
    "auto",
    ["auto", "cpu", "tpu", "xla"],
    "Of decode steps and updates; cpu: C++, tpu: Pallas in decode steps.",
)


def _folder() -> Path | None:
    """The folder for results, made; stops where there can be none."""
    if _OUT.value is None:
        return None
    folder = Path(_OUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cli.stop(f"--out={_OUT.value}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        cli.stop(f"--out={_OUT.value}: not writable")
    return folder


def main(argv: list[str]) -> None:
    """Runs the suites; where one fails, the exit code is 1."""
    del argv
    import rich.console  # these after the flags: JAX is slow to import

    from pr1_jax.bench import limits, shapes, suites

    known = ("all", *suites.SUITES)
    for name in _SUITE.value or [""]:
        if name not in known:
            given = ",".join(_SUITE.value)
            cli.stop(f"--suite={given}: {name!r} is not one of {', '.join(known)}")
    folder, shape = _folder(), shapes.SHAPES[_SHAPE.value]
    bench = shapes.Bench(
        shape=shape,
        sizes=shapes.QUICK if _QUICK.value else shapes.Sizes(),
        repeats=_REPEATS.value,
        limits=limits.measure(shape.model, quick=_QUICK.value),
        quick=_QUICK.value,
        kernels=_KERNELS.value,
    )
    asked = set(_SUITE.value)
    names = [name for name in suites.SUITES if asked & {name, "all"}]
    console = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    show = lambda table: console.print(table.terminal())
    results = suites.run(bench, names, out=folder, show=None if _JSON.value else show)
    if _JSON.value:
        print(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    if any("error" in suite for suite in results["suites"].values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
