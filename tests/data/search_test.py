"""Laws of the embedded problems, their traces and their tokenizer."""

import collections
import itertools
import re

import numpy as np
import pytest

from pr1_jax import defaults, tags
from pr1_jax.answers.verdicts import CORRECT
from pr1_jax.answers.verify import check
from pr1_jax.data import endless, search, tasks, traces
from tests.helpers import search_task

NUM = 300
KINDS = [(family, split) for family in ("easy", "hard") for split in endless.SPLITS]


def records(family="hard", split="train", n=NUM, seed=0, **options):
    """The first records; with options they are traces."""
    task = search.Search(**options)
    source = task.records(family, split, seed=seed, traces=bool(options))
    return [source[i] for i in range(n)]


def parse(question):
    """Target and numbers of a question."""
    found = re.fullmatch(r"Which two add to (\d+)\? (\d+(?: \d+)*)\n", question)
    return int(found[1]), tuple(map(int, found[2].split()))


def pair_of(question):
    target, numbers = parse(question)
    pairs = [p for p in itertools.combinations(numbers, 2) if sum(p) == target]
    assert len(pairs) == 1, question
    return pairs[0]


def paths_of(response):
    return re.findall("<Path>(.*?)</Path>", response)


def tried(path):
    """The (number, needed) that a path names, and whether it claims to be done."""
    named = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\+(-?\d+)", path)]
    return named, path.endswith(" yes")


@pytest.mark.parametrize("family", ["easy", "hard"])
def test_train_and_eval_never_ask_the_same(family):
    asked = {
        split: {
            (target, tuple(sorted(numbers)))
            for seed in (0, 1)
            for record in records(family, split, 1500, seed=seed)
            for target, numbers in [parse(record["question"])]
        }
        for split in endless.SPLITS
    }
    assert min(map(len, asked.values())) > 500  # so an overlap would show
    assert not asked["train"] & asked["eval"]


@pytest.mark.parametrize("family, split", KINDS)
def test_exactly_one_pair_adds_up_and_the_answer_is_its_difference(family, split):
    for record in records(family, split):
        x, y = pair_of(record["question"])
        assert record["answer"] == str(abs(x - y))
        target, numbers = parse(record["question"])
        assert len(set(numbers)) == len(numbers)
        lengths = search.FAMILIES[family]
        assert lengths.min_length <= len(numbers) <= lengths.max_length
        assert max(numbers) <= lengths.max_number
        assert target not in [2 * n for n in numbers]  # no number with itself


def test_a_record_depends_on_seed_and_index_alone():
    open_new = lambda: tasks.make("search").records(
        "hard", "train", seed=3, traces=True
    )
    first, other, indices = open_new(), open_new(), [5, 0, 10**9, 5, 77]
    forwards = [first[i] for i in indices]
    assert forwards == [other[i] for i in reversed(indices)][::-1]
    assert forwards[0] == forwards[3] == first[np.int64(5)]
    assert len({r["question"] for r in forwards}) == 4
    other = records(seed=4, n=50)
    assert not {r["question"] for r in records(n=50)} & {r["question"] for r in other}


@pytest.mark.parametrize("family, split", KINDS)
@pytest.mark.parametrize("block_share", [0.0, 1.0])
def test_traces_are_correct_and_canonical(family, split, block_share):
    for record in records(family, split, block_share=block_share):
        text = record["response"]
        assert check(text, record["answer"]).verdict == CORRECT
        assert tags.check_format(text) == []
        assert tags.canonical(text) == text
        assert text.count(tags.PARALLEL) == block_share
        assert text.splitlines()[-1] == f"Final Answer: {record['answer']}"


def test_late_blocks_come_after_a_search_and_change_nothing_else():
    settings = {"block_share": 0.5, "n": 600}
    early, late = records(**settings), records(late_share=0.5, **settings)
    before = [text["response"].partition(tags.PARALLEL)[0] for text in late]
    with_block = [tags.PARALLEL in text["response"] for text in late]
    searched = [b for b, block in zip(before, with_block) if block]
    assert np.mean([b != "" for b in searched]) == pytest.approx(0.5, abs=0.1)
    assert any(b.endswith(" yes") for b in searched)
    assert any(b.endswith(" no ") for b in searched)
    for old, new, text in zip(early, late, before):
        assert old["question"] == new["question"]
        if text and tags.PARALLEL in new["response"]:
            assert new["response"] == text + old["response"]
            named, _ = tried(text)
            assert 1 <= len(named) <= 3
        else:
            assert new == old
        assert tags.check_format(new["response"]) == []


def test_shares_are_kept():
    made = records(n=1000, block_share=0.3)
    share = np.mean([tags.PARALLEL in r["response"] for r in made])
    assert share == pytest.approx(0.3, abs=0.05)
    made = records("easy", n=1000, hard_share=0.2)
    longest = search.FAMILIES["easy"].max_length
    share = np.mean([len(parse(r["question"])[1]) > longest for r in made])
    assert share == pytest.approx(0.2, abs=0.05)
    assert "response" not in records()[0]


@pytest.mark.parametrize("family", ["easy", "hard"])
def test_two_paths_scan_from_opposite_ends_until_they_claim_the_pair(family):
    orders = set()
    for record in records(family, block_share=1.0):
        target, numbers = parse(record["question"])
        pair = pair_of(record["question"])
        paths = paths_of(record["response"])
        sides = tuple(path.split()[0] for path in paths)
        orders.add(sides)
        for side, path in zip(sides, paths, strict=True):
            named, claims = tried(path)
            scanned = numbers if side == "left" else numbers[::-1]
            assert [number for number, _ in named] == list(scanned[: len(named)])
            assert path.count(" yes") == claims
            for number, needed in named[:-1] if claims else named:
                assert number + needed == target
                assert number not in pair
    assert orders == {("left", "right"), ("right", "left")}


def test_without_a_block_one_search_goes_on_until_it_succeeds():
    for record in records(block_share=0.0):
        response, _, _ = record["response"].partition("\n")
        assert not any(tag in response for tag in tags.TAGS)
        (_, numbers), named = parse(record["question"]), tried(response)[0]
        scanned = numbers if response.startswith("left ") else numbers[::-1]
        assert [number for number, _ in named] == list(scanned[: len(named)])
        assert sorted(named[-1]) == sorted(pair_of(record["question"]))
        assert tried(response)[1]


def test_the_summary_says_which_paths_found_the_pair():
    said = collections.Counter()
    for record in records(block_share=1.0, n=1000):
        pair = sorted(pair_of(record["question"]))
        found = {
            path.split()[0]: sorted(named[-1])
            for path in paths_of(record["response"])
            for named, claims in [tried(path)]
            if claims
        }
        assert found and all(claim == pair for claim in found.values())
        (summary,) = re.findall("<Summary>(.*)</Summary>", record["response"])
        who, _, claim = summary.partition(" ")
        assert who == ("both" if len(found) == 2 else next(iter(found)))
        assert sorted(map(int, claim.split("+"))) == pair
        said[who] += 1
    # Neither path alone would do: each is needed in a good part of the blocks.
    assert set(said) == {"left", "right", "both"}
    assert min(said["left"], said["right"]) > 300


def test_tokens_spell_the_text_and_tags_are_one_each():
    tokenizer = tasks.make("search").tokenizer()
    for record in records(block_share=0.7):
        text = record["question"] + record["response"]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.eos_id not in ids
        present = [i for i in ids if i in tokenizer.tag_ids.values()]
        written = re.findall("|".join(tags.TAGS), text)
        assert present == [tokenizer.tag_ids[tag] for tag in written]


@pytest.mark.parametrize("late_share", [0.0, 1.0])
@pytest.mark.parametrize("family", ["easy", "hard"])
def test_traces_fit_the_budgets_that_the_module_names(family, late_share):
    tokenizer = tasks.make("search").tokenizer()
    limits = search_task.put(defaults.get_config()).rollout
    for record in records(family, block_share=0.5, late_share=late_share):
        prompt, text = tokenizer.encode(record["question"]), record["response"]
        trace = traces.from_text(prompt, text, tokenizer, variant="structured")
        assert len(prompt) <= limits.max_prompt_tokens
        assert len(trace.tokens) <= limits.max_response_tokens


@pytest.mark.parametrize("family", ["easy", "hard"])
def test_guessing_is_hard(family):
    counts = collections.Counter(r["answer"] for r in records(family, "eval", 3000))
    assert counts.most_common(1)[0][1] / 3000 < 0.12


@pytest.mark.parametrize(
    "family, split, named",
    [("odd", "eval", "data.family='odd'"), ("easy", "test", "data.split='test'")],
)
def test_unknown_family_or_split(family, split, named):
    task = tasks.make("search:late_share=0.5,block_share=0.25")  # in any order
    assert task == search.Search(block_share=0.25, late_share=0.5)
    with pytest.raises(ValueError, match=named):
        task.records(family, split, seed=0)


@pytest.mark.parametrize(
    "given, named",
    [
        (
            "search:share=1",
            "data.task=search:share=1: share is not one of .*late_share",
        ),
        ("search:late_share=0.5,late_share=1", "names late_share twice"),
        ("search:block_share=x", "block_share=x is not a number"),
        ("search:block_share", "block_share= is not a number"),
        ("search:late_share=1.5", "late_share=1.5 must be from 0 to 1"),
        ("search:late_share=nan", "late_share=nan must be from 0 to 1"),
    ],
)
def test_a_wrong_task_or_option_is_named(given, named):
    with pytest.raises(ValueError, match=named):
        tasks.make(given)


def test_conclusions_are_those_of_the_language_alone():
    for record in records(block_share=1.0, n=50):
        pair = "{}+{}".format(*sorted(pair_of(record["question"])))
        for path in paths_of(record["response"]):
            assert tasks.conclusion(path) == (pair if tried(path)[1] else "no")
        (summary,) = re.findall("<Summary>(.*)</Summary>", record["response"])
        assert tasks.conclusion(summary, summary=True) == pair
    assert tasks.conclusion("So it is 12+13 yes") is None
    assert tasks.conclusion("So it is 12+13", summary=True) is None


def test_work_is_what_a_search_looked_at():
    for record in records("hard", block_share=1.0, n=100):
        for path in paths_of(record["response"]):
            named, _ = tried(path)
            assert tasks.work(path) == tuple(f"{a}+{b}" for a, b in named)
    assert tasks.work("left 1+6 no 2+5 no 1+6 no 3+") == ("1+6", "2+5")
    assert tasks.work(" right ") == tasks.work("left") == ()
    for other in ("", "So 12+13 is 25", "left over are 5 apples", "leftmost 1+2"):
        assert tasks.work(other) is None


def test_a_question_is_asked_as_it_is_typed():
    question = records()[0]["question"]
    assert tasks.make("search").as_asked(f" {question.strip()} ") == question
