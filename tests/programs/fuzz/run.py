"""Fuzzes the targets with atheris and writes a table of the runs.

    bash tests/programs/fuzz.sh                  all targets, 100,000 inputs each
    N=2000 bash tests/programs/fuzz.sh config    fewer, of one

Each target runs in a process of its own, under libFuzzer's mutations guided by the
coverage of pr1_jax. A finding stops its target: the input is then in the corpus folder,
and `python -m tests.programs.fuzz.run NAME --repeat=FILE` repeats it.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

from pr1_jax.system import tables
from tests.programs.fuzz import base

BUILD = base.ROOT / "build" / "fuzz-corpus"
RESULTS = pathlib.Path(__file__).parent / "RESULTS.md"
_MAX_BYTES = 1000  # or twice the longest of the inputs to begin with
_TIMEOUT_SEC = 30
_MEMORY_MB = 6000
_HEAD = f"""# Fuzz runs

`bash tests/programs/fuzz.sh`: atheris (libFuzzer), inputs of at most {_MAX_BYTES} bytes (or twice
a valid one), some of them blown up to 3,000 characters, one process a target; an input
may take 1 s of CPU time. Coverage counts the points reached in
`pr1_jax`, at the first input and at the last (that of libraries, such as pyarrow's, is
not seen); the corpus is the inputs that found new ones. `answer_check` asks the worker
processes of math-verify, which take a second at most and then start anew;
`answer_parser` is all of the answer check that runs in the program itself.

"""


def fuzz_one(name: str, number: int, corpus: pathlib.Path) -> None:
    """Runs `number` inputs through one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["pr1_jax"], enable_loader_override=False):
        from tests.programs.fuzz import targets

    target = targets.TARGETS[name]()
    for i, seed in enumerate(target.seeds):
        (corpus / f"seed{i}").write_bytes(seed)
        target.run(seed)  # imports and warms up
    stats = {"inputs": 0, "seconds": 0.0, "wall_ms": 0.0, "cpu_ms": 0.0}
    start = time.perf_counter()

    def run(content: bytes) -> None:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        try:
            target.run(content)
        finally:
            end, cpu_sec = time.perf_counter(), time.process_time() - begin_cpu
            stats["inputs"] += 1
            stats["seconds"] = end - start
            stats["wall_ms"] = max(stats["wall_ms"], 1000 * (end - begin))
            stats["cpu_ms"] = max(stats["cpu_ms"], 1000 * cpu_sec)
            if stats["inputs"] % 100 == 0 or stats["inputs"] >= number:
                (corpus.parent / f"{name}.stats").write_text(json.dumps(stats))
        if cpu_sec > target.limit_sec:
            raise TimeoutError(f"this input took {cpu_sec:.2f} s of CPU time")

    options = (
        f"-atheris_runs={number}",
        f"-max_len={max(_MAX_BYTES, 2 * max(map(len, target.seeds)))}",
        "-len_control=20",
        f"-timeout={_TIMEOUT_SEC}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-artifact_prefix={corpus.parent}/{name}.",
        "-print_final_stats=1",
        "-seed=1",
    )

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(content, max_size)
        return base.change_json(content, rng)[:max_size]

    mutators = {"custom_mutator": mutate} if target.json else {}
    atheris.Setup([sys.argv[0], *options, str(corpus)], run, **mutators)
    atheris.Fuzz()


def measure(name: str, number: int) -> dict[str, str]:
    """A row of the table: one target, fuzzed in a process of its own."""
    corpus = BUILD / name
    corpus.mkdir(parents=True, exist_ok=True)
    for old in (*BUILD.glob(f"{name}.*"), *corpus.iterdir()):
        old.unlink()
    log = BUILD / f"{name}.log"
    command = [sys.executable, "-m", "tests.programs.fuzz.run"]
    command += ["--one", name, "--number", str(number)]
    with open(log, "w") as output:
        status = subprocess.call(
            command, stdout=output, stderr=output, env=_environment(), cwd=base.ROOT
        )
    with open(log, "a") as output:
        output.write(f"exit status {status}\n")
    text = log.read_text(errors="replace")
    covered = [int(x) for x in re.findall(r"\bcov: (\d+)", text)] or [0]
    stats = json.loads((BUILD / f"{name}.stats").read_text())
    finding = "Uncaught Python exception" in text or status != 0
    return {
        "target": name,
        "inputs": f"{stats['inputs']:,}",
        "seconds": f"{stats['seconds']:.0f}",
        "inputs/s": f"{stats['inputs'] / stats['seconds']:,.0f}",
        "longest input, ms of CPU": f"{stats['cpu_ms']:.0f}",
        "and of time": f"{stats['wall_ms']:.0f}",
        "coverage": f"{covered[0]} → {covered[-1]}",
        "corpus": f"{len(list(corpus.iterdir())):,}",
        "findings": str(int(finding)),
    }


def _environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return os.environ | {"JAX_PLATFORMS": "cpu"} | offline


def _write(row: dict[str, str]) -> None:
    """Adds a row to the table, in place of the target's last one."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    old = [[cell.strip() for cell in x.split("|")[1:-1]] for x in lines if x[:1] == "|"]
    rows = [dict(zip(row, cells)) for cells in old[2:] if cells[0] != row["target"]]
    RESULTS.write_text(_HEAD + tables.Table("", [*rows, row]).markdown())


def main() -> int:
    """Fuzzes the targets named, or all; the exit code is 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--repeat", help="a file of input to the target named")
    parser.add_argument("--one", help="used by this program itself")
    given = parser.parse_args()
    if given.one:
        fuzz_one(given.one, given.number, BUILD / given.one)
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tests.programs.fuzz import targets

    if given.repeat:
        targets.TARGETS[given.names[0]]().run(pathlib.Path(given.repeat).read_bytes())
        return 0
    if unknown := set(given.names) - set(targets.TARGETS):
        parser.error(f"no targets {sorted(unknown)}, there are {[*targets.TARGETS]}")
    found = 0
    for name in given.names or targets.TARGETS:
        row = measure(name, given.number)
        print(" | ".join(row.values()), flush=True)
        _write(row)
        found += int(row["findings"])
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
