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
from rich.table import Table

from pr1_jax.answers import published
from pr1_jax.answers.verdicts import CORRECT, UNDECIDED, Result
from pr1_jax.answers.verify import check, check_many


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
    columns = ("cases", "agree %", "undecided", "crashes", "sec", "string checker %")
    rows = Table("suite", title="Agreement with public answer suites")
    for column in columns:
        rows.add_column(column, justify="right")
    totals = [0, 0, 0, 0, 0.0, 0]
    for suite in suites:
        counts = [
            len(suite.cases),
            sum(map(suite.agrees, range(len(suite.cases)))),
            sum(r is not None and r.verdict == UNDECIDED for r in suite.results),
            suite.results.count(None),
            suite.time_sec,
            sum(
                published.check(_response(case), case["reference"]) == case["equal"]
                for case in suite.cases
            ),
        ]
        rows.add_row(suite.name, *_cells(counts))
        totals = [total + count for total, count in zip(totals, counts)]
    rows.add_section()
    rows.add_row("all", *_cells(totals))
    return rows


def _cells(counts: list) -> list[str]:
    cases, agree, undecided, crashes, seconds, by_string = counts
    share = [f"{100 * count / max(cases, 1):.1f}" for count in (agree, by_string)]
    middle = [str(undecided), str(crashes), f"{seconds:.1f}"]
    return [str(cases), share[0], *middle, share[1]]


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
    console.print(table(suites))
    for suite in suites if args.show else []:
        for index, (case, result) in enumerate(zip(suite.cases, suite.results)):
            if not suite.agrees(index):
                line = {"suite": suite.name, **case, "got": result and result.verdict}
                console.print(
                    json.dumps(line, ensure_ascii=False), markup=False, soft_wrap=True
                )


if __name__ == "__main__":
    main()
