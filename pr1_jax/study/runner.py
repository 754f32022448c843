"""Runs cells, each as a process of `pr1_jax.main`, some at a time; goes on where it was.

A run is `OUT/runs/<cell>/seed<k>`, with what it said in `log.txt`. A finished one is left
alone, and a half-done one goes on from its newest checkpoint. Where a run fails it is
named, what starts from it is left out, and the rest goes on.

What a run came to is kept as it ends (`outcomes`), and a cell that is kept counts as
finished without its run; only where another has to start from it, it is run again.

The small model gains little from a second core (one takes 1.4 times the seconds of two a
step, and less to compile), so that its runs have one each: as many at a time as there are
cores, and the figures of a run depend neither on how many those are nor on what runs
beside it.
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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

from pr1_jax.study import cells, outcomes
from pr1_jax.study.cells import Cell
from pr1_jax.study.folder import (
    DENSE,
    ROOT,
    Study,
    cpu_cores,
    has_checkpoint,
    is_finished,
)
from pr1_jax.system import files

Run = tuple[Cell, int]  # with its seed
_POLL_SEC = 0.2


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return "python " + shlex.join(command)


def seconds(study: Study) -> dict[str, float]:
    """What runs that are finished or kept took, by `cell/seedK`."""
    kept = {
        f"{name}/seed{seed}": record["seconds"]
        for seed in study.seeds
        for name, record in outcomes.records(study, seed).items()
        if record["seconds"] is not None
    }
    here = _counted(study).items()
    return kept | {
        name: sec for name, sec in here if is_finished(study.out / "runs" / name)
    }


def _counted(study: Study) -> dict[str, float]:
    """What runs took here so far, by `cell/seedK`."""
    return files.read_json(study.out / "seconds.json", {})


def to_run(
    study: Study, chosen: Sequence[Cell], seed: int, needed: Collection[str] = ()
) -> set[str]:
    """Those of the chosen cells that have to be run at a seed.

    Args:
      chosen: in an order in which starts come first.
      needed: cells whose checkpoints are needed, as are those that these cells start
        from.

    Raises:
      ValueError: one of them is kept, of other settings.
    """
    found, needed = set(), {*needed}
    for cell in reversed(chosen):
        workdir = study.workdir(cell, seed)
        done = is_finished(workdir) or outcomes.kept(study, cell, seed) is not None
        if cell.name in needed:
            done = is_finished(workdir) and has_checkpoint(workdir)
        if not done:
            found.add(cell.name)
            needed.add(cells.start_of(cell, study.size))
    return found


def expected_minutes(study: Study, cell: Cell) -> float | None:
    """What a run takes: the mean of its other seeds, else `Cell.minutes`, scaled.

    The scale is what finished runs took against what was expected of them; None where
    none is, and the size is not the one that `Cell.minutes` is of.
    """
    took = [
        (cells.CELLS[name.partition("/")[0]], sec / 60)
        for name, sec in seconds(study).items()
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
        needed: Collection[str] = (),
        after_seed: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs cells, those of a seed before those of the next one.

        Args:
          chosen: in an order in which starts come first.
          dense: whether to compare attention with a dense mask, too; alone, since it
            is timed.
          needed: cells whose checkpoints are needed, though nothing chosen needs them.
        """
        outcomes.keep_finished(self.study, _counted(self.study))
        if dense:
            self._dense()
        waiting = [(cell, seed) for seed in self.study.seeds for cell in chosen]
        names = {
            _key(*run): f"[{number}/{len(waiting)}] {run[0].name} seed {run[1]}"
            for number, run in enumerate(waiting, 1)
        }
        todo = {
            f"{name}/seed{seed}"
            for seed in self.study.seeds
            for name in to_run(self.study, chosen, seed, needed)
        }
        running: list[Job] = []
        try:
            while waiting or running:
                ended = [job for job in running if job.process.poll() is not None]
                running = [job for job in running if job not in ended]
                for job in ended:
                    self._end(job)
                before = {seed for _, seed in waiting} | {job.seed for job in ended}
                waiting = self._start(waiting, running, names, todo)
                left = {seed for _, seed in waiting} | {job.seed for job in running}
                if before - left:
                    after_seed()
                if running:
                    time.sleep(_POLL_SEC)
        except BaseException:
            stop([job.process for job in running])
            for job in running:
                self._count_seconds(job)
            raise

    def _start(
        self,
        waiting: list[Run],
        running: list["Job"],
        names: Mapping[str, str],
        todo: Collection[str],
    ) -> list[Run]:
        """Starts what can be, and says what need not or cannot be; what is left.

        Args:
          waiting: runs, by cell and seed. running: is added to.
          todo: those that have to be run, by `cell/seedK`.
        """
        study, left = self.study, []
        for cell, seed in waiting:
            key, workdir = _key(cell, seed), study.workdir(cell, seed)
            start = cells.start_of(cell, study.size)
            begun = {_key(*run) for run in left} | {job.key for job in running}
            if key not in todo:
                self.say(f"{names[key]}: done before")
            elif f"{start}/seed{seed}" in begun:
                left.append((cell, seed))
            elif start and not is_finished(study.workdir(cells.CELLS[start], seed)):
                self.failed.append(key)
                self.say(
                    f"{names[key]}: left out, since {start} seed {seed} is not finished"
                )
            elif len(running) < study.runs_at_a_time:
                self.say(f"{names[key]}: {expected(expected_minutes(study, cell))} …")
                used = [job.core for job in running]
                cores = cpu_cores() if study.on_one_core else [None]
                core = min(cores, key=used.count)  # the first of those least used
                if is_finished(workdir):  # and has no checkpoint any more
                    _set_aside(workdir)
                process = start_process(
                    study.command(cell, seed), workdir / "log.txt", study.out, core
                )
                running.append(
                    Job(names[key], cell, seed, workdir, core, process, outcomes.made())
                )
            else:
                left.append((cell, seed))
        return left

    def _dense(self) -> None:
        if outcomes.of_dense(self.study):
            self.say("dense: done before")
            return
        folder, began = self.study.dense.parent, time.monotonic()
        code = run_process(
            self.study.dense_command(), folder / "log.txt", self.study.out
        )
        self._say_end(DENSE, DENSE, folder, code, time.monotonic() - began)
        if not code:
            outcomes.keep_dense(self.study)

    def _end(self, job: "Job") -> None:
        """Says what came of a process, counts its time, and keeps its outcome."""
        took = self._count_seconds(job)
        code = job.process.returncode or int(not is_finished(job.workdir))
        self._say_end(job.key, job.name, job.workdir, code, job.seconds)
        if code:
            return
        differing = outcomes.keep(
            self.study, job.cell, job.seed, seconds=took, made=job.made
        )
        if differing:
            listed = ", ".join(differing)
            self.say(f"{job.name}: not what was kept, and is kept instead: {listed}")

    def _count_seconds(self, job: "Job") -> float:
        """Of a run that was cut off, and goes on later, all parts count; their sum."""
        done = _counted(self.study)
        done[job.key] = round(done.get(job.key, 0.0) + job.seconds, 1)
        files.write_json(self.study.out / "seconds.json", done)
        return done[job.key]

    def _say_end(
        self, key: str, name: str, folder: pathlib.Path, code: int, took: float
    ) -> None:
        if code:
            self.failed.append(key)
            log = (folder / "log.txt").read_text(errors="replace").splitlines()
            last = next((line for line in reversed(log) if line.strip()), "")
            self.say(f"{name}: failed with exit code {code}: {last}")
        else:
            self.say(f"{name}: {took / 60:.1f} min{outcome(folder)}")


@dataclasses.dataclass
class Job:
    """A process that runs a cell at a seed.

    Attributes:
      core: the CPU core that it has, if one. made: commit and versions that it is of.
    """

    name: str
    cell: Cell
    seed: int
    workdir: pathlib.Path
    core: int | None
    process: subprocess.Popen
    made: Mapping[str, str]
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def key(self) -> str:
        """Its cell and seed, as in `seconds.json`."""
        return _key(self.cell, self.seed)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began


def _key(cell: Cell, seed: int) -> str:
    return f"{cell.name}/seed{seed}"


def _set_aside(workdir: pathlib.Path) -> None:
    """Makes room for another run, and leaves this one beside it."""
    aside = workdir.with_name(f"{workdir.name}_without_checkpoint")
    shutil.rmtree(aside, ignore_errors=True)
    workdir.rename(aside)


def outcome(workdir: pathlib.Path) -> str:
    """What a run came to, in a few words."""
    found = files.read_json(workdir / "summary.json", {}).get("evaluations", {})
    for evaluation in reversed(found.values()):
        accuracy = 100 * evaluation["eval/accuracy"]
        ratio = 100 * evaluation["eval/parallel_ratio"]
        return f", accuracy {accuracy:.1f} %, with a block {ratio:.1f} %"
    return ""


def start_process(
    command: Sequence[str],
    log: pathlib.Path,
    out: pathlib.Path,
    core: int | None = None,
) -> subprocess.Popen:
    """Starts a Python command from the root of the project.

    Compiled programs are shared through JAX's cache in `out`, if none is set.

    Args:
      log: what it says is added to it.
      core: the only one that it may use, on the CPU alone if no platform is set.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), **os.environ}
    own = cpu_cores()
    if core is not None:
        environment.setdefault("JAX_PLATFORMS", "cpu")
        os.sched_setaffinity(0, {core})  # is inherited
    try:
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process alone
            )
    finally:
        if core is not None:
            os.sched_setaffinity(0, own)


def run_process(
    command: Sequence[str],
    log: pathlib.Path,
    out: pathlib.Path,
    core: int | None = None,
) -> int:
    """Starts a process and waits for its end; its exit code.

    Where this process is told to stop, that one is asked to save, and waited for.
    """
    process = start_process(command, log, out, core)
    try:
        return process.wait()
    except BaseException:
        stop([process])
        raise


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Asks all to save and end, and waits for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def stop_by_signal() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, its run saved."""

    def stop(*_) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def again(study: Study, cell: Cell, seed: int, say: Callable[[str], None]) -> bool:
    """Runs a finished cell once more, elsewhere; whether all came out the same.

    Compared is what is kept of a run, to the last bit: verdicts and lengths of all
    responses to held-out problems, and figures of all RL steps, the gap of log-probs
    among them. What the cell starts from is run before where it has no checkpoint.
    Where what is kept was made on another processor, or with other versions, the cell
    and what it starts from are run anew in `OUT/again`, and the cell once more.

    Raises:
      ValueError: the cell is not finished, or kept of other settings.
    """
    first = outcomes.read(study, cell, seed)
    if first is None:
        folder = study.workdir(cell, seed)
        raise ValueError(
            f"--again={cell.name}: seed {seed} is not finished in {folder}"
        )
    chosen = cells.with_starts([cell.name], study.size)
    kept = not is_finished(study.workdir(cell, seed))
    if kept and (other := outcomes.made_elsewhere(study, cell, seed)):
        say(f"{cell.name} seed {seed} was kept of {'; '.join(other)}: it is run twice")
        fresh = dataclasses.replace(study, out=study.out / "again", seeds=(seed,))
        running = Runner(fresh, say)
        running.run(chosen, needed=(cell.name,))
        return not running.failed and again(fresh, cell, seed, say)
    starts, needed = chosen[:-1], (cells.start_of(cell, study.size),)
    if to_run(study, starts, seed, needed):
        running = Runner(dataclasses.replace(study, seeds=(seed,)), say)
        running.run(starts, needed=needed)
        if running.failed:
            return False
    workdir = study.out / "again" / cell.name / f"seed{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    core = cpu_cores()[0] if study.on_one_core else None
    command = study.command(cell, seed, workdir)
    code = run_process(command, workdir / "log.txt", study.out, core)
    if code:
        say(f"{cell.name} seed {seed}: failed with exit code {code}")
        return False
    differing = outcomes.differences(first, outcomes.of_run(workdir, cell))
    same = ", ".join(differing) + " differ" if differing else "the same to the last bit"
    say(f"{cell.name} seed {seed}{outcome(workdir)}: {same}")
    return not differing
