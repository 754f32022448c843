"""One table has the words for every metric."""

import doctest
import pathlib
import re

import pytest

from pr1_jax.report import charts
from pr1_jax.workdir import alarms, metric_table

PACKAGE = pathlib.Path(metric_table.__file__).parents[1]
GROUPS = "analysis|coldstart|data|eval|loss|optim|perf|policy|reward|rollout"


def test_worked_examples_hold():
    tried = doctest.testmod(metric_table)
    assert tried.attempted >= 5 and tried.failed == 0


def test_every_metric_that_the_package_names_has_words():
    named = set()
    for path in PACKAGE.rglob("*.py"):
        named |= {*re.findall(rf'"((?:{GROUPS})/[a-z_]+)"', path.read_text())}
    named |= {alarm.metric for alarm in alarms.ALARMS.values()}
    for group in charts.CHARTS.values():
        named |= {m for chart in group for m in (*chart.metrics, chart.held_out) if m}
    assert len(named) > 40
    assert [n for n in named if metric_table.describe(n).label == n] == []


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        ("number", 0.25, "0.250"),
        ("number", 123.4, "123"),
        ("share", 0.706, "70.6%"),
        ("small", 1.23e-5, "1.2e-05"),
        ("seconds", 3.21, "3.2s"),
        ("count", 987.6, "988"),
        ("count", 12345.0, "12.3k"),
        ("count", 2.5e6, "2.5M"),
        ("count", 3e9, "3.0G"),
    ],
)
def test_values_are_written_in_their_form(form, value, text):
    assert metric_table.Metric(form, "x").write(value) == text
