"""Tests of pr1_jax.layout: the method's example, its rule in other words, bad traces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pr1_jax import layout, tags

TAG_IDS = {tag: 10 + i for i, tag in enumerate(tags.TAGS)}
PLANNED_IDS = {tag: 10 + i for i, tag in enumerate(tags.Grammar(planned=True).tags)}
EXAMPLE = (
    "A <Parallel> <Path> x y </Path> <Path> z </Path> </Parallel> \\n "
    "<Summary> s </Summary> B"
)
TEXT = 3  # any id that is no tag


def encode(text):
    """Token ids of words apart by spaces; whatever is no tag is text."""
    return [PLANNED_IDS.get(word, TEXT) for word in text.split()]


def parse(text, prompt_length=0):
    return layout.structured(encode(text), TAG_IDS, prompt_length)


def seen_by(parsed, query):
    return np.flatnonzero(layout.visible(parsed)[query]).tolist()


# --- The worked example -------------------------------------------------------------


def test_worked_example():
    parsed = parse(EXAMPLE)
    positions = [0, 1, 2, 3, 4, 5, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert parsed.positions.tolist() == positions
    assert parsed.block.tolist() == [0, 0] + [1] * 7 + [0] * 6
    assert parsed.path.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2] + [0] * 6
    assert all(x.dtype == np.int32 for x in parsed)
    again = layout.structured_positions(parsed.block, parsed.path, 0)
    assert again.tolist() == positions and again.dtype == np.int32
    visible = layout.visible(parsed)
    assert visible.dtype == bool and visible.shape == (15, 15)
    assert seen_by(parsed, 4) == [0, 1, 2, 3, 4]
    assert seen_by(parsed, 7) == [0, 1, 6, 7]
    assert seen_by(parsed, 9) == list(range(10))
    assert seen_by(parsed, 14) == list(range(15))


def test_second_block_counts_on_and_hides_only_its_own_siblings():
    block = "<Parallel> <Path> x </Path> <Path> </Path> </Parallel> \\n <Summary> "
    parsed = parse(f"{block} </Summary> {block} </Summary>")
    one = [0, 1, 2, 3, 1, 2, 4, 5, 6, 7]
    assert parsed.positions.tolist() == one + [8 + p for p in one]
    again = layout.structured_positions(parsed.block, parsed.path, 0)
    assert again.tolist() == parsed.positions.tolist()
    assert parsed.block.max() == 2
    assert seen_by(parsed, 15) == [*range(11), 14, 15]  # </Path> of the empty path


def test_prompt_stays_causal_whatever_it_says():
    # A prompt of 4 tokens; only its length is known here, so tags in it mean nothing.
    parsed, alone = parse(EXAMPLE, prompt_length=4), parse(EXAMPLE)
    assert parsed.positions[:4].tolist() == [0, 1, 2, 3]
    assert (parsed.positions[4:] == alone.positions + 4).all()
    assert not parsed.block[:4].any() and not parsed.path[:4].any()
    visible = layout.visible(parsed)
    assert (visible[:4, :4] == np.tril(np.ones((4, 4), bool))).all()
    assert visible[4:, :4].all() and not visible[:4, 4:].any()
    assert (visible[4:, 4:] == layout.visible(alone)).all()


def test_empty_response_and_plain_text_are_causal():
    for text, prompt_length in (("", 0), ("", 3), ("A B C", 2)):
        parsed = parse(text, prompt_length)
        plain = layout.causal(prompt_length + len(text.split()))
        for got, expected in zip(parsed, plain, strict=True):
            np.testing.assert_array_equal(got, expected)


PLANNED = (
    "A <Parallel> <Plan> p </Plan> <Plan> q </Plan> <Path> 1 x y </Path> "
    "<Path> 2 z </Path> </Parallel> \\n <Summary> s </Summary> B"
)


def parse_planned(text, prompt_length=0):
    return layout.structured(encode(text), PLANNED_IDS, prompt_length)


def test_worked_example_of_plans():
    """That of docs/method.md, section 10."""
    parsed = parse_planned(PLANNED)
    positions = [*range(8), 8, 9, 10, 11, 12, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18]
    assert parsed.positions.tolist() == positions
    assert parsed.block.tolist() == [0] * 8 + [1] * 9 + [0] * 6
    assert parsed.path.tolist() == [0] * 8 + [1] * 5 + [2] * 4 + [0] * 6
    again = layout.structured_positions(parsed.block, parsed.path, 0)
    assert again.tolist() == positions
    assert seen_by(parsed, 8) == [*range(9)]
    assert seen_by(parsed, 15) == [*range(8), 13, 14, 15]
    assert seen_by(parsed, 17) == [*range(18)]


MALFORMED_PLANS = {
    "no plan": (EXAMPLE, "token 2: <Path> where <Plan> was"),
    "one plan": ("<Parallel> <Plan> </Plan> <Path>", "token 3: <Path> where <Plan>"),
    "text between plans": ("<Parallel> <Plan> </Plan> x", "token 3: text where <Plan>"),
    "nested plan": ("<Parallel> <Plan> <Plan>", "token 2: <Plan> where text or </Pl"),
    "too few paths": (
        PLANNED.replace("<Path> 2 z </Path> ", ""),
        "token 13: </Parallel> where <Path> .1 of 2 planned paths",
    ),
    "too many paths": (
        PLANNED.replace("</Path> </Par", "</Path> <Path> </Path> </Par"),
        "token 17: <Path> where </Parallel> .2 of 2 planned paths",
    ),
    "a late plan": (
        PLANNED.replace("<Path> 2 z </Path> ", "<Plan> </Plan>"),
        "token 13: <Plan> where <Path> .1 of 2 planned paths",
    ),
    "an open list": (
        "<Parallel> <Plan> </Plan> <Plan> </Plan>",
        "ends where <Plan> or",
    ),
    "a plan alone": ("A <Plan>", "token 1: <Plan> where text or <Parallel> was"),
}


@pytest.mark.parametrize("text, reason", MALFORMED_PLANS.values(), ids=MALFORMED_PLANS)
def test_malformed_plans_name_token_and_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_planned(text, 3)


# --- Any well-formed response -------------------------------------------------------

lengths = st.integers(0, 4)
blocks = st.tuples(st.lists(lengths, min_size=2, max_size=8), lengths)
# Text tokens, or a block: the text tokens of each of its paths, and of its summary.
responses = st.lists(st.one_of(st.integers(1, 3), blocks), max_size=5)


def spec_reference(response, prompt_length, planned=False):
    """Tokens, positions and visibility by the words of docs/method.md, section 2.

    A key is hidden from the queries after its own path's end that come before its
    block's `</Parallel>`; there is no other rule but that no query looks ahead.
    """
    tokens, positions = [], list(range(prompt_length))
    hidden_from = {}  # key -> range of queries

    def write(words, first_position):
        tokens.extend(encode(words))
        positions.extend(range(first_position, first_position + len(words.split())))
        return positions[-1]

    last = prompt_length - 1  # position of the latest main-stream token
    for part in response:
        if isinstance(part, int):
            last = write("x " * part, last + 1)
            continue
        paths, summary = part
        fork = write("<Parallel>", last + 1)
        for length in paths if planned else ():  # plans are as long as paths here
            fork = write("<Plan> " + "x " * length + "</Plan>", fork + 1)
        ends = []
        spans = []
        for length in paths:
            start = len(positions)
            ends.append(write("<Path> " + "x " * length + "</Path>", fork + 1))
            spans.append(range(start, len(positions)))
        join = len(positions)
        for span in spans:
            hidden_from |= {key: range(span.stop, join) for key in span}
        closing = "</Parallel> \\n <Summary> " + "x " * summary + "</Summary>"
        last = write(closing, max(ends) + 1)
    N = len(positions)
    visible = np.zeros((N, N), bool)
    for q in range(N):
        for k in range(q + 1):
            visible[q, k] = q not in hidden_from.get(k, ())
    return tokens, positions, visible


@settings(max_examples=80, deadline=None)
@given(responses, st.integers(0, 3), st.booleans())
def test_positions_and_visibility_follow_the_spec(response, prompt_length, planned):
    tokens, positions, visible = spec_reference(response, prompt_length, planned)
    ids = PLANNED_IDS if planned else TAG_IDS
    parsed = layout.structured(tokens, ids, prompt_length)
    assert parsed.positions.tolist() == positions
    np.testing.assert_array_equal(layout.visible(parsed), visible)


@settings(max_examples=80, deadline=None)
@given(
    responses.filter(lambda r: any(isinstance(part, tuple) for part in r)),
    st.booleans(),
    st.data(),
)
def test_a_response_that_lost_a_tag_is_malformed(response, planned, data):
    tokens, _, _ = spec_reference(response, 0, planned)
    lost = data.draw(st.sampled_from([i for i, t in enumerate(tokens) if t != TEXT]))
    with pytest.raises(ValueError, match="malformed response"):
        ids = PLANNED_IDS if planned else TAG_IDS
        layout.structured(tokens[:lost] + tokens[lost + 1 :], ids, 0)


# --- Malformed responses ------------------------------------------------------------

PAIR = "<Parallel> <Path> x </Path> <Path> y </Path>"  # tokens 0 to 6
CLOSED = f"{PAIR} </Parallel>"
TOLD = f"{CLOSED} \\n <Summary>"
MALFORMED = {
    "nested block": (f"A <Parallel> <Path> {PAIR}", "token 3: <Parallel> where text"),
    "nested path": ("<Parallel> <Path> x <Path>", "token 3: <Path> where text or </P"),
    "one path": ("<Parallel> <Path> </Path> </Parallel>", "token 3: </Parallel> where"),
    "no path": ("<Parallel> </Parallel>", "token 1: </Parallel> where <Path> was"),
    "text before the first path": ("<Parallel> x <Path>", "token 1: text where <Path>"),
    "text between paths": (
        "<Parallel> <Path> </Path> x <Path> </Path>",
        "token 3: text where <Path> .a block has two or more",
    ),
    "text after the paths": (f"{PAIR} x", "token 7: text where <Path> or </Parallel>"),
    "path outside a block": ("A <Path> x </Path>", "token 1: <Path> where text or <P"),
    "missing newline": (f"{CLOSED} <Summary>", "token 8: <Summary> where the newline"),
    "missing summary": (f"{CLOSED} \\n B", "token 9: text where <Summary>"),
    "block in a summary": (f"{TOLD} {PAIR}", "token 10: <Parallel> where text or </Su"),
    "unclosed block": ("A <Parallel>", "the response ends where <Path> was"),
    "unclosed path": ("<Parallel> <Path> x", "ends where text or </Path> was"),
    "block without its end": (PAIR, "ends where <Path> or </Parallel> was"),
    "block without a newline": (CLOSED, "ends where the newline after"),
    "block without a summary": (f"{CLOSED} \\n", "ends where <Summary> was"),
    "unclosed summary": (f"{TOLD} s", "ends where text or </Summary> was"),
} | {
    f"{tag} alone": (f"A B {tag}", f"token 2: {tag} where text or <Parallel> was")
    for tag in tags.TAGS
    if tag != tags.PARALLEL
}


@pytest.mark.parametrize("text, reason", MALFORMED.values(), ids=MALFORMED)
def test_malformed_responses_name_token_and_reason(text, reason):
    for prompt_length in (0, 5):  # the index is the response's own
        with pytest.raises(ValueError, match=reason):
            parse(text, prompt_length)


def test_missing_tag_ids_and_negative_prompt_length_are_named():
    ids = {tag: i for tag, i in TAG_IDS.items() if tag != "</Path>"}
    with pytest.raises(ValueError, match=r"tag_ids lacks \['</Path>'\]"):
        layout.structured([TEXT], ids, 0)
    with pytest.raises(ValueError, match=r"tag_ids lacks \['</Plan>'\]"):
        layout.structured([TEXT], TAG_IDS | {"<Plan>": 16}, 0)
    with pytest.raises(ValueError, match="prompt_length=-1"):
        layout.structured([TEXT], TAG_IDS, -1)
