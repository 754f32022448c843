"""Traces of other systems: what becomes of them, and what is refused."""

import copy
import random
import re
import sys

import numpy as np
import pytest

from pr1_jax import tags
from pr1_jax.answers.extract import extract
from pr1_jax.data import published_traces, traces
from pr1_jax.data.published_traces import SHAPES, convert
from pr1_jax.data.rows import Dropped

THREADWEAVER = """\
<think>
If $x<3$ then `a < b`.

<Parallel>
<Outlines>
<Outline>1: Try $x \\le 1$: the low end</Outline>
<Outline>2: Try $1<x<3$</Outline>
<Outline>3: Ünïcode → 高い</Outline>
</Outlines>
<Thread>
1: For $x \\le 1$:
```
if x < 1: print("</p>")
```
</Thread><Thread>
2: No root, since $f(x)<0$.
</Thread><Thread>
3: 高い, 2: 1
</Thread>
</Parallel>

So the low end
has it: $x=0$.

Check: fine.
</think>

The root is $0$, so \\boxed{0}."""
THREADWEAVER_PLANNED = """\
If $x<3$ then `a < b`.

<Parallel><Plan>Try $x \\le 1$: the low end</Plan><Plan>Try $1<x<3$</Plan>\
<Plan>Ünïcode → 高い</Plan><Path> For $x \\le 1$:
```
if x < 1: print("</p>")
```</Path><Path> No root, since $f(x)<0$.</Path><Path> 高い, 2: 1</Path></Parallel>
<Summary>So the low end
has it: $x=0$.</Summary>

Check: fine.

The root is $0$, so \\boxed{0}."""

MULTIVERSE = """\
<Think>
Two cases.
Let's think in parallel.
<Parallel>
<Goal>
<Outline>
1: Count the even ones.
</Outline>
<Outline>
2: Count the odd ones.
</Outline>
</Goal>
<Path>
1: There are 4.
</Path>
<Path>
2: By size.
Let's think in parallel.
<Parallel>
<Goal>
<Outline>
2.1: Below 5.
</Outline>
<Outline>
2.2: Above.
</Outline>
</Goal>
<Path>
2.1: 1 and 3.
</Path>
<Path>
2.2: 5 and 7.
</Path>
<Conclusion>
Two and two.
</Conclusion>
</Parallel>
So 4.
</Path>
<Conclusion>
Four each.
</Conclusion>
</Parallel>
Thus 8.
</Think>"""
MULTIVERSE_PLANNED = """\
Two cases.
Let's think in parallel.
<Parallel><Plan>Count the even ones.</Plan><Plan>Count the odd ones.</Plan>\
<Path> There are 4.</Path><Path> By size.
Let's think in parallel.
2.1: Below 5.
2.2: Above.
2.1: 1 and 3.
2.2: 5 and 7.
Two and two.
So 4.</Path></Parallel>
<Summary>Four each.</Summary>
Thus 8."""

NPR = """\
<guideline>
<plan>1: Bound it.</plan>
</guideline>
<step>
1: At most 9.
</step>
<takeaway>
Small.
</takeaway>

<guideline>
<plan>1: Go up.</plan>
<plan>2: Go down.</plan>
</guideline>
<step>
1: From 0: 7.
</step>
<step>
2: From 9: 7.
</step>
<takeaway>
Both say 7.
</takeaway>

It is \\boxed{7}."""
NPR_PLANNED = """\
1: Bound it.
1: At most 9.
Small.

<Parallel><Plan>Go up.</Plan><Plan>Go down.</Plan><Path> From 0: 7.</Path>\
<Path> From 9: 7.</Path></Parallel>
<Summary>Both say 7.</Summary>

It is \\boxed{7}."""


PLANNED = tags.Grammar((" 1", " 2", " 3", " 4", " 5"), planned=True)


def check_planned(text):
    """Whether a text is canonical, but for labels, which canonical text then has."""
    assert tags.canonical(text, PLANNED.unlabelled) == text
    labelled = tags.canonical(text, PLANNED)
    assert tags.check_format(labelled, PLANNED) == []
    assert re.sub("<Path> [1-5] ?", "<Path>", labelled) == text.replace(
        "<Path> ", "<Path>"
    )


def without_plans(text):
    return re.sub("<Plan>.*?</Plan>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "shape, text, expected",
    [
        ("threadweaver", THREADWEAVER, THREADWEAVER_PLANNED),
        ("multiverse", MULTIVERSE, MULTIVERSE_PLANNED),
        ("npr", NPR, NPR_PLANNED),
    ],
)
def test_a_trace_of_each_shape(shape, text, expected):
    assert convert(text, shape, flatten=True) == expected
    check_planned(expected)
    unplanned = convert(text, shape, planned=False, flatten=True)
    assert unplanned == without_plans(expected)
    assert tags.canonical(unplanned) == unplanned
    assert extract(unplanned) == extract(text)


def test_blocks_that_are_no_blocks_here_are_flattened_only_when_asked():
    with pytest.raises(Dropped, match="<Parallel> at 234: expected no block") as drop:
        convert(MULTIVERSE, "multiverse")
    assert drop.value.reason == published_traces.NESTED
    with pytest.raises(Dropped, match="<guideline> at 0: expected two paths") as drop:
        convert(NPR, "npr")
    assert drop.value.reason == published_traces.ONE_PATH


def test_a_block_inside_a_single_path_stays_a_block():
    inner = NPR[NPR.index("\n\n<guideline>") : NPR.index("\n\nIt is")].strip()
    text = NPR.replace("1: At most 9.", f"1: At most 9.\n{inner}\nSo.")
    made = convert(text, "npr", flatten=True)
    assert made.count("<Parallel>") == 2
    assert made.startswith("1: Bound it.\n1: At most 9.\n<Parallel><Plan>Go up.</Plan>")


def test_flattened_text_does_not_run_into_the_text_around_it():
    single = "<guideline><plan>1: p</plan></guideline><step>1: x</step>"
    text = f"A{single}<takeaway>s</takeaway>B"
    assert convert(text, "npr", flatten=True) == "A\n1: p\n1: x\ns\nB"
    made = convert(
        weave("B").replace("a<", f"a{weave()[1:]}c<"), "threadweaver", flatten=True
    )
    assert "<Path> a\n1: p\n2: q\n1: a\n2: b\nc</Path>" in made


PLANS = "<Outlines><Outline>1: p</Outline><Outline>2: q</Outline></Outlines>"
THREADS = "<Thread>1: a</Thread><Thread>2: b</Thread>"


def weave(behind="", conclusion=""):
    return f"A<Parallel>{PLANS}{THREADS}{conclusion}</Parallel>{behind}"


@pytest.mark.parametrize(
    "behind, summary, rest",
    [
        ("So.", "So.", ""),
        ("\n\nSo.\nThus.\n \nB\n\nC", "So.\nThus.", "\n \nB\n\nC"),
        (" So.\nFinal Answer: 5", "So.", "\nFinal Answer: 5"),
        ("\nSo.\n**Final Answer**\n5", "So.", "\n**Final Answer**\n5"),
        ("So.</think>B", "So.", "\n\nB"),
    ],
)
def test_a_summary_is_the_first_paragraph_behind_a_block_without_conclusion(
    behind, summary, rest
):
    made = convert(weave(behind), "threadweaver", planned=False)
    block = "A<Parallel><Path> a</Path><Path> b</Path></Parallel>"
    assert made == f"{block}\n<Summary>{summary}</Summary>{rest}"


def test_a_conclusion_is_the_summary_where_there_is_one():
    text = weave("\n\nSo.", "\n<Conclusion>\nBoth.\n</Conclusion>\n")
    made = convert(text, "threadweaver")
    assert made.endswith("</Parallel>\n<Summary>Both.</Summary>\n\nSo.")


REFUSED = [
    ("no_summary", weave(), "<Parallel> at 1: it has no conclusion"),
    ("no_summary", weave("\n \n</think>\nSo."), "<Parallel> at 1: it has no"),
    ("no_summary", weave(weave("So.")[1:]), "<Parallel> at 1"),
    ("no_summary", weave("\nFinal Answer: 5"), "<Parallel> at 1"),
    ("empty_element", weave("So.", "<Conclusion>\n</Conclusion>"), "<Conclusion> at"),
    ("empty_element", weave("B").replace("1: p", " \n"), "<Outline> at 21"),
    ("empty_element", weave("B").replace("1: a", "1: "), "<Thread> at 78"),
    ("wrong_number", weave("B").replace("2: b", "3: b"), "expected '2:' behind it"),
    ("wrong_number", weave("B").replace("1: p", "p"), "'1:' behind it, it begins"),
    ("wrong_number", weave("B").replace("1: a", "2.1: a"), "expected '1:' behind"),
    ("wrong_number", weave("B").replace("2: q", "02: q"), "expected '2:' behind"),
    (
        "plans_and_paths_differ",
        weave("B").replace("<Thread>2: b</Thread>", ""),
        "<Parallel> at 1: 2 plans, but 1 paths",
    ),
    (
        "stray_text",
        weave("B").replace("</Thread><", "</Thread> and\nthen <"),
        "'and\\nthen' at 99: expected <Thread> or <Conclusion> or </Parallel>",
    ),
    ("stray_text", weave("B").replace("<Outlines>", "Goal: <Outlines>"), "'Goal:' at"),
    ("our_tag", weave("B").replace("p<", "<Plan>p<"), "<Plan> at 33: no text may"),
    ("our_tag", weave("B <Summary>"), "<Summary> at 133"),
    ("wrong_tag", weave("B </Thread>"), "</Thread> at 133: expected <Parallel>"),
    ("wrong_tag", weave("B").replace(PLANS, ""), "<Thread> at 11: expected <Outlines>"),
    ("wrong_tag", weave("B").replace("a<", "</think>a<"), "expected </Thread>"),
    ("wrong_tag", weave("B").replace("p<", "<Parallel>p<"), "expected <Outlines>"),
    ("unclosed", weave()[:-11], "<Parallel> at 1: expected <Thread> or"),
    ("unclosed", weave()[:90], "<Thread> at 78: expected </Thread> before the end of"),
    ("unclosed", weave()[:30], "<Outline> at 21: expected </Outline> before"),
]


@pytest.mark.parametrize("reason, text, said", REFUSED)
def test_what_is_refused_says_why_and_where(reason, text, said):
    with pytest.raises(Dropped) as drop:
        convert(text, "threadweaver", flatten=True)
    assert drop.value.reason == reason
    assert said in str(drop.value)
    for tag, offset in re.findall(r"(<\S+>) at ([0-9]+)", str(drop.value)):
        assert text.startswith(tag, int(offset))


def test_a_block_in_a_plan_is_refused():
    text = weave("B").replace("1: p", f"1: {weave()}")
    with pytest.raises(Dropped, match="<Parallel> at 34: expected </Outline>"):
        convert(text, "threadweaver", flatten=True)


def test_a_conclusion_may_be_lacking_in_threadweaver_alone():
    text = MULTIVERSE.replace("<Conclusion>\nFour each.\n</Conclusion>\n", "")
    with pytest.raises(Dropped, match="</Parallel> at .*: expected <Path> or <Concl"):
        convert(text, "multiverse", flatten=True)


def test_endless_blocks_in_blocks_and_endless_numbers_are_refused():
    with pytest.raises(Dropped, match="expected at most 50 levels"):
        convert((weave()[:92] + " ") * sys.getrecursionlimit(), "threadweaver")
    with pytest.raises(Dropped, match="expected '1:'"):
        convert(weave().replace("1: p", "1" * 5000 + ": p"), "threadweaver")


def test_an_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="shape='sprint' is not one of"):
        convert("", "sprint")


WORDS = ["a<b", "$x\\le 3$", "高い", "1:", "</p>", "x", "2.", "`if a<1:`", "&lt;", "{}"]


class Made:
    """A random trace of a shape, and what should become of it."""

    def __init__(self, shape, seed):
        self.random, self.shape = random.Random(seed), shape
        self.source, self.target = "", ""
        for _ in range(self.random.randint(1, 3)):
            text = self.text() + self.space()
            self.both(text)
            self.block()
        self.both(self.space() + self.text())

    def both(self, text):
        self.source, self.target = self.source + text, self.target + text

    def space(self):
        return self.random.choice([" ", "\n", "\n\n", "\n \n"])

    def gap(self):
        return self.random.choice(["", "", "\n", " \n"])

    def text(self):
        number = self.random.randint(1, 6)
        words = [self.random.choice(WORDS) for _ in range(number)]
        return "x" + "".join(self.random.choice(" \n") + word for word in words)

    def elements(self, name, texts):
        for number, text in enumerate(texts, 1):
            gap, colon = self.gap(), self.random.choice([": ", ":\n", " :"])
            inside = f"{gap}{number}{colon}{text}{self.gap()}"
            self.source += f"<{name}>{inside}</{name}>{self.gap()}"
            yield colon.lstrip(" ")[1:] + text

    def block(self):
        shape, number = SHAPES[self.shape], self.random.randint(2, 5)
        opening = f"<{shape.block}>{self.gap()}" if shape.block else ""
        self.source += f"{opening}<{shape.plans}>{self.gap()}"
        plans = list(self.elements(shape.plan, [self.text() for _ in range(number)]))
        self.source += f"</{shape.plans}>{self.gap()}"
        paths = list(self.elements(shape.path, [self.text() for _ in range(number)]))
        summary, behind = self.text(), ""
        if shape.has_summary or self.random.random() < 0.5:
            self.source += f"<{shape.summary}>{self.gap()}{summary}{self.gap()}"
            self.source += f"</{shape.summary}>"
        else:
            behind = self.gap() + summary + "\n\n"
        if shape.block:
            self.source += f"{self.gap()}</{shape.block}>{behind}"
        self.target += "<Parallel>" + "".join(
            f"<Plan>{p.strip()}</Plan>" for p in plans
        )
        self.target += "".join(f"<Path>{path}</Path>" for path in paths)
        self.target += f"</Parallel>\n<Summary>{summary}</Summary>"
        self.target += "\n\n" * bool(behind)


def words(text, *names):
    """The words of a text without the tags of elements, and without their numbers."""
    name = "|".join(names)
    text = re.sub(rf"(<(?:{name})>)\s*[0-9]+\s*:", r"\1", text)
    return re.sub(rf"</?(?:{name})>", " ", text).split()


@pytest.mark.parametrize("shape", SHAPES)
def test_random_traces_keep_all_words_in_their_order(shape):
    ours = ("Parallel", "Plan", "Path", "Summary")
    for seed in range(400):
        made = Made(shape, seed)
        text = convert(made.source, shape)
        assert text == made.target.strip(), (seed, made.source)
        check_planned(text)
        theirs = re.findall("</?(\\w+)>", "".join(SHAPES[shape].tags))
        assert words(text, *ours) == words(made.source, *theirs)
        unplanned = convert(made.source, shape, planned=False)
        assert unplanned == without_plans(text)
        assert tags.canonical(unplanned) == unplanned


def test_what_is_converted_is_laid_out_with_its_plans(by_bytes):
    tokenizer = copy.deepcopy(by_bytes)
    tokenizer.use_plans()
    text = tags.canonical(convert(THREADWEAVER, "threadweaver"), PLANNED)
    for variant in ("structured", "causal"):
        trace = traces.from_text([5], text, tokenizer, variant=variant, grammar=PLANNED)
        assert tokenizer.decode(trace.tokens, continues=True) == text
        assert trace.path.max() == 3
    plans = [tokenizer.tag_ids[tag] for tag in tags.PLAN_TAGS]
    (starts, ends) = (np.flatnonzero(trace.tokens == plan) for plan in plans)
    assert len(starts) == len(ends) == 3
    for start, end in zip(starts, ends, strict=True):
        assert (trace.block[start : end + 1] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_is_broken_is_refused_or_well_formed(shape):
    """A piece of a trace is taken out, or stands twice."""
    refused = 0
    for seed in range(300):
        source, draw = Made(shape, seed).source, random.Random(seed)
        start, end = sorted(draw.randrange(len(source)) for _ in range(2))
        piece = source[start:end]
        source = source[:start] + piece * draw.choice([0, 2]) + source[end:]
        try:
            text = convert(source, shape, flatten=True)
        except Dropped as drop:
            assert re.search(r"at [0-9]+", str(drop))
            refused += 1
        else:
            check_planned(text)
    assert 50 < refused < 300
