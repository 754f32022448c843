"""What suites measured, as Markdown and as JSON."""

from collections.abc import Mapping
from typing import Any

from pr1_jax.system import files
from pr1_jax.system.tables import Spread, Table


def markdown(suites: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """All tables, and why a suite failed."""
    parts = ["# Benchmark\n\n", *(f"- {k}: {v}\n" for k, v in about.items()), "\n"]
    for name, suite in suites.items():
        parts.append(f"## {name}\n\n")
        if "error" in suite:
            parts.append(f"failed: {suite['error']}\n\n")
        parts += [table.markdown() + "\n" for table in suite["tables"]]
    return "".join(parts)


def json_data(suites: Mapping[str, Mapping[str, Any]], about: Mapping) -> dict:
    """All figures: of repeats the median and the range."""
    data = {
        name: suite | {"tables": [_table(table) for table in suite["tables"]]}
        for name, suite in suites.items()
    }
    return files.plain({**about, "suites": data})


def _table(table: Table) -> dict[str, Any]:
    rows = [{name: _value(x) for name, x in row.items()} for row in table.rows]
    return {"title": table.title, "note": table.note, "rows": rows}


def _value(value: Any) -> Any:
    """A figure with five digits that count."""
    if isinstance(value, Spread):
        low, high = min(value.values), max(value.values)
        ends = {"median": value.median, "min": low, "max": high}
        return {name: _value(x) for name, x in ends.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
