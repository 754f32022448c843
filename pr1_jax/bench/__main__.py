"""Benchmark of the sampler and the update: `python -m pr1_jax.bench`.

Ours alone, with random weights. Figures are ratios within one run and shares of what
the machine was measured to be able to do; `--suite` names what to run:

  limits         peak of matrix products, memory bandwidth
  sampling       32 prompts × 64 tokens → 128 tokens
  update         one GRPO update in micro-batches of several sizes, its memory
  blocks         parallel blocks against the published scheme, on real lengths
  lanes          a decode step with none, some or all rows in a block
  sweeps         cost against capacities, lengths, rows and paths
  refill         how busy rows are kept
  prompts        long prompts kept once a group or once a row
  decode_limits  decoding and updates by batch against the limits, and a profile

Every figure is of `--repeats` calls after one to warm up, taking turns with what it is
compared with: the median, and the least and the greatest in brackets.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from pr1_jax.system import cli

if TYPE_CHECKING:
    from pr1_jax.bench.plans import Trace

_SUITE = flags.DEFINE_list("suite", ["all"], "Suites to run, or all.")
_SHAPE = flags.DEFINE_string("shape", "small", "Model: small, qwen3_0_6b or tiny.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder for results.json, results.md and a picture of each suite."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "Least sizes: does everything still run?")
_KERNELS = flags.DEFINE_string(
    "kernels", "auto", "Of decode steps and updates: auto, cpu (C++) or xla."
)
_TRACES = flags.DEFINE_string(
    "traces",
    None,
    "JSON lines with question and response, whose lengths the blocks have; the default "
    "are deciles of 338 published cold-start traces.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "Hugging Face folder or name: counts the tokens of --traces; by default words, "
    "digits, punctuation and newlines are counted.",
)


def _check_names(flag: flags.FlagHolder, names, known) -> None:
    given = ",".join(names)
    for name in names or [""]:
        if name not in known:
            cli.stop(
                f"--{flag.name}={given}: {name!r} is not one of {', '.join(known)}"
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


def _traces() -> tuple[tuple["Trace", ...], str]:
    """Lengths of traces, and where they are from; stops at a file that is none."""
    from pr1_jax.bench import plans
    from pr1_jax.data import tokenizer_files

    count, how = plans.count_pieces, "words, digits, punctuation and newlines"
    if _TOKENIZER.value is not None:
        if _TRACES.value is None:
            cli.stop(f"--tokenizer={_TOKENIZER.value}: --traces is missing")
        try:
            loaded = tokenizer_files.load(_TOKENIZER.value)
        except (ValueError, OSError) as error:
            cli.stop(f"--tokenizer={_TOKENIZER.value}: {error}")
        count = lambda text: len(loaded.encode(text, allow_tags=False))
        how = f"tokens of {_TOKENIZER.value}"
    if _TRACES.value is None:
        traces = plans.builtin_traces()
        return traces, f"deciles of 338 published cold-start traces, in {how}"
    try:
        traces = plans.read_traces(_TRACES.value, count)
    except (ValueError, OSError) as error:
        cli.stop(
            f"--traces={_TRACES.value}: {getattr(error, 'strerror', None) or error}"
        )
    return traces, f"{len(traces)} traces of {_TRACES.value}, in {how}"


def main(argv: list[str]) -> None:
    """Runs the suites; where one fails, the exit code is 1."""
    del argv
    import rich.console  # these after the flags: JAX is slow to import

    from pr1_jax.bench import limits, shapes, suites
    from pr1_jax.model.backend import KERNELS

    _check_names(_SUITE, _SUITE.value, ("all", *suites.SUITES))
    _check_names(_SHAPE, [_SHAPE.value], tuple(shapes.SHAPES))
    _check_names(_KERNELS, [_KERNELS.value], KERNELS)
    traces, traces_from = _traces()
    folder, shape = _folder(), shapes.SHAPES[_SHAPE.value]
    bench = shapes.Bench(
        shape=shape,
        sizes=shapes.QUICK if _QUICK.value else shapes.Sizes(),
        repeats=_REPEATS.value,
        limits=limits.measure(shape.model, quick=_QUICK.value),
        traces=traces,
        traces_from=traces_from,
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
