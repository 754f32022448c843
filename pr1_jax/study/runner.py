"""Runs cells one after another, each as a process of `pr1_jax.main`; goes on where it was.

A run is `OUT/runs/<cell>/seed<k>`, with what it said in `log.txt`. A finished one is left
alone, and a half-done one goes on from its newest checkpoint. Where a run fails it is
named, what starts from it is left out, and the rest goes on.
"""

import dataclasses
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from pr1_jax import metrics
from pr1_jax.study import cells
from pr1_jax.study.cells import Cell

ROOT = pathlib.Path(__file__).resolve().parents[2]
DENSE = "dense"  # a run without seeds: `pr1_jax.study.dense`


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study is, and what all of its runs share.

    Attributes:
      out: its folder. overrides: `field=value` of the config, behind all others.
    """

    out: pathlib.Path
    seeds: tuple[int, ...] = (0, 1, 2)
    size: str = "embedded"
    overrides: tuple[str, ...] = ()

    def workdir(self, cell: Cell, seed: int) -> pathlib.Path:
        """The folder of a run."""
        return self.out / "runs" / cell.name / f"seed{seed}"

    def command(
        self, cell: Cell, seed: int, workdir: pathlib.Path | None = None
    ) -> list[str]:
        """The command of a run, without the interpreter."""
        changed = cells.changes(cell, self.size, seed)
        if start := cells.start_of(cell, self.size):
            changed["checkpoint.init"] = self.workdir(cells.CELLS[start], seed)
        return [
            *("-m", "pr1_jax.main"),
            f"--config={cells.config_argument(cell, self.size)}",
            *(f"--config.{name}={value}" for name, value in changed.items()),
            *(f"--config.{override}" for override in self.overrides),
            f"--workdir={workdir or self.workdir(cell, seed)}",
        ]

    @property
    def dense(self) -> pathlib.Path:
        """The file that `pr1_jax.study.dense` writes."""
        return self.out / "runs" / DENSE / "dense.json"

    def dense_command(self) -> list[str]:
        """The command that writes it, without the interpreter."""
        longest = 512 if self.size == "smoke" else 2048
        return ["-m", "pr1_jax.study.dense", f"--out={self.dense}", f"--max={longest}"]


def is_finished(workdir: pathlib.Path) -> bool:
    """As `curriculum.is_finished`, which would bring all stages with it."""
    return bool(metrics.read_json(workdir / "summary.json", {}).get("finished"))


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return "python " + shlex.join(command)


def seconds(study: Study) -> dict[str, float]:
    """What runs took, by `cell/seedK`."""
    return metrics.read_json(study.out / "seconds.json", {})


def expected_minutes(study: Study, cell: Cell) -> float | None:
    """What a run takes: the mean of its other seeds, else `Cell.minutes`, scaled.

    The scale is what finished runs took against what was expected of them; None where
    none is, and the size is not the one that `Cell.minutes` is of.
    """
    took = [
        (cells.CELLS[name.partition("/")[0]], sec / 60)
        for name, sec in seconds(study).items()
        if is_finished(study.out / "runs" / name)
    ]
    if own := [minutes for other, minutes in took if other is cell]:
        return sum(own) / len(own)
    if took:
        told = sum(other.minutes for other, _ in took)
        return cell.minutes * sum(minutes for _, minutes in took) / told
    return cell.minutes if study.size == "embedded" else None


def expected(minutes: float | None) -> str:
    """Minutes as text."""
    return "an unknown time" if minutes is None else f"about {minutes:.0f} min"


@dataclasses.dataclass
class Runner:
    """Runs what is asked of it; `failed` names what did not come to its end."""

    study: Study
    say: Callable[[str], None] = print
    failed: list[str] = dataclasses.field(default_factory=list)

    def run(
        self,
        chosen: Sequence[Cell],
        *,
        dense: bool = False,
        after_seed: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs cells, all of a seed before the next one.

        Args:
          chosen: in an order in which starts come first.
          dense: whether to compare attention with a dense mask, too.
        """
        if dense:
            self._dense()
        number, count = 0, len(chosen) * len(self.study.seeds)
        for seed in self.study.seeds:
            for cell in chosen:
                number += 1
                self._run(cell, seed, f"[{number}/{count}] {cell.name} seed {seed}")
            after_seed()

    def _dense(self) -> None:
        if self.study.dense.exists():
            self.say("dense: done before")
        else:
            self._process(DENSE, self.study.dense_command(), self.study.dense.parent)

    def _run(self, cell: Cell, seed: int, name: str) -> None:
        study, key = self.study, f"{cell.name}/seed{seed}"
        workdir = study.workdir(cell, seed)
        start = cells.start_of(cell, study.size)
        if is_finished(workdir):
            self.say(f"{name}: done before")
        elif start and not is_finished(study.workdir(cells.CELLS[start], seed)):
            self.failed.append(key)
            self.say(f"{name}: left out, since {start} seed {seed} is not finished")
        else:
            self.say(f"{name}: {expected(expected_minutes(study, cell))} …")
            began = time.monotonic()
            try:
                self._process(key, study.command(cell, seed), workdir, name)
            finally:  # of one that was cut off, and goes on later, all parts count
                done = seconds(study)
                done[key] = round(done.get(key, 0.0) + time.monotonic() - began, 1)
                metrics.write_json(study.out / "seconds.json", done)

    def _process(
        self, key: str, command: Sequence[str], workdir: pathlib.Path, name: str = ""
    ) -> None:
        """Runs a command to its end, and says what came of it."""
        began = time.monotonic()
        code = run_process(command, workdir / "log.txt", self.study.out)
        took = time.monotonic() - began
        workdir_is_fine = key == DENSE or is_finished(workdir)
        if code or not workdir_is_fine:
            self.failed.append(key)
            log = (workdir / "log.txt").read_text(errors="replace").splitlines()
            last = next((line for line in reversed(log) if line.strip()), "")
            self.say(f"{name or key}: failed with exit code {code}: {last}")
        else:
            self.say(f"{name or key}: {took / 60:.1f} min{outcome(workdir)}")


def outcome(workdir: pathlib.Path) -> str:
    """What a run came to, in a few words."""
    found = metrics.read_json(workdir / "summary.json", {}).get("evaluations", {})
    for evaluation in reversed(found.values()):
        accuracy = 100 * evaluation["eval/accuracy"]
        ratio = 100 * evaluation["eval/parallel_ratio"]
        return f", accuracy {accuracy:.1f} %, with a block {ratio:.1f} %"
    return ""


def run_process(command: Sequence[str], log: pathlib.Path, out: pathlib.Path) -> int:
    """Runs a Python command from the root of the project; its exit code.

    Where this process is told to stop, that one is asked to save, and waited for.
    Compiled programs are shared through JAX's cache in `out`, if none is set.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), **os.environ}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process alone
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def stop_by_signal() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, its run saved."""

    def stop(*_) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def again(study: Study, cell: Cell, seed: int, say: Callable[[str], None]) -> bool:
    """Runs a finished cell once more, elsewhere; whether all came out the same.

    Compared are the figures of all steps and evaluations, but for times, and every
    response to a held-out problem.

    Raises:
      ValueError: the cell is not finished.
    """
    first, second = study.workdir(cell, seed), study.out / "again" / cell.name
    second = second / f"seed{seed}"
    if not is_finished(first):
        raise ValueError(f"--again={cell.name}: seed {seed} is not finished in {first}")
    shutil.rmtree(second, ignore_errors=True)
    command = study.command(cell, seed, second)
    code = run_process(command, second / "log.txt", study.out)
    if code:
        say(f"{cell.name} seed {seed}: failed with exit code {code}")
        return False
    differing = differences(first, second)
    same = ", ".join(differing) + " differ" if differing else "the same to the last bit"
    say(f"{cell.name} seed {seed}{outcome(second)}: {same}")
    return not differing


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """Files of two runs that differ in more than times."""

    def figures(workdir: pathlib.Path) -> list[dict]:
        return [
            {
                k: x
                for k, x in line.items()
                if not k.startswith(("perf/", "eval/seconds"))
            }
            for line in metrics.read_metrics(workdir / "metrics.jsonl")
        ]

    found = [] if figures(first) == figures(second) else ["metrics.jsonl"]
    for path in sorted((first / "rollouts").glob("eval_*.jsonl")):
        other = second / "rollouts" / path.name
        if not other.exists() or path.read_bytes() != other.read_bytes():
            found.append(path.name)
    return found
