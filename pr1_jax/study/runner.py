"""Runs cells, each as a process of `pr1_jax.main`, some at a time; goes on where it was.

A run is `OUT/runs/<cell>/seed<k>`, with what it said in `log.txt`. A finished one is left
alone, and a half-done one goes on from its newest checkpoint. Where a run fails it is
named, what starts from it is left out, and the rest goes on.

First come the cells that verdicts hang on, and the first seeds of everything before the
others (`rounds`). What a run came to is kept as it ends (`outcomes`), and a cell that is
kept counts as finished without its run; only where another has to start from it, it is
run again. Of a finished run that none starts from the checkpoint is removed.

The small model gains little from a second core (one takes 1.4 times the seconds of two a
step, and less to compile), so that runs have one each: as many at a time as there are
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

from pr1_jax.study import cells, outcomes
from pr1_jax.study.cells import Cell
from pr1_jax.study.folder import ROOT, Study, cpu_cores, has_checkpoint, is_finished
from pr1_jax.system import files

_POLL_SEC = 0.2
_WITH_CHECKPOINT = {cell.start for cell in cells.CELLS.values()}  # others start from it

Key = tuple[str, int]  # a cell's name, and a seed


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return "python " + shlex.join(command)


def seconds(study: Study) -> dict[Key, float]:
    """What the runs that are kept took."""
    return {
        (name, seed): sec
        for seed in study.seeds
        for name, sec in outcomes.seconds(study, seed).items()
    }


def rounds(study: Study, chosen: Sequence[Cell]) -> list[list[tuple[Cell, int]]]:
    """Runs in the order in which they are begun: rounds of a seed each.

    The first `cells.FEW` seeds of cells that have more of them, then of the others, then
    the rest.
    """
    deciding = [cell for cell in chosen if cell.seeds > cells.FEW]
    others = [cell for cell in chosen if cell.seeds <= cells.FEW]
    few, later = study.seeds[: cells.FEW], study.seeds[cells.FEW : cells.MANY]
    order = [(deciding, few), (others, few), (deciding, later)]
    found = [[(c, seed) for c in group] for group, seeds in order for seed in seeds]
    return [runs for runs in found if runs]


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
    todo, needed = set(), {*needed}
    for cell in reversed(chosen):
        workdir = study.workdir(cell.name, seed)
        done = is_finished(workdir) or outcomes.kept(study, cell, seed) is not None
        if cell.name in needed:
            done = is_finished(workdir) and has_checkpoint(workdir)
        if not done and seed in study.seeds_of(cell):
            todo.add(cell.name)
            needed.add(cell.start)
    return todo


def expected_minutes(
    study: Study, cell: Cell, took: Mapping[Key, float]
) -> float | None:
    """What a run takes: the mean of its other seeds, else `Cell.minutes`, scaled.

    The scale is what finished runs took against what was expected of them; None where
    none is, and the size is not the one that `Cell.minutes` is of.

    Args:
      took: `seconds` of the study.
    """
    own = [sec for (name, _), sec in took.items() if name == cell.name]
    if own:
        return sum(own) / len(own) / 60
    if took:
        told = sum(cells.CELLS[name].minutes for name, _ in took)
        return cell.minutes * sum(took.values()) / 60 / told
    return cell.minutes if study.size == "embedded" else None


def expected(minutes: float | None) -> str:
    """Minutes as text."""
    return "an unknown time" if minutes is None else f"about {minutes:.1f} min"


@dataclasses.dataclass
class Job:
    """A run of a cell at a seed: first it waits, then it is a process.

    Attributes:
      name: as it is shown. round: number of its round.
      core: the CPU core that it has. made: commit and versions that it is of.
    """

    name: str
    cell: Cell
    seed: int
    round: int
    core: int | None = None
    process: subprocess.Popen | None = None
    made: Mapping[str, str] = dataclasses.field(default_factory=dict)
    began: float = 0.0

    @property
    def key(self) -> Key:
        """Its cell and seed."""
        return self.cell.name, self.seed

    @property
    def start(self) -> Key:
        """The run that it starts from."""
        return self.cell.start, self.seed


@dataclasses.dataclass
class Runner:
    """Runs cells as processes; `failed` names those that did not finish."""

    study: Study
    say: Callable[[str], None] = print
    failed: list[str] = dataclasses.field(default_factory=list)

    def run(
        self,
        chosen: Sequence[Cell],
        *,
        dense: bool = False,
        needed: Collection[str] = (),
        after_round: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs cells at the seeds that they have, one of `rounds` after another.

        Args:
          chosen: in an order in which starts come first.
          dense: whether to compare attention with a dense mask, too; alone, since it
            is timed.
          needed: cells whose checkpoints are needed, though nothing chosen needs them.
        """
        study, running = self.study, []
        outcomes.keep_finished(study)
        if dense:
            self._dense()
        waiting = [
            Job(f"{cell.name} seed {seed}", cell, seed, number)
            for number, of_round in enumerate(rounds(study, chosen))
            for cell, seed in of_round
        ]
        for i, job in enumerate(waiting, 1):
            job.name = f"[{i}/{len(waiting)}] {job.name}"
        todo = {
            (name, seed)
            for seed in study.seeds
            for name in to_run(study, chosen, seed, needed)
        }
        try:
            while waiting or running:
                before = {job.round for job in [*waiting, *running]}
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    self._end(job)
                waiting = self._start(waiting, running, todo)
                if before - {job.round for job in [*waiting, *running]}:
                    after_round()
                if running:
                    time.sleep(_POLL_SEC)
        except BaseException:
            stop([job.process for job in running])
            raise

    def _start(
        self, waiting: Sequence[Job], running: list[Job], todo: Collection[Key]
    ) -> list[Job]:
        """Starts what can be, and says what need not or cannot be; what is left.

        Args:
          running: is added to. todo: the jobs that have to be run.
        """
        study, left = self.study, []
        for job in waiting:
            workdir = study.workdir(*job.key)
            if job.key not in todo:
                self.say(f"{job.name}: done before")
            elif job.start in {other.key for other in [*left, *running]}:
                left.append(job)
            elif job.cell.start and not is_finished(study.workdir(*job.start)):
                self.failed.append("/seed".join(map(str, job.key)))
                why = f"since {job.cell.start} seed {job.seed} is not finished"
                self.say(f"{job.name}: left out, {why}")
            elif len(running) < study.runs_at_a_time:
                minutes = expected_minutes(study, job.cell, seconds(study))
                self.say(f"{job.name}: {expected(minutes)} …")
                used = [other.core for other in running]
                # The first of those least used.
                job.core = min(cpu_cores(), key=used.count)
                job.made, job.began = outcomes.made(), time.monotonic()
                command = study.command(job.cell, job.seed)
                log = workdir / "log.txt"
                job.process = start_process(command, log, study.out, job.core)
                running.append(job)
            else:
                left.append(job)
        return left

    def _dense(self) -> None:
        study = self.study
        if outcomes.of_dense(study):
            self.say("dense: done before")
            return
        folder, began = study.out / "runs" / "dense", time.monotonic()
        code = run_process(study.dense_command(), folder / "log.txt", study.out)
        self._say_end("dense", "dense", folder, code, time.monotonic() - began)

    def _end(self, job: Job) -> None:
        """Says what came of a process, and keeps its outcome."""
        study, took = self.study, time.monotonic() - job.began
        workdir = study.workdir(*job.key)
        code = job.process.returncode or int(not is_finished(workdir))
        key = "/seed".join(map(str, job.key))
        self._say_end(key, job.name, workdir, code, took)
        if code:
            return
        given = {"seconds": round(took, 1), "made": job.made}
        if differing := outcomes.keep(study, job.cell, job.seed, **given):
            listed = ", ".join(differing)
            self.say(f"{job.name}: not what was kept, and is kept instead: {listed}")
        if job.cell.name not in _WITH_CHECKPOINT:
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)

    def _say_end(
        self, key: str, name: str, folder: pathlib.Path, code: int, took: float
    ) -> None:
        if not code:
            self.say(f"{name}: {took / 60:.1f} min{_in_words(folder)}")
            return
        self.failed.append(key)
        log = (folder / "log.txt").read_text(errors="replace").splitlines()
        last = next((line for line in reversed(log) if line.strip()), "")
        self.say(f"{name}: failed with exit code {code}: {last}")


def _in_words(workdir: pathlib.Path) -> str:
    """What a run came to, in a few words."""
    evaluations = files.read_json(workdir / "summary.json", {}).get("evaluations", {})
    if not evaluations:
        return ""
    *_, last = evaluations.values()
    accuracy, ratio = (100 * last[f"eval/{n}"] for n in ("accuracy", "parallel_ratio"))
    return f", accuracy {accuracy:.1f} %, with a block {ratio:.1f} %"


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
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def again(study: Study, cell: Cell, seed: int, say: Callable[[str], None]) -> bool:
    """Runs a finished cell once more, elsewhere; whether all came out the same.

    Compared to the last bit, by their digests: all responses to held-out problems, and
    the metrics of all steps but times. What the cell starts from is run before where it
    has no checkpoint. Where what is kept was made on another processor, or with other
    versions, the cell and what it starts from are run anew in `OUT/again`, and the cell
    once more.

    Raises:
      ValueError: the cell is not finished, or kept of other settings.
    """
    first, fresh = outcomes.read(study, cell, seed), study.out / "again"
    if first is None:
        folder = study.workdir(cell.name, seed)
        raise ValueError(
            f"--again={cell.name}: seed {seed} is not finished in {folder}"
        )
    *starts, _ = chosen = cells.with_starts([cell.name])
    study = dataclasses.replace(study, seeds=(seed,))
    running = Runner(study, say)
    kept = not is_finished(study.workdir(cell.name, seed))
    if kept and (other := outcomes.made_elsewhere(study, cell, seed)):
        say(f"{cell.name} seed {seed} was kept of {'; '.join(other)}: it is run twice")
        running.study = study = dataclasses.replace(study, out=fresh)
        running.run(chosen, needed=(cell.name,))
        first = outcomes.read(study, cell, seed)
    elif to_run(study, starts, seed, (cell.start,)):
        running.run(starts, needed=(cell.start,))
    if running.failed:
        return False
    workdir = study.out / "again" / cell.name / f"seed{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    command = study.command(cell, seed, workdir)
    code = run_process(command, workdir / "log.txt", study.out, cpu_cores()[0])
    if code:
        say(f"{cell.name} seed {seed}: failed with exit code {code}")
        return False
    differing = outcomes.differences(first, outcomes.of_run(workdir, cell))
    same = ", ".join(differing) + " differ" if differing else "the same to the last bit"
    say(f"{cell.name} seed {seed}{_in_words(workdir)}: {same}")
    return not differing
