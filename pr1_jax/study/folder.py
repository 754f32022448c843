"""Where a study and its runs are, what all of them share, and their commands."""

import dataclasses
import os
import pathlib

from pr1_jax.study import cells
from pr1_jax.study.cells import Cell
from pr1_jax.system import files

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study is, and what all of its runs share.

    Attributes:
      out: its folder. overrides: `field=value` of the config, behind all others.
      jobs: runs at a time, each on a CPU core of its own; 0 = one a core.
    """

    out: pathlib.Path
    seeds: tuple[int, ...] = tuple(range(cells.MANY))
    size: str = "embedded"
    overrides: tuple[str, ...] = ()
    jobs: int = 0

    @property
    def runs_at_a_time(self) -> int:
        """`jobs`, or its default."""
        return self.jobs or len(cpu_cores())

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """The seeds that a cell is run at."""
        return self.seeds[: cell.seeds]

    def workdir(self, name: str, seed: int) -> pathlib.Path:
        """The folder of a cell's run."""
        return self.out / "runs" / name / f"seed{seed}"

    def kept(self, seed: int) -> pathlib.Path:
        """The file that keeps what the runs of a seed came to: `outcomes`."""
        return self.out / "found" / f"seed{seed}.json"

    @property
    def kept_settings(self) -> pathlib.Path:
        """The file that keeps what they were made with."""
        return self.out / "found" / "settings.json"

    def command(
        self, cell: Cell, seed: int, workdir: pathlib.Path | None = None
    ) -> list[str]:
        """The command of a run, without the interpreter."""
        changed = cells.changes(cell, self.size, seed)
        if cell.start:
            changed["checkpoint.init"] = self.workdir(cell.start, seed)
        return [
            "-m",
            "pr1_jax.main",
            f"--config={cells.config_argument(cell, self.size)}",
            *(f"--config.{name}={value}" for name, value in changed.items()),
            *(f"--config.{override}" for override in self.overrides),
            f"--workdir={workdir or self.workdir(cell.name, seed)}",
        ]

    @property
    def dense(self) -> pathlib.Path:
        """The file that `pr1_jax.study.dense` writes."""
        return self.out / "found" / "dense.json"

    @property
    def dense_tokens(self) -> int:
        """The longest sequence that it compares."""
        return 512 if self.size == "smoke" else 2048

    def dense_command(self) -> list[str]:
        """The command that writes it, without the interpreter."""
        options = [f"--out={self.dense}", f"--max={self.dense_tokens}"]
        return ["-m", "pr1_jax.study.dense", *options]


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether a run has come to its end (`stages.curriculum.is_finished`)."""
    return bool(files.read_json(workdir / "summary.json", {}).get("finished"))


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether other runs can start from this one, as far as its folder tells."""
    return any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))


def cpu_cores() -> list[int | None]:
    """Those that this process may use; without numbers where they cannot be chosen."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)
