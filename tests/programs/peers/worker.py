"""What the workers of all peers share, and how they are called.

`python PEER_worker.py --weights FOLDER --work sampling|update|step --repeats N
--out FILE.json`, with the repository on PYTHONPATH. Each peer has an environment of its
own, so this imports nothing but the standard library and NumPy.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_IDS = 4000  # prompts are drawn below this id
GROUP_SIZE = 4


@dataclass(frozen=True)
class Run:
    """A process's work.

    Attributes:
      ends: clock at the end of each unit of work.
      setup_sec: not to be counted.
      params: as they are at the end, where the model does not hold them.
    """

    ends: list[float]
    checks: dict[str, Any]
    setup_sec: float = 0.0
    params: Any = None


def parser(text: str) -> argparse.ArgumentParser:
    """The flags of all peers; `text` is the worker's docstring."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--weights", type=Path, required=True)
    made.add_argument("--work", choices=("sampling", "update", "step"), required=True)
    made.add_argument("--repeats", type=int, required=True, help="after two units")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--prompts", type=int, default=32, help="sequences of a unit")
    made.add_argument("--prompt_tokens", type=int, default=64)
    made.add_argument("--new_tokens", type=int, default=128)
    made.add_argument("--micro_batch", type=int, help="sequences, whole groups; all")
    return made


def prompts(count: int, args: argparse.Namespace) -> np.ndarray:
    """Ids [count, prompt tokens], the same for each peer."""
    shape = (count, args.prompt_tokens)
    return np.random.default_rng(0).integers(0, PROMPT_IDS, size=shape)


def batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Ids of prompts and responses [B, T], and advantages [B], the same for each peer."""
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens + args.new_tokens)
    return rng.integers(0, PROMPT_IDS, size=shape), rng.normal(size=args.prompts)


def share_of_odd(ids: Sequence[int]) -> float:
    """The reward."""
    return float(np.mean(np.asarray(ids) % 2))


def sample(
    draw: Callable[[int], Iterable[Any]], vocab_size: int, args: argparse.Namespace
) -> Run:
    """Times `draw`, which returns the tokens of each response to a unit's prompts."""
    ends, outputs = [], []
    for unit in range(args.units):
        tokens = draw(unit)
        ends.append(time.perf_counter())
        outputs = [*outputs[-1:], np.stack([np.asarray(row) for row in tokens])]
    checks = {
        "tokens_shape": outputs[-1].shape,
        "tokens_below_vocab": bool((outputs[-1] < vocab_size).all()),
        "same_as_repeat_before": float(np.mean(outputs[0] == outputs[1])),
    }
    return Run(ends, checks)


def largest_change(before: Iterable[Any], after: Iterable[Any]) -> float:
    """Between arrays of the one and of the other."""
    pairs = zip(before, after, strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def main(
    peer: str,
    packages: Sequence[str],
    flags: argparse.ArgumentParser,
    load: Callable[[argparse.Namespace], tuple],
    works: Sequence[Callable[..., Run]],
    finish: Callable[..., dict[str, Any]],
) -> None:
    """Loads, does the work that the command line names, and writes what it took.

    Args:
      peer: whose worker this is. packages: whose versions are kept.
      load: load(args) -> what is passed on as `model` here.
      works: functions work(*model, args), named as on the command line.
      finish: finish(run, *model, args) -> checks that are made after all is measured.
    """
    args = flags.parse_args()
    args.micro_batch = args.micro_batch or args.prompts
    args.units = 2 + args.repeats
    if args.prompts % args.micro_batch or args.prompts % GROUP_SIZE:
        flags.error(f"--prompts={args.prompts}: not whole groups or micro-batches")
    model = load(args)
    load_sec, loaded = _since_process_start(), time.perf_counter()
    run = {work.__name__: work for work in works}[args.work](*model, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trained = args.prompt_tokens if args.work == "update" else 0
    result = {
        "peer": peer,
        "version": {name: metadata.version(name) for name in packages},
        "work": args.work,
        "tokens": args.prompts * (args.new_tokens + trained),
        "load_sec": load_sec,
        "first_sec": run.ends[0] - loaded - run.setup_sec,
        "second_sec": run.ends[1] - run.ends[0],
        "seconds": np.diff(run.ends[1:]).tolist(),
        "peak_rss_bytes": peak,
        "checks": run.checks | finish(run, *model, args),
    }
    args.out.write_text(json.dumps(result, indent=1))


def _since_process_start() -> float:
    """Seconds since the kernel started this process: imports are in it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start
