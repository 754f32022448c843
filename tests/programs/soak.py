"""The kill test: `bash tests/programs/soak.sh`.

A job is started, killed after a random time, and started again, until it has finished;
then the next job begins, until there were enough kills. One kill in five is SIGTERM,
which must end the job with exit code 0. Every finished job must hold, bit for bit, the
metrics (but times), rollouts and parameters of a job that was left alone.
"""

import argparse
import collections
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from pr1_jax.system import files, tables
from tests.helpers import compiling

ROOT = pathlib.Path(__file__).parents[2]
JOB = (
    "--config=configs/rl_alternating.py:smoke",
    "--config.model.num_layers=1",
    "--config.model.length_buckets=()",
    "--config.data.rl=embedded:easy",
    "--config.data.eval=embedded:easy",
    "--config.sft.steps=8",
    "--config.rl.steps=6",
    "--config.eval.banned=False",
    "--config.checkpoint.every_steps=1",
)


def start(workdir: pathlib.Path, cache: pathlib.Path, log) -> subprocess.Popen:
    """Starts the job, or goes on with it, in `workdir`."""
    environment = compiling.on_one_device() | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pr1_jax.main", f"--workdir={workdir}", *JOB],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
    )


def figures(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on speed."""
    return [
        {k: v for k, v in line.items() if not k.startswith("perf/")}
        for line in files.read_json_lines(workdir / "metrics.jsonl")
    ]


def parameters(workdir: pathlib.Path) -> dict[str, bytes]:
    """The bytes of all arrays of the newest checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    newest = max((workdir / "checkpoints").iterdir())
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(newest / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in leaves}


def differences(workdir: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """What a job that was killed left otherwise than one that was not."""
    differing = []
    mine, theirs = figures(workdir), figures(expected)
    if mine != theirs:
        pairs = [(a["stage"], a["step"]) for a, b in zip(mine, theirs) if a != b]
        differing.append(f"metrics: {len(mine)} lines, {len(theirs)} expected, {pairs}")
    names = lambda path: sorted(x.name for x in path.iterdir())
    for folder in ("rollouts", "checkpoints"):
        if names(workdir / folder) != names(expected / folder):
            differing.append(f"{folder}: {names(workdir / folder)}")
    for path in sorted((expected / "rollouts").iterdir()):
        other = workdir / "rollouts" / path.name
        if not other.exists() or other.read_bytes() != path.read_bytes():
            differing.append(f"rollouts/{path.name} differs")
    ours, others = parameters(workdir), parameters(expected)
    differing += [f"state{k} differs" for k in others if ours.get(k) != others[k]]
    return differing


def last_step(workdir: pathlib.Path) -> str:
    """How far a job had come when it was killed."""
    lines = figures(workdir)
    return (
        f"after {lines[-1]['stage']} {lines[-1]['step']}" if lines else "at its start"
    )


class Soak:
    """Jobs that are killed, and what was seen of them.

    Attributes:
      kills: how many, by the signal's name.
      rows: of the table, one a kill.
      wrong: what should not have been.
    """

    def __init__(self, out: pathlib.Path, seed: int):
        self.out, self.rng = out, random.Random(seed)
        self.kills, self.rows, self.wrong = collections.Counter(), [], []

    def alone(self) -> float:
        """Runs a job twice; seconds of the second, which finds the cache filled."""
        for name in ("first", "alone"):
            began = time.monotonic()
            with (self.out / f"{name}.log").open("w") as log:
                if start(self.out / name, self.out / "compiled", log).wait() != 0:
                    sys.exit(f"the job fails by itself: see {log.name}")
        self.wrong += differences(self.out / "first", self.out / "alone")
        return time.monotonic() - began

    def job(self, number: int, whole: float, most_kills: int) -> int:
        """Runs a job to its end, killed on the way; how often."""
        workdir, killed = self.out / f"job_{number}", 0
        with (self.out / f"job_{number}.log").open("w") as log:
            while True:
                process = start(workdir, self.out / "compiled", log)
                # Late enough, on average, that a job comes forward.
                limit = self.rng.uniform(0.2, 1.0) * whole
                enough = self.kills.total() >= most_kills
                try:
                    code = process.wait(None if enough else limit)
                except subprocess.TimeoutExpired:
                    code = self.kill(process, number, limit)
                    killed += 1
                    if code == 0 and is_finished(workdir):
                        return killed
                else:
                    if code != 0:
                        self.wrong.append(f"job {number}: exit code {code}")
                    return killed

    def kill(self, process: subprocess.Popen, number: int, limit: float) -> int:
        """Kills a job's process, gently or not; its exit code."""
        gently = self.rng.random() < 0.2
        name = "SIGTERM" if gently else "SIGKILL"
        process.send_signal(getattr(signal, name))
        code = process.wait()
        if gently and code not in (0, -signal.SIGTERM):
            self.wrong.append(f"job {number}: SIGTERM gave exit code {code}")
        self.kills[name] += 1
        row = {"kill": self.kills.total(), "job": number, "signal": name}
        row |= {"after s": limit, "where": last_step(self.out / f"job_{number}")}
        self.rows.append(row)
        print(*row.values(), flush=True)
        return code


def main() -> None:
    """Kills jobs as often as asked; the exit code is 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/soak"))
    args = parser.parse_args()
    out = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    soak, jobs, differing = Soak(out, args.seed), 0, []
    whole = soak.alone()
    print(f"a job alone takes {whole:.0f} s; twice alike: {not soak.wrong}", flush=True)
    while soak.kills.total() < args.kills:
        killed = soak.job(jobs, whole, args.kills)
        left = differences(out / f"job_{jobs}", out / "alone")
        differing += [f"job {jobs}, killed {killed} times: {text}" for text in left]
        print(f"job {jobs}: {killed} kills, same as alone: {not left}", flush=True)
        jobs += 1
    title = (
        f"{soak.kills.total()} kills ({dict(soak.kills)}) of {jobs} jobs of "
        f"{whole:.0f} s; jobs that differ from one left alone: {len(differing)}"
    )
    text = tables.Table(
        title, soak.rows, "\n".join([*soak.wrong, *differing])
    ).markdown()
    (out / "table.md").write_text(text)
    print(text)
    sys.exit(bool(soak.wrong or differing))


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether a job has come to its end."""
    return bool(files.read_json(workdir / "summary.json", {}).get("finished"))


if __name__ == "__main__":
    main()
