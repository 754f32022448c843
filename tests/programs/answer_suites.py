"""How far `answers.check` agrees with public suites of equivalent answers.

`python -m tests.programs.answer_suites FOLDER [--show]` reads every FOLDER/*.jsonl, a
case a line: {"answer": str, "reference": str, "equal": bool}. The suites themselves
are other people's test files and are not kept here.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pr1_jax.answers import published
from pr1_jax.answers.verdicts import CORRECT, UNDECIDED, Result
from pr1_jax.answers.verify import check, check_many
from pr1_jax.system.tables import Table


@dataclass(frozen=True)
class Suite:
    """cases: as read; results: of each case, None where the check raised."""

    name: str
    cases: list[dict]
    results: list[Result | None]
    time_sec: float

    def agrees(self, index: int) -> bool:
        """Undecided counts as not equal, as it does in the reward."""
        result = self.results[index]
        correct = result is not None and result.verdict == CORRECT
        return result is not None and correct == self.cases[index]["equal"]


def _response(case: dict) -> str:
    return f"Final Answer: {case['answer']}"


def _checked(case: dict) -> Result | None:
    try:
        return check(_response(case), case["reference"])
    except Exception:  # noqa: BLE001 (a crash is what is counted)
        return None


def run(path: Path) -> Suite:
    """Asks about every case of the file; alone, should the whole batch raise."""
    with path.open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    start = time.perf_counter()
    try:
        references = [case["reference"] for case in cases]
        results = check_many([_response(case) for case in cases], references)
    except Exception:  # noqa: BLE001
        results = [_checked(case) for case in cases]
    return Suite(path.stem, cases, results, time.perf_counter() - start)


def table(suites: list[Suite]) -> Table:
    """One row a suite and one for all of them."""
    rows = [_counts(suite) for suite in suites]
    rows.append({name: sum(row[name] for row in rows) for name in rows[0]})
    rows = [
        {"suite": suite, "cases": row["cases"]}
        | {"share agreed": row["agree"] / max(row["cases"], 1)}
        | {name: row[name] for name in ("undecided", "crashes", "sec")}
        | {"share of string checker": row["by string"] / max(row["cases"], 1)}
        for suite, row in zip([*(suite.name for suite in suites), "all"], rows)
    ]
    return Table("Agreement with public answer suites", rows)


def _counts(suite: Suite) -> dict[str, float]:
    return {
        "cases": len(suite.cases),
        "agree": sum(map(suite.agrees, range(len(suite.cases)))),
        "undecided": sum(
            r is not None and r.verdict == UNDECIDED for r in suite.results
        ),
        "crashes": suite.results.count(None),
        "sec": suite.time_sec,
        "by string": sum(
            published.check(_response(case), case["reference"]) == case["equal"]
            for case in suite.cases
        ),
    }


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true", help="list the disagreements")
    args = parser.parse_args()
    paths = sorted(args.folder.glob("*.jsonl"))
    if not paths:
        parser.error(f"no *.jsonl in {args.folder}")
    check("Final Answer: 1/2", "0.5")  # a worker has started
    suites = [run(path) for path in paths]
    console = Console()
    console.print(table(suites).terminal())
    for suite in suites if args.show else []:
        for index, (case, result) in enumerate(zip(suite.cases, suite.results)):
            if not suite.agrees(index):
                line = {"suite": suite.name, **case, "got": result and result.verdict}
                console.print(
                    json.dumps(line, ensure_ascii=False), markup=False, soft_wrap=True
                )


if __name__ == "__main__":
    main()
