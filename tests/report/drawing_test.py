"""Pictures of responses: what is where, and that anything can be drawn."""

import doctest

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from pr1_jax.data import tasks, traces
from pr1_jax.report import drawing
from pr1_jax.stages.responses import trace as responses_trace

TOKENIZER = tasks.make().tokenizer()
BLOCK = (
    "<Parallel><Path> 1 A 51>55 no</Path><Path> 2 C 30>34 yes 30</Path></Parallel>\n"
)
TEXT = f"{BLOCK}<Summary> 30</Summary>\nFinal Answer: 30"


def traced(text, prompt=(1, 2, 3)):
    made = traces.from_text(prompt, text, TOKENIZER, variant="structured")
    return responses_trace(made, TOKENIZER)


def test_worked_examples_hold():
    tried = doctest.testmod(drawing)
    assert (tried.attempted, tried.failed) == (1, 0)


def test_paths_write_side_by_side():
    trace = traced(TEXT)
    order = drawing.order_of_writing(trace)
    pieces = [trace["pieces"][n] for n in order]
    assert pieces[:5] == ["<Parallel>", "<Path>", "<Path>", " 1", " 2"]
    paths = [trace["path"][n] for n in order]
    assert paths[:15] == [0] + [1, 2] * 7
    assert paths[15:] == [0] * (len(paths) - 15)
    assert order[15:].tolist() == list(range(15, len(order)))


def test_visibility_hides_siblings_alone():
    trace = traced(TEXT)
    seen = drawing.visibility(trace)
    total = len(trace["pieces"])
    assert seen.shape == (total, total)
    hidden = np.tril(np.ones((total, total), bool)) & ~seen
    assert hidden.sum() == 7 * 7
    assert hidden[8:15, 1:8].all()


def test_boxes_stand_in_lanes_and_rows():
    trace = traced(TEXT)
    trace["forced"][1] = 1
    axes = Figure().subplots()
    drawing.draw_response(axes, trace)
    boxes = [p for p in axes.patches if isinstance(p, FancyBboxPatch)]
    middles = [p.get_x() + p.get_width() / 2 for p in boxes]
    rows = [round(p.get_y() - 0.14, 6) for p in boxes]
    assert len(boxes) == len(trace["pieces"])
    np.testing.assert_allclose(middles[:9], [0] + [-0.5] * 7 + [0.5], atol=1e-9)
    assert rows[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 1]
    assert rows[15] == 8  # the join, behind the longest path
    assert boxes[1].get_facecolor() == (1, 1, 1, 1)  # forced
    assert boxes[2].get_facecolor() != (1, 1, 1, 1)


def test_a_surprising_token_is_darker():
    brightness = [sum(drawing.shade(logp)) for logp in (0.0, -0.5, -2.0, -9.0)]
    assert brightness == sorted(brightness, reverse=True)
    assert drawing.shade(None) == drawing.shade(-99.0)


HOSTILE = ["$x$ $", "\\frac{", "\ud83d", "\x00", "", "\n\n", "数", "<Parallel>" * 20]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "text", [TEXT, "\nFinal Answer: 1", f"{BLOCK}<Summary> 1</Summary>" * 2, "hostile"]
)
def test_everything_can_be_drawn(text, tmp_path):
    trace = traced(BLOCK + "<Summary> 1</Summary>" if text == "hostile" else text)
    if text == "hostile":
        few = len(trace["pieces"])
        trace["pieces"] = (HOSTILE * few)[:few]
        trace["logps"][0] = None
    for draw in ("response", "mask", "positions", "cache"):
        figure = Figure()
        getattr(drawing, f"draw_{draw}")(figure.subplots(), trace)
        figure.savefig(tmp_path / "x.png", dpi=30)
    figure = Figure()
    drawing.draw_responses(figure, [trace, trace], ["a", "b\nc"])
    figure.savefig(tmp_path / "x.png", dpi=30)
    assert len(figure.axes) == 2
