"""Analyses of blocks, on responses worked out by hand and on real ones."""

import doctest
import pathlib
import time

import numpy as np
import pytest

from pr1_jax import tags
from pr1_jax.report import analysis
from pr1_jax.system import files

TRACES = pathlib.Path(__file__).parents[3] / "shared/data/parallel_gsm8k_sample.jsonl"


def block(*paths, summary=None):
    """A block in canonical text."""
    inner = "".join(f"<Path>{path}</Path>" for path in paths)
    told = "" if summary is None else f"\n<Summary>{summary}</Summary>"
    return f"<Parallel>{inner}</Parallel>{told}"


def records(*responses):
    return [{"response": response} for response in responses]


def test_worked_examples_hold():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    tried = doctest.testmod(analysis, optionflags=options)
    assert tried.attempted >= 9
    assert tried.failed == 0


def test_blocks_are_read_in_order():
    text = f"One. {block('a', 'b', summary='s')}\nTwo. {block('c', 'd', 'e')}"
    first, second = analysis.read_blocks({"response": text})
    assert (first.lead, first.paths, first.summary) == ("One. ", ("a", "b"), "s")
    assert (second.lead, second.paths) == ("\nTwo. ", ("c", "d", "e"))
    assert second.summary == ""
    assert first.start == 5 / len(text)
    assert second.start == text.rindex("<Parallel>") / len(text)


@pytest.mark.parametrize(
    ("text", "paths", "summary"),
    [
        ("<Parallel>", (), ""),
        ("<Parallel><Path>a<Path>b</Parallel>", ("a", "b"), ""),
        ("<Parallel> x <Path>a</Path> y <Path>", ("a", ""), ""),
        ("<Path>out</Path><Parallel><Path>a", ("a",), ""),
        ("<Parallel><Path>a</Path></Parallel><Path>b</Path><Summary>s", ("a",), "s"),
        ("<Summary>s</Summary><Parallel><Summary>t</Summary>", (), ""),
    ],
)
def test_broken_blocks_are_read_as_far_as_they_go(text, paths, summary):
    (found,) = analysis.read_blocks({"response": text})
    assert (found.paths, found.summary) == (paths, summary)


def test_relative_positions_are_of_tokens_where_they_are_known():
    text = "aaaa" + block("1", "2")
    pieces = ["aaaa", "<Parallel>", "<Path>", "1", "</Path>", "<Path>", "2", "</Path>"]
    pieces += ["</Parallel>", "<eos>"]
    traced = {"response": text, "trace": {"pieces": pieces}}
    assert analysis.relative_positions([traced]) == [1 / 10]
    assert analysis.relative_positions(records(text, "", "none")) == [4 / len(text)]
    spelled = {"response": text, "trace": {"pieces": list(text)}}  # no tag is a token
    assert analysis.relative_positions([spelled]) == [4 / len(text)]


def test_diversity_by_hand():
    same, other = "the cat sat on the mat", "w x y z"
    found = analysis.path_diversity(
        records(block(same, same), block(same), block("", " ", same), block())
    )
    assert found == [1.0]  # one path, or blank ones, tell nothing
    (found,) = analysis.path_diversity(records(block(same, other)))
    assert found < 0.1
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours, equally long.
    (found,) = analysis.path_diversity(records(block("a b c d e", "a b c d f")))
    assert found == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # Of three pairs of paths one is alike; no word is shared by the others.
    (found,) = analysis.path_diversity(records(block(same, same, "q r s t u v")))
    assert found == pytest.approx(1 / 3)


def test_diversity_by_an_embedding():
    vectors = {"a": [2.0, 0.0], "b": [0.0, 3.0], "c": [1.0, 1.0]}
    embed = lambda texts: np.array([vectors[text] for text in texts])
    found = analysis.path_diversity(records(block("a", "b"), block("a", "c")), embed)
    assert found == pytest.approx([0.0, 0.5**0.5])
    assert analysis.path_diversity(records("no block"), embed) == []
    with pytest.raises(ValueError, match=r"shape \(2,\) for 2 texts"):
        analysis.path_diversity(records(block("a", "b")), lambda texts: np.ones(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("it is 4.", "4"),
        ("so 1,234,567.50 it is", "2469135/2"),
        ("1, 2, and 3,5", "5"),
        ("from 9-7", "7"),
        ("a chance of 2/8", "1/4"),
        ("x/0 of 5/0", "0"),
        (r"\boxed{12.0}, not 13", "12"),
        ("Final Answer: x = y\nsince 3", "x=y"),
        ("left 1+2 no ", "no"),
        ("right 9+2 no 4+7 yes", "4+7"),
        (" left 7+4 yes", "4+7"),
        ("left 4+7 yes 3", "no"),
    ],
)
def test_conclusions(text, expected):
    assert analysis.conclusion(text) == expected


def test_agreement_by_hand():
    found = analysis.path_agreement(
        records(
            block("so 4", "it is 4.0") + block("so 4", "it is 5"),
            block("4", "4", "4", "7"),  # 3 of 6 pairs
            block("4", "nothing") + block("a", "b"),  # nothing to compare
            block("left 1+2 no ", "right 3+4 yes"),
            block("left 4+3 yes", "right 3+4 yes"),
            block("left 1+2 no ", "right 9+9 no "),
        )
    )
    assert found == [1.0, 0.0, 0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (block("so 4", "so 5, by far", "4", summary="Not 5, two say 4."), [True]),
        (block("so 4", "5", "so 5", summary="5 cats, 4 dogs, so 4"), [False]),
        (block("so 4", "4", "5", summary="Neither: 6."), [False]),
        (block("left 1+2 no ", "right 3+4 yes", "3+4 yes", summary="right 4+3"), []),
        (block("so 4", "rather 5", summary="4"), []),  # no majority
        (block("so 4", "and 4", summary="4"), []),  # they agree
        (block("so 4", "or 5", "or 5"), []),  # no summary
    ],
)
def test_summaries_by_hand(text, expected):
    assert analysis.summaries_follow_majority(records(text)) == expected


EXPLORES = "Two cats, 6 legs. " + block("so 4", "by sums 4", summary="So 4.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EXPLORES, [False]),
        ("It is 4. " + block("so 4", "by sums 4"), [True]),
        ("It is 4. " + block("so 5", "by sums 4"), [True]),  # half of them
        ("Let me double-check. " + block("x", "y"), [True]),
        ("Check. " + "-" * 200 + block("x", "y"), [False]),
        (block("We verify it.", "other"), [True]),
        (block("First. Then we verify it.", "other"), [False]),
        (EXPLORES + " Now dogs. " + block("is 4", "4"), [False, True]),
        (EXPLORES + " Now dogs. " + block("is 9", "8"), [False, False]),
        (block("1", "2", summary="3") + block("3", "x"), [False, True]),
        (block("left 1+2 no ", "right 9+9 no ") * 2, [False, False]),
        (block("left 1+2 yes", "right 9+9 no ") * 2, [False, True]),
        (block(), [False]),
    ],
)
def test_what_counts_as_verification(text, expected):
    assert analysis.verifications(records(text)) == expected


def test_summarize_by_hand():
    for empty in ([], records("", "no block")):
        assert set(analysis.summarize(empty).values()) == {None}
    text = block("so 4", "it is 4 now", "or 5", summary="4") + "Final Answer: 4"
    found = analysis.summarize(records(text, "4"))
    assert len(found) == 8
    assert found["identical_paths"] == found["path_likeness"] == 0
    assert found["work_division"] == 1
    labelled = [block(" 1 so 4", " 2 so 4") + block(" 1 a", " 2 b"), ""]
    of_labelled = analysis.summarize(records(*labelled), tags.Grammar((" 1", " 2")))
    assert of_labelled["identical_paths"] == of_labelled["work_division"] == 1 / 2
    assert found["relative_position"] == found["verification_share"] == 0
    assert found["path_agreement"] == pytest.approx(1 / 3)
    assert found["summary_follows_majority"] == 1
    assert 0 < found["path_bleu"] < 0.5


def test_plans_are_no_paths():
    text = block(" 1 so 4", " 2 it is 4 now", " 1 or 5", summary="4")
    planned = text.replace(tags.PARALLEL, tags.PARALLEL + "<Plan>so 4</Plan>" * 3)
    labels = (" 1", " 2", " 3")
    found = analysis.summarize(records(text), tags.Grammar(labels))
    assert found == analysis.summarize(records(planned), tags.Grammar(labels, True))
    assert None not in found.values()


def test_hostile_text_is_read_in_time_and_gives_shares():
    rng = np.random.default_rng(0)
    bits = [*tags.TAGS, "\ud83d", "\x00", "9" * 5000, "1" + ",111" * 3000, " - ", "/"]
    bits += ["\\boxed{", "Final Answer:", "left ", "1+1 yes", "数", "<Parallel><Path>"]
    texts = ["".join(rng.choice(bits, 60)) for _ in range(60)]
    texts += [tags.PARALLEL * 3000, "<Parallel><Path>" * 1500, "9," * 20000]
    texts += ["<Parallel>" + "<Path>4" * 200, " " * 30000 + "<Parallel>"]
    began = time.process_time()
    found = analysis.summarize(records(*texts))
    assert all(0 <= value <= 1 for value in found.values() if value is not None)
    assert all(0 <= x <= 1 for x in analysis.path_diversity(records(*texts)))
    assert time.process_time() - began < 30


def test_figures_of_real_traces():
    if not TRACES.exists():
        pytest.skip("needs the cold-start traces of Parallel-GSM8K")
    found = files.read_json_lines(TRACES)
    starts, verify = analysis.relative_positions(found), analysis.verifications(found)
    late = [v for start, v in zip(starts, verify, strict=True) if start >= 0.2]
    early = [v for start, v in zip(starts, verify, strict=True) if start < 0.2]
    assert np.mean(early) < 0.2 < np.mean(late)
    figures = analysis.summarize(found)
    assert 0.3 < figures["relative_position"] < 0.45
    assert 0.05 < figures["path_bleu"] < 0.25
    assert 0.75 < figures["path_agreement"] < 0.95
