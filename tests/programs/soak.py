"""The kill test: see `soak.sh`.

A job is started, killed after a random time, and started again, until it has finished;
then the next job begins, until there were enough kills. One kill in five is SIGTERM,
which must end the job with exit code 0. Every finished job must hold, bit for bit, the
metrics (but times), rollouts and parameters of a job that was left alone.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

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
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        for line in lines
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
    found = []
    mine, theirs = figures(workdir), figures(expected)
    if mine != theirs:
        pairs = [(a["stage"], a["step"]) for a, b in zip(mine, theirs) if a != b]
        found.append(f"metrics: {len(mine)} lines, {len(theirs)} expected, {pairs}")
    names = lambda path: sorted(x.name for x in path.iterdir())
    for folder in ("rollouts", "checkpoints"):
        if names(workdir / folder) != names(expected / folder):
            found.append(f"{folder}: {names(workdir / folder)}")
    for path in sorted((expected / "rollouts").iterdir()):
        other = workdir / "rollouts" / path.name
        if not other.exists() or other.read_bytes() != path.read_bytes():
            found.append(f"rollouts/{path.name} differs")
    ours, others = parameters(workdir), parameters(expected)
    found += [f"state{k} differs" for k in others if ours.get(k) != others[k]]
    return found


def last_place(workdir: pathlib.Path) -> str:
    """How far a job had come when it was killed."""
    try:
        lines = figures(workdir)
    except (OSError, ValueError):
        return "before its first metrics"
    return (
        f"after {lines[-1]['stage']} {lines[-1]['step']}" if lines else "at its start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/soak"))
    args = parser.parse_args()
    out = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rng = random.Random(args.seed)
    alone, cache = out / "alone", out / "compiled"
    seconds = []
    for workdir in (out / "first", alone):  # the first one fills the cache
        began = time.monotonic()
        with (out / f"{workdir.name}.log").open("w") as log:
            if start(workdir, cache, log).wait() != 0:
                sys.exit(f"the job fails by itself: see {log.name}")
        seconds.append(time.monotonic() - began)
    whole = seconds[-1]
    wrong = differences(out / "first", alone)
    print(f"a job alone takes {whole:.0f} s; twice alike: {not wrong}", flush=True)

    kills, jobs, wrong_jobs = collections.Counter(), 0, []
    rows = []
    while kills.total() < args.kills:
        workdir, killed = out / f"job_{jobs}", 0
        with (out / f"job_{jobs}.log").open("w") as log:
            while True:
                process = start(workdir, cache, log)
                # Late enough, on average, that a job comes forward.
                limit = rng.uniform(0.2, 1.0) * whole
                enough = kills.total() >= args.kills
                try:
                    code = process.wait(None if enough else limit)
                except subprocess.TimeoutExpired:
                    gently = rng.random() < 0.2
                    name = "SIGTERM" if gently else "SIGKILL"
                    process.send_signal(getattr(signal, name))
                    code = process.wait()
                    if gently and code not in (0, -signal.SIGTERM):
                        wrong.append(f"job {jobs}: SIGTERM gave exit code {code}")
                    kills[name] += 1
                    killed += 1
                    rows.append((jobs, kills.total(), name, limit, last_place(workdir)))
                    print(*rows[-1], flush=True)
                    if code == 0 and is_finished(workdir):
                        break
                else:
                    if code != 0:
                        wrong.append(f"job {jobs}: exit code {code}, see {log.name}")
                    break
        found = differences(workdir, alone)
        wrong_jobs += [f"job {jobs}, killed {killed} times: {text}" for text in found]
        print(f"job {jobs}: {killed} kills, same as alone: {not found}", flush=True)
        jobs += 1

    lines = [
        (
            f"{kills.total()} kills ({dict(kills)}) of {jobs} jobs of {whole:.0f} s; "
            f"jobs that differ from one left alone: {len(wrong_jobs)}"
        ),
        "",
        "| kill | job | signal | after s | where |",
        "|---|---|---|---|---|",
        *(f"| {n} | {job} | {s} | {t:.1f} | {where} |" for job, n, s, t, where in rows),
        "",
        *wrong,
        *wrong_jobs,
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(bool(wrong or wrong_jobs))


def is_finished(workdir: pathlib.Path) -> bool:
    path = workdir / "summary.json"
    return path.exists() and bool(json.loads(path.read_text()).get("finished"))


if __name__ == "__main__":
    main()
