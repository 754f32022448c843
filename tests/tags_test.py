"""Tags: the format check, canonical text, and the real traces."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pr1_jax import tags
from pr1_jax.system import files
from pr1_jax.tags import (
    END_PARALLEL,
    PARALLEL,
    TAGS,
    Grammar,
    canonical,
    check_format,
)

_TRACES = Path(__file__).parents[2] / "shared" / "data" / "parallel_gsm8k_sample.jsonl"

_A, _S = "<Path>a</Path>", "<Summary>s</Summary>"
_PATHS = f"<Parallel>{_A}<Path>b</Path>"  # 38 characters
_BLOCK = f"{_PATHS}</Parallel>\n{_S}"

GOOD = [
    "",
    "no tags at all, < Path> and <path> and </ Summary> are none",
    _BLOCK,
    f"x {_BLOCK} y {_BLOCK} z",
    _BLOCK.replace("<Path>b</Path>", "<Path>b</Path>" * 7),
    "<Parallel>stray<Path></Path>text<Path></Path></Parallel>is text<Summary></Summary>",
]

# Text, then of each fault its tag, its offset and what was expected.
BAD = [
    ("</Path>", "</Path> at 0: <Parallel>"),
    ("ab</Parallel>", "</Parallel> at 2: <Parallel>"),
    ("</Summary>", "</Summary> at 0: <Parallel>"),
    ("<Path>outside a block</Path>", "<Path> at 0: <Parallel>"),
    (_S, "<Summary> at 0: <Parallel>"),
    ("<Path>x", "<Path> at 0: <Parallel>", "<Path> at 0: </Path> before the end"),
    ("<Parallel>", "<Parallel> at 0: </Parallel> before the end"),
    ("<Parallel><Path>x", "<Path> at 10: </Path>", "<Parallel> at 0: </Parallel>"),
    (f"<Parallel></Parallel>{_S}", "</Parallel> at 10: <Path> (0 of at least 2"),
    (f"<Parallel>{_A}</Parallel>{_S}", "</Parallel> at 24: <Path> (1 of at least 2"),
    (f"<Parallel><Path>a{_A}</Parallel>{_S}", "<Path> at 17: </Path>"),
    (f"<Parallel>{_A}<Path>b</Parallel>{_S}", "</Parallel> at 31: </Path>"),
    (f"<Parallel>{_A}b</Path>{_A}</Parallel>{_S}", "</Path> at 25: <Path> (1 of"),
    (f"{_PATHS}</Parallel> and on", "</Parallel> at 38: <Summary> before the end"),
    (f"{_PATHS}</Parallel>s</Summary>", "</Summary> at 50: <Summary>"),
    (f"{_PATHS}</Parallel><Summary>s", "<Summary> at 49: </Summary> before the end"),
    (f"{_PATHS}{_S}", "<Summary> at 38: <Path> or </Parallel>"),
    (f"{_PATHS}</Parallel><Summary>s{_S}", "<Summary> at 59: </Summary>"),
    (f"{_PATHS}</Parallel><Summary>{_A}</Summary>", "<Path> at 58: </Summary>"),
    (f"{_PATHS}</Parallel>{_BLOCK}", "<Parallel> at 49: <Summary>"),
    (f"<Parallel>{_BLOCK}", "<Parallel> at 10: <Path> (0 of at least 2"),
    (f"{_BLOCK}</Path> then {_BLOCK}", f"</Path> at {len(_BLOCK)}: <Parallel>"),
]

_PLANNED = Grammar(planned=True)
_P, _Q = "<Plan>p</Plan>", "<Plan></Plan>"
_PLANS = f"<Parallel>{_P}{_P}"  # 38 characters
# The same of blocks that are planned.
BAD_PLANS = [
    ("ab<Plan>", "<Plan> at 2: <Parallel>", "<Plan> at 2: </Plan> before the end"),
    ("</Plan>", "</Plan> at 0: <Parallel>"),
    (_BLOCK, "<Path> at 10: <Plan> (0 of at least 2 plans so far)"),
    (
        f"<Parallel>{_P}{_A}{_A}</Parallel>{_S}",
        "<Path> at 24: <Plan> (1 of at least 2 plans so far)",
    ),
    (
        f"{_PLANS}{_A}</Parallel>{_S}",
        "</Parallel> at 52: <Path> (1 of 2 planned paths so far)",
    ),
    (
        f"{_PLANS}{_A * 3}</Parallel>{_S}",
        "<Path> at 66: </Parallel> (2 of 2 planned paths so far)",
    ),
    (
        f"{_PLANS}{_P}{_A * 2}</Parallel>{_S}",
        "</Parallel> at 80: <Path> (2 of 3 planned paths so far)",
    ),
    (
        f"{_PLANS}{_A}{_Q}{_A}</Parallel>{_S}",
        "<Plan> at 52: <Path> (1 of 2 planned paths so far)",
    ),
    (f"{_PLANS}</Parallel>{_S}", "</Parallel> at 38: <Plan> or <Path>"),
    (f"{_PLANS}<Plan>x{_A * 3}</Parallel>{_S}", "<Path> at 45: </Plan>"),
    (f"{_PLANS}{_A}<Path>{_Q}</Path></Parallel>{_S}", "<Plan> at 58: </Path>"),
    (f"{_PLANS}{_A * 2}</Parallel><Summary>{_Q}</Summary>", "<Plan> at 86: </Summary>"),
    (f"{_PLANS}<Plan>", "<Plan> at 38: </Plan> before", "<Parallel> at 0: </Parallel>"),
]

_tag_soup = st.lists(
    st.sampled_from([*TAGS, *TAGS, "", " ", "\n", "x", "<", "Path>", "\u2003", "\x00"]),
    max_size=30,
).map("".join)


_plan_soup = st.lists(
    st.sampled_from([*_PLANNED.tags, PARALLEL, *[_P, _A] * 4, _S, "</Parallel>", "x"]),
    max_size=20,
).map("".join)


@st.composite
def _well_formed(draw, planned=False) -> str:
    """Traces with blanks of all kinds around their structural tags."""
    blank = st.sampled_from(["", " ", "\n", "\n\n \t", "\u2003"])
    inner = st.sampled_from(["", " a\n", "\n", "text <b>", "1 < 2 >"])
    pieces = [draw(inner)]
    for _ in range(draw(st.integers(0, 3))):
        pieces += [PARALLEL, draw(blank)]
        paths = draw(st.integers(2, 4))
        for _ in range(paths * planned):
            pieces += ["<Plan>", draw(inner), "</Plan>", draw(blank)]
        for _ in range(paths):
            pieces += ["<Path>", draw(inner), "</Path>", draw(blank)]
        pieces += [END_PARALLEL, draw(blank), "<Summary>", draw(inner), "</Summary>"]
        pieces.append(draw(inner))
    return "".join(pieces)


@pytest.mark.parametrize("text", GOOD)
def test_well_formed(text):
    assert check_format(text) == []


@pytest.mark.parametrize("row", BAD)
def test_malformed(row):
    text, *expected = row
    faults = check_format(text)
    for fault, wanted in zip(faults, expected, strict=True):
        assert fault.startswith(wanted.replace(": ", ": expected "))
    with pytest.raises(ValueError, match=re.escape(faults[0])):
        canonical(text)


@given(_tag_soup)
def test_check_agrees_with_the_grammar(text):
    sequence = "".join(re.findall("|".join(TAGS), text))
    grammar = "(<Parallel>(<Path></Path>){2,}</Parallel><Summary></Summary>)*"
    assert (check_format(text) == []) == bool(re.fullmatch(grammar, sequence))


@pytest.mark.parametrize("row", BAD_PLANS)
def test_malformed_plans(row):
    text, *expected = row
    faults = check_format(text, _PLANNED)
    for fault, wanted in zip(faults[: len(expected)], expected, strict=True):
        assert fault.startswith(wanted.replace(": ", ": expected "))
    with pytest.raises(ValueError, match=re.escape(faults[0])):
        canonical(text, _PLANNED)


def _of_plans(number):
    return f"(<Plan></Plan>){{{number}}}(<Path></Path>){{{number}}}"


@given(st.one_of(_plan_soup, _well_formed(planned=True)))
def test_check_agrees_with_the_grammar_of_plans(text):
    sequence = "".join(re.findall("|".join(_PLANNED.tags), text))
    inside = "|".join(map(_of_plans, range(2, 21)))
    grammar = f"(<Parallel>({inside})</Parallel><Summary></Summary>)*"
    assert (check_format(text, _PLANNED) == []) == bool(re.fullmatch(grammar, sequence))


@given(_well_formed(planned=True))
def test_canonical_text_of_plans(text):
    result = canonical(text, _PLANNED)
    assert canonical(result, _PLANNED) == result
    assert not re.search(r"(<Parallel>|</Plan>|</Path>)\s+<", result)
    insides = re.compile(r"<(Plan|Path|Summary)>(.*?)</\1>", re.DOTALL)
    assert insides.findall(result) == insides.findall(text)
    labels = Grammar((" 1", " 2", " 3", " 4"), planned=True)
    labelled = canonical(text, labels)
    assert check_format(labelled, labels) == [] == check_format(labelled, _PLANNED)
    assert canonical(labelled, labels) == labelled == canonical(result, labels)
    with pytest.raises(ValueError, match="oops"):
        canonical(f"<Parallel>{_P} oops{_P}{_A * 2}</Parallel>{_S}", _PLANNED)


@given(st.one_of(_plan_soup, _well_formed(planned=True)))
def test_plans_are_ordinary_text_where_they_are_off(text):
    spelled = re.sub("<(/?)Plan>", r"[\1Plan]", text)
    assert check_format(text) == check_format(spelled)


@given(st.one_of(st.text(), _tag_soup, _well_formed()))
def test_canonical_or_reason(text):
    try:
        once = canonical(text)
    except ValueError as error:
        assert check_format(text) or "stray text" in str(error)
    else:
        assert check_format(text) == check_format(once) == []
        assert canonical(once) == once


@given(_well_formed())
def test_canonical_changes_blanks_between_structural_tags_only(text):
    result = canonical(text)
    assert not re.search(r"(<Parallel>|</Path>)\s+<", result)
    assert result.count("</Parallel>\n<Summary>") == tags.count_blocks(text)
    insides = re.compile(r"<(Path|Summary)>(.*?)</\1>", re.DOTALL)
    assert insides.findall(result) == insides.findall(text)
    outside = re.compile(r"<Parallel>.*?</Summary>", re.DOTALL)
    assert outside.split(result) == outside.split(text)


def test_canonical_by_hand():
    text = (
        "Q \n<Parallel>\n<Path>\na </Path>\n\n<Path>b</Path> </Parallel>\n\n<Summary>s"
    )
    assert canonical(text + "\n</Summary>\n\nB\n") == (
        "Q \n<Parallel><Path>\na </Path><Path>b</Path></Parallel>\n<Summary>s"
        "\n</Summary>\n\nB\n"
    )


_labels = st.sampled_from([(" 1", " 2", " 3", " 4"), ("#1:", "a", "\n", "<b>")])


@given(_well_formed(), _labels)
def test_canonical_gives_paths_the_labels_that_they_lack(text, labels):
    grammar = Grammar(labels)
    plain, labelled = canonical(text), canonical(text, grammar)
    assert canonical(labelled, grammar) == labelled == canonical(plain, grammar)
    assert check_format(labelled, grammar) == check_format(labelled) == []
    changed = len(check_format(plain, grammar))
    assert (labelled == plain) == (changed == 0)
    pieces = tags.split_labels(labelled, grammar)
    assert "".join(piece for piece, _ in pieces) == labelled
    numbers = [number for _, number in pieces if number is not None]
    old, new = (
        re.findall("<Path>(.*?)</Path>", x, re.DOTALL) for x in (plain, labelled)
    )
    assert len(numbers) == len(old) == len(new)
    for number, before, after in zip(numbers, old, new):
        bare = tags.unlabelled(after, grammar, number)
        assert after == labels[number] + bare
        assert after == before or bare.removeprefix(" ") == before.removeprefix(" ")
    outside = re.compile(r"<Path>.*?</Path>", re.DOTALL)
    assert outside.split(plain) == outside.split(labelled)


def test_labels_by_hand():
    labels = Grammar((" 1", " 2"))
    text = f"<Parallel><Path>a</Path><Path> 2 b</Path></Parallel>\n{_S}"
    fault = "<Path> at 10: expected the label ' 1' behind it"
    assert check_format(text, labels) == [fault]
    assert "<Path> 1 a</Path><Path> 2 b</Path>" in canonical(text, labels)
    longer = text.replace(" 2", " 21")  # another number
    assert len(check_format(longer, labels)) == 2
    assert "<Path> 2 21 b</Path>" in canonical(longer, labels)
    assert tags.unlabelled(" 21 b", labels, 1) == " 21 b"
    assert tags.unlabelled(" 2 b", labels, 1) == " b"
    assert (
        tags.unlabelled(" 2 b", labels, 2)
        == tags.unlabelled(" 2 b", tags.PLAIN, 0)
        == " 2 b"
    )
    third = text.replace("</Parallel>", "<Path>c</Path></Parallel>")
    assert len(check_format(third, labels)) == 2
    with pytest.raises(ValueError, match="a block of 3 paths, .* only 2 labels"):
        canonical(third, labels)


@pytest.mark.parametrize("place", ["<Parallel>", "</Path>", "</Parallel>"])
def test_canonical_names_stray_text(place):
    text = _BLOCK.replace(place, f"{place} oops ")
    offset = text.index(" oops")
    reason = rf"stray text between {place} and <\S+> at {offset}: 'oops'"
    with pytest.raises(ValueError, match=reason):
        canonical(text)


def test_count_blocks():
    assert tags.count_blocks("") == 0
    assert tags.count_blocks(f"{_BLOCK} {_BLOCK} <Parallel>") == 3


@pytest.mark.parametrize("tag", [*TAGS, "<Parallel><Path>", "<", "\ud800<Path>\x00"])
def test_hostile_text_takes_linear_time(tag):
    start = time.perf_counter()
    faults = check_format(tag * 100_000)
    assert time.perf_counter() - start < 5
    assert (faults == []) == (tag == "<")


@pytest.mark.skipif(not _TRACES.exists(), reason=f"no real traces at {_TRACES}")
def test_real_traces():
    rows, rejected = files.read_json_lines(_TRACES), []
    for row in rows:
        try:
            text = canonical(row["response"])
        except ValueError as error:
            rejected.append(str(error))
        else:
            assert check_format(text) == []
            assert text.split() == [*_respaced(row["response"])]
    # One summary is never closed, two traces have text between structural tags.
    assert len(rows) == 341
    assert len(rejected) == 3, rejected
    assert sum("faults: <Summary> at" in reason for reason in rejected) == 1
    assert sum("stray text between" in reason for reason in rejected) == 2


def _respaced(text: str) -> list[str]:
    """The words of `text` once its structural tags touch each other."""
    text = re.sub(r"(<Parallel>|</Path>)\s+(?=<)", r"\1", text)
    return re.sub(r"</Parallel>\s*<", "</Parallel>\n<", text).split()
