"""Identical paths, likeness and division of work: laws, and blocks worked by hand."""

import doctest
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pr1_jax import diversity
from pr1_jax.data import tasks
from pr1_jax.tags import Grammar

LABELS = (" 1", " 2", " 3", " 4")


def block(*paths):
    """A block in canonical text."""
    inner = "".join(f"<Path>{path}</Path>" for path in paths)
    return f"<Parallel>{inner}</Parallel>\n<Summary>s</Summary>"


def labelled(*paths):
    return block(*(label + path for label, path in zip(LABELS, paths)))


def of(text, labels=()):
    """Identical, likeness and division of each block."""
    found = diversity.of_response(text, tasks.work, Grammar(labels))
    return [(d.identical_paths, d.path_likeness, d.work_division) for d in found]


def test_worked_examples_hold():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    tried = doctest.testmod(diversity, optionflags=options)
    assert tried.attempted >= 4 and tried.failed == 0


def test_plans_are_no_paths():
    grammar = Grammar(LABELS, planned=True)
    text = "So: " + labelled("a b", "a c", "b")
    planned = text.replace("<Parallel>", "<Parallel>" + "<Plan> do a b</Plan>" * 3)
    one, other = (diversity.read_blocks(x, grammar)[0] for x in (text, planned))
    assert (one.lead, one.paths, one.summary) == (other.lead, other.paths, "s")
    assert diversity.of_response(planned, tasks.work, grammar)[0].path_likeness < 1


# Of n words there are n + 1 pairs, those of the beginning and the end included.
BY_HAND = [
    (block("a b", "a b"), (True, 1, 0)),
    (block("a b", "c d e"), (False, 0, 1)),
    (block("a b", "a c"), (False, 1 / 3, 2 / 3)),  # 2 · 1 of 3 + 3: they begin alike
    (block("a b c", "b c"), (False, 4 / 7, 3 / 7)),  # b c, and the end
    (block("a  b\n", "a b"), (False, 1, 0)),  # not the same text, but the same words
    (block("a b", "a b", "c d"), (True, 1 / 3, 2 / 3)),  # one pair of three
    (block("", ""), (True, 1, 0)),
    (block("", "a"), (False, 0, 1)),
    # Steps of the embedded task: a number, and what it needs.
    (block("left 1+6 no 2+5 no ", "right 4+3 yes"), (False, 0, 1)),
    (block("left 1+6 no 2+5 no ", "left 1+6 no "), (False, 8 / 10, 1 / 2)),
    (block("left 1+6 no ", "right 9+1 no 1+6 no "), (False, 4 / 10, 1 / 2)),
    (block("left 1+6 no 1+6 no ", "left 2+5 no 2+5 no "), (False, 0.4, 1)),
    (block("left 1+6 no ", "left 1+6 no ", "right 3+4 yes"), (True, 1 / 3, 1 / 2)),
    # 4 distinct steps in 4 paths, of which 1+6 and 4+3 are done by two.
    (
        block(
            "left 1+6 no 2+5 no ", "left 1+6 no ", "right 4+3 yes", "left 3+4 no 4+3"
        ),
        (False, (8 / 10 + 0 + 2 / 11 + 0 + 2 / 9 + 0) / 6, 2 / 4),
    ),
    (block("left 1+6 no ", ""), (False, 0, 1)),
    (block("left ", "right "), (False, 0, 0)),  # no step, so none is divided
    (block("left ", "left "), (True, 1, 0)),
    (block("left 1+6", "a text in English"), (False, 0, 1)),
    # As far as they go.
    ("<Parallel><Path>a b<Path>a b</Parallel>", (True, 1, 0)),
    ("<Parallel><Path>a b</Path><Path>a", (False, 2 / 5, 3 / 5)),
    ("<Parallel><Path>left 1+6 no </Path><Path>left 1+", (False, 2 / 7, 5 / 7)),
    # What cannot be read of one path may be what the other did.
    (block(" A 1>6 no", " A 1>6 no none"), (False, 6 / 9, 3 / 9)),
    (block(" A", " B"), (False, 0, 1)),
    (block(" A no", " B no"), (False, 1 / 3, 0)),  # the task's language, and no step
    (block(" 3", " 4"), (False, 0, 1)),
]


@pytest.mark.parametrize(("text", "expected"), BY_HAND)
def test_figures_by_hand(text, expected):
    assert of(text) == [pytest.approx(expected)]


def test_blocks_with_fewer_than_two_paths_have_no_figures():
    assert of("no block, <Path>out</Path><Path>out</Path>") == []
    assert of("<Parallel>" + block("a") + "<Parallel><Path>b</Path></Parallel>") == []
    first, second = of(f"x {block('a', 'a')} y {block('a', 'b')} {block('z')}")
    assert first[0] and not second[0]


def test_paths_are_compared_without_their_labels():
    for paths in (("a b", "a b"), (" a", " b"), ("left 1+6 no ",) * 2, ("", "", "x")):
        spaced = [f" {path}" for path in paths]
        assert of(labelled(*spaced), LABELS) == of(block(*spaced))
    assert of(labelled(" a", " a")) == [
        (False, pytest.approx(1 / 3), pytest.approx(2 / 3))
    ]
    # Another path's label, or one that goes on, is text.
    assert not of(block(" 2 a", " 2 a"), LABELS)[0][0]
    assert not of(block(" 1 a", " 22 a"), LABELS)[0][0]
    assert of(block(" a", " 2 a"), LABELS)[0][0]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "1+6", "2+5"]), max_size=6)
PATHS = st.lists(WORDS.map(" ".join), min_size=2, max_size=4)


@pytest.mark.parametrize("work", [lambda path: None, str.split])
@given(paths=PATHS)
def test_laws(work, paths):
    found = diversity.of_paths(paths, work)
    assert 0 <= found.path_likeness <= 1 and 0 <= found.work_division <= 1
    assert found.identical_paths == (len(set(paths)) < len(paths))
    for other in itertools.permutations(paths):
        assert diversity.of_paths(other, work) == found
    same = diversity.of_paths([paths[0]] * len(paths), work)
    assert same == diversity.Diversity(True, 1.0, 0.0)
    # Nothing in common, since no word is.
    apart = [
        f"{i} " + " ".join(w + str(i) for w in p.split()) for i, p in enumerate(paths)
    ]
    apart = [f"{path} {i}" for i, path in enumerate(apart)]
    assert diversity.of_paths(apart, work) == diversity.Diversity(False, 0.0, 1.0)


def test_division_falls_as_more_is_done_twice():
    mine = [f"{i}+1 no" for i in range(8)]
    shares = [
        of(block("left " + " ".join(mine[:4]), "left " + " ".join(mine[4 - n : 8 - n])))
        for n in range(5)
    ]
    assert [share for ((_, _, share),) in shares] == [1, 6 / 7, 4 / 6, 2 / 5, 0]


def test_a_long_response_takes_little_time():
    """4,096 of them a step; and no text takes long."""
    words = [f"w{i * i % 1009}" for i in range(3000)]
    paths = [" ".join(words[i::8]) for i in range(8)]
    hostile = "<Parallel>" + "<Path>4 " * 3000
    began = time.process_time()
    for text in (block(*paths), block(" ".join(words), " ".join(words[1:])), hostile):
        (_,) = of(text)
    assert time.process_time() - began < 0.25
