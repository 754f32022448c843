"""Laws of the problems with partners, their traces and their tokenizer."""

import collections
import itertools
import re

import numpy as np
import pytest

from pr1_jax import defaults, tags
from pr1_jax.answers.verdicts import CORRECT, INCORRECT
from pr1_jax.answers.verify import check
from pr1_jax.data import endless, partner, tasks, traces

NUM = 300
FAMILIES = tuple(partner.FAMILIES)
TOKENIZER, LIMITS = tasks.make().tokenizer(), defaults.get_config().rollout


def records(family="hard", split="train", n=NUM, seed=0, **options):
    """The first records; with options they are traces."""
    task = partner.Partner(**options)
    source = task.records(family, split, seed=seed, traces=bool(options))
    return [source[i] for i in range(n)]


def parse(question):
    """Gap and rows of a question."""
    found = re.fullmatch(
        r"Which number has a partner (\d) larger\?((?: [A-D](?: \d+)+)+)\n", question
    )
    rows = re.split(" [A-D]", found[2])[1:]
    assert re.findall("[A-D]", question) == [*"ABCD"[: len(rows)]]
    return int(found[1]), [[*map(int, row.split())] for row in rows]


def looked_at(text):
    """Rows and (number, partner, verdict) that a search names, in order."""
    rows = re.findall(r" ([A-D])", text)
    steps = re.findall(r" (\d+)>(\d+) (yes|no)", text)
    return rows, [(int(a), int(b), verdict) for a, b, verdict in steps]


def paths_of(response):
    return re.findall("<Path>(.*?)</Path>", response)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", endless.SPLITS)
def test_exactly_one_number_has_a_partner_and_is_the_answer(family, split):
    for record in records(family, split):
        gap, rows = parse(record["question"])
        numbers = [*itertools.chain(*rows)]
        assert len(numbers) in partner.FAMILIES[family].lengths
        assert len({*map(len, rows)}) == 1 and len({*numbers}) == len(numbers)
        # Each partner is a number that the list might have, so that none can be skipped.
        low, high = partner.FAMILIES[family].numbers
        assert low <= min(numbers) and max(numbers) + gap <= high
        with_partner = [n for n in numbers if n + gap in numbers]
        assert with_partner == [int(record["answer"])]


def test_train_and_eval_never_ask_the_same():
    asked = {
        split: {
            (gap, frozenset(itertools.chain(*rows)))
            for record in records("easy", split, 1000)
            for gap, rows in [parse(record["question"])]
        }
        for split in endless.SPLITS
    }
    assert not asked["train"] & asked["eval"]


def test_a_record_depends_on_seed_and_index_alone():
    task = partner.Partner()
    one, other = (task.records("hard", "train", seed=3, traces=True) for _ in range(2))
    indices = [5, 0, 10**9, 5, 77]
    assert [one[i] for i in indices] == [other[i] for i in indices[::-1]][::-1]
    fresh = {r["question"] for r in records(seed=4, n=50)}
    assert not {r["question"] for r in records(n=50)} & fresh


@pytest.mark.parametrize("paths", [2, 4])
def test_a_path_goes_on_until_it_finds_or_its_row_ends(paths):
    for record in records(n=100, block_share=1.0, paths=paths):
        gap, rows = parse(record["question"])
        assert len(rows) == paths
        said = paths_of(record["response"])
        assert len(said) == paths
        for text in said:
            [letter], steps = looked_at(text)
            order = rows["ABCD".index(letter)]
            assert [n for n, _, _ in steps] == order[: len(steps)]
            assert all(partner == n + gap for n, partner, _ in steps)
            verdicts = [verdict for _, _, verdict in steps]
            right = ["yes" if n == int(record["answer"]) else "no" for n, _, _ in steps]
            assert verdicts == right
            assert len(steps) == len(order) or verdicts[-1] == "yes"


@pytest.mark.parametrize("paths", [2, 4])
def test_paths_of_planned_blocks_search_from_their_plan_to_the_next(paths):
    plans_of = lambda text: re.findall("<Plan> ([A-D])</Plan>", text)
    counts = collections.Counter()
    for record in records(block_share=1.0, paths=paths, planned=1):
        _, rows = parse(record["question"])
        plans, said = plans_of(record["response"]), paths_of(record["response"])
        assert len({*plans}) == len(plans) == len(said) and len(rows) == paths
        counts[len(plans)] += 1
        for plan, text in zip(plans, said):
            letters, steps = looked_at(text)
            own = [plan]
            while (
                following := "ABCD"[("ABCD".index(own[-1]) + 1) % paths]
            ) not in plans:
                own.append(following)
            order = [*itertools.chain(*(rows["ABCD".index(row)] for row in own))]
            assert letters == own[: len(letters)]
            assert [n for n, _, _ in steps] == order[: len(steps)]
            assert len(steps) == len(order) or steps[-1][2] == "yes"
        assert check(record["response"], record["answer"]).verdict == CORRECT
    assert {*counts} == {*range(2, paths + 1)}
    assert min(counts.values()) > NUM / len(counts) / 2


def test_a_search_without_a_block_goes_on_with_the_next_row_until_it_finds():
    for record in records(block_share=0.0):
        _, rows = parse(record["question"])
        letters, steps = looked_at(record["response"])
        first = "AB".index(letters[0])
        order = [*rows[first], *rows[1 - first]]
        assert [n for n, _, _ in steps] == order[: len(steps)]
        assert check(record["response"], record["answer"]).verdict == CORRECT
        assert not any(tag in record["response"] for tag in tags.TAGS)


def test_blocks_that_find_nothing_are_kept_and_are_wrong():
    """Of two random rows three in four answers are seen: traces are not filtered."""
    right = []
    for record in records(n=1000, block_share=1.0, own_row_share=0.0):
        ends = f" yes {record['answer']}"
        found = any(text.endswith(ends) for text in paths_of(record["response"]))
        verdict = check(record["response"], record["answer"]).verdict
        assert verdict == (CORRECT if found else INCORRECT)
        [summary] = re.findall("<Summary> (.*)</Summary>", record["response"])
        assert summary == (record["answer"] if found else "none")
        right.append(found)
    assert np.mean(right) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("paths", [2, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_share_of_the_paths_begins_with_its_own_row(paths, share):
    made = records(n=500, block_share=1.0, own_row_share=share, paths=paths)
    own = [
        text[1] == "ABCD"[i]
        for record in made
        for i, text in enumerate(paths_of(record["response"]))
    ]
    by_chance = (1 - share) / paths
    assert np.mean(own) == pytest.approx(share + by_chance, abs=0.05)


def test_all_rows_are_begun_with_equally_often():
    begun = collections.Counter()
    for record in records(n=400, block_share=0.5, paths=4):
        texts = paths_of(record["response"]) or [record["response"]]
        begun.update(text[:2] for text in texts)
    assert set(begun) == {" A", " B", " C", " D"}
    assert min(begun.values()) > 0.2 * sum(begun.values())


def test_traces_are_canonical_and_shares_are_kept():
    made = records(n=1000, block_share=0.3, late_share=0.5)
    blocks = [r["response"] for r in made if tags.PARALLEL in r["response"]]
    assert all(tags.canonical(text) == text for text in blocks)
    # Some searches before a block find the answer, and no block is needed then.
    assert len(blocks) / 1000 == pytest.approx(0.3, abs=0.06)
    late = [text for text in blocks if not text.startswith(tags.PARALLEL)]
    assert len(late) / len(blocks) == pytest.approx(0.5, abs=0.1)
    for text in late:
        _, steps = looked_at(text.partition(tags.PARALLEL)[0])
        assert 1 <= len(steps) <= 3


def test_tokens_spell_the_text():
    for record in records("easy", block_share=0.7):
        text = record["question"] + record["response"]
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert max(ids) < TOKENIZER.vocab_size
        assert TOKENIZER.eos_id not in ids


def labelled(record):
    """A trace with the default labels."""
    grammar = tags.Grammar(LIMITS.path_labels)
    return traces.from_text(
        TOKENIZER.encode(record["question"]),
        tags.canonical(record["response"], grammar),
        TOKENIZER,
        variant="structured",
        grammar=grammar,
    )


@pytest.mark.parametrize("late_share", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_traces_fit_the_default_budgets_with_their_labels(family, late_share):
    limits, longest = LIMITS, 0
    for record in records(family, n=100, block_share=0.5, late_share=late_share):
        trace = labelled(record)
        assert len(trace.prompt) <= limits.max_prompt_tokens
        assert len(trace.tokens) <= limits.max_response_tokens
        for block, path in {*zip(trace.block.tolist(), trace.path.tolist())}:
            here = (trace.block == block) & (trace.path == path)
            longest = max(longest, here.sum() * (block > 0))
    # A path that sees half of the list, with its label and both tags, is not cut off.
    assert longest == limits.max_path_tokens or family == "easy"


def test_a_block_that_sees_half_of_the_list_each_meets_the_default_deadline():
    """And no search that sees all of it does."""
    lone, block = (
        max(
            labelled(record).sequential_steps
            for record in records(n=100, block_share=share)
        )
        for share in (0.0, 1.0)
    )
    assert block == LIMITS.max_sequential_steps < lone


def test_guessing_is_hard():
    counts = collections.Counter(r["answer"] for r in records("hard", "eval", 1000))
    assert counts.most_common(1)[0][1] / 1000 < 0.06


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_model_is_known_to_speak_a_task_by_its_tokenizer(name):
    assert tasks.spoken(tasks.make(name).tokenizer()) == tasks.make(name)
    planned = tasks.make(name).tokenizer()
    planned.use_plans()
    task = tasks.spoken(planned, 4)
    assert task == (partner.Partner(paths=4) if name == "partner" else tasks.make(name))
    assert tasks.spoken(planned, 3) == tasks.make(name)


def test_the_default_task_is_not_spoken_by_other_tokenizers(by_bytes):
    assert tasks.make() == partner.Partner()
    assert tasks.spoken(by_bytes) is None
    question = records()[0]["question"]
    assert tasks.make().as_asked(f" {question.strip()} ") == question


@pytest.mark.parametrize(
    "given, named",
    [
        ("sorting", "data.task=sorting is not one of"),
        ("partner:paths=3", "paths=3.0 must be 2 or 4"),
        ("partner:paths=2.5", "paths=2.5 must be"),
        ("partner:late_share=1.5", "late_share=1.5 must be from 0 to 1"),
        ("partner:own_row_share=-1", "own_row_share=-1.0 must be from 0 to 1"),
        ("partner:block_share=nan", "block_share=nan must be from 0 to 1"),
        ("partner:hard_share=1", "hard_share is not one of"),
    ],
)
def test_a_wrong_option_is_named(given, named):
    with pytest.raises(ValueError, match=named):
        tasks.make(given)


def test_unknown_family_or_split():
    with pytest.raises(ValueError, match="data.family='odd'"):
        partner.Partner().records("odd", "eval", seed=0)
    with pytest.raises(ValueError, match="data.split='test'"):
        partner.Partner().records("easy", "test", seed=0)


def test_conclusions_and_work_are_those_of_the_language_alone():
    task = partner.Partner()
    for record in records(n=50, block_share=1.0):
        for text in paths_of(record["response"]):
            _, steps = looked_at(text)
            found = text.endswith(f" yes {record['answer']}")
            assert task.conclusion(text) == (record["answer"] if found else "no")
            assert task.work(text) == tuple(f"{a}>{b}" for a, b, _ in steps)
    assert task.conclusion(" 12", summary=True) == "12"
    assert task.conclusion(" none", summary=True) == "no"
    assert task.conclusion(" A 51>55 no 12") == "no"  # cut off
    assert task.work(" A 51>55 no 51>55 no 12") == ("51>55",)
    assert task.work(" A 51>55 yes 51") == ("51>55",)
    for other in ("Alice has 3 cats", "left 12+13 yes", " 12", "", "B", "so 5>4 yes 5"):
        assert task.conclusion(other) is None and task.work(other) is None
    assert task.conclusion("so 12", summary=True) is None
