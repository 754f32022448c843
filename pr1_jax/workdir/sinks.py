"""Figures to W&B or trackio as well, beside the files (`metrics.sinks`).

Nothing depends on them. Neither package is needed unless it is named, none asks for an
account, and what goes wrong in one is logged once and ends that sink alone. W&B writes
into the workdir unless `WANDB_API_KEY` is set.

A figure keeps its name; its step is the number of its line in `metrics.jsonl`, and
`stage/NAME` is the step inside stage NAME, for those who want another axis. A line is
noted in `sinks.json` before it is handed over, so that a run that is killed and goes on
is one run there, with no line twice. What the package had not written when it was killed
is missing there; `metrics.jsonl` has it.
"""

import contextlib
import importlib.util
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from pr1_jax.system import files

NAMES = ("wandb", "trackio")
_PROJECT = "pr1_jax"


def check(names: Sequence[str]) -> None:
    """Raises ValueError unless all sinks are known and their packages installed."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"metrics.sinks={names!r} may hold {NAMES}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # or a mere folder of that name
            raise ValueError(
                f"metrics.sinks={names!r}: {name} is not installed: pip install {name}"
            )


def open_all(
    names: Sequence[str],
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    enabled: bool = True,
) -> list["Sink"]:
    """Opens the sinks of a run; none on processes that write nothing."""
    return [Sink(name, workdir, config) for name in names] if enabled else []


class Sink:
    """A run in one of the packages; after its first failure it does nothing."""

    def __init__(
        self, name: str, workdir: str | os.PathLike[str], config: Mapping[str, Any]
    ):
        self._name = name
        self._path = pathlib.Path(workdir) / "sinks.json"
        self._run: Any = None
        start = {"wandb": _start_wandb, "trackio": _start_trackio}[name]
        with self._guarded():
            self._state = _read_state(self._path, name)
            self._run = start(pathlib.Path(workdir), self._state["id"], config)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the sink, and nothing else."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (packages raise anything)
            self._run = None
            logging.warning(
                "metrics.sinks: %s failed and gets no more figures (%s: %s); the run "
                "goes on, and metrics.jsonl has them all",
                self._name,
                type(error).__name__,
                (str(error).strip() or "no reason given").splitlines()[0][:300],
            )

    def write(
        self, line: int, stage: str, step: int, values: Mapping[str, float]
    ) -> None:
        """Hands over one line of figures, unless that line was handed over before.

        Args:
          line: its number in `metrics.jsonl`, from 0.
        """
        if self._run is None or line <= self._state["line"]:
            return
        finite = {name: x for name, x in values.items() if math.isfinite(x)}
        with self._guarded():
            self._state["line"] = line
            states = files.read_json(self._path, {})
            files.write_json(self._path, {**states, self._name: self._state})
            self._run.log({**finite, f"stage/{stage}": step}, step=line)

    def close(self) -> None:
        """Ends the run in the package, which may go on later."""
        if self._run is not None:
            with self._guarded():
                self._run.finish()
        self._run = None


def _read_state(path: pathlib.Path, name: str) -> dict[str, Any]:
    """The run's id in a package, a new one at first, and the last line it was given."""
    states = files.read_json(path, {})
    if name not in states:
        states[name] = {"id": secrets.token_hex(4), "line": -1}
        files.write_json(path, states)
    return dict(states[name])


def _start_wandb(workdir: pathlib.Path, run_id: str, config: Mapping[str, Any]) -> Any:
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "disabled" and not os.environ.get("WANDB_API_KEY"):
        mode = "offline"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=os.environ.get("WANDB_NAME", workdir.name),
        id=run_id,
        resume="allow",
        dir=str(workdir),
        config=files.plain(config),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    )
    if mode == "offline":
        logging.info(
            "wandb: offline (with WANDB_API_KEY it sends figures at once); later "
            "`wandb sync %s/offline-run-*` sends them",
            workdir / "wandb",
        )
    return run


def _start_trackio(
    workdir: pathlib.Path, run_id: str, config: Mapping[str, Any]
) -> Any:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
    run = trackio.init(
        project=project,
        name=f"{workdir.name}-{run_id}",  # which is all that tells runs apart there
        resume="allow",
        config=files.plain(config),
        embed=False,
    )
    logging.info("trackio: `trackio show --project %s` draws them", project)
    return run
