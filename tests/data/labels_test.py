"""Labels of paths as tokens: exactly what the sampler forces, in every kind of tokenizer."""

import numpy as np
import pytest
from tokenizers import normalizers

from pr1_jax import tags
from pr1_jax.data import streams, tokenizer_files, traces
from pr1_jax.sampler.settings import Settings, Vocab
from tests.helpers.llama_tokenizer import ALWAYS, PREPEND, REPLACE, write

WORDS = ("\n", " ", "#", " 1", " 2", *map(str, range(10)), "ab", "é")


@pytest.fixture(params=["words", "bytes", "prepend", "metaspace"])
def tokenizer(request, by_bytes, tmp_path):
    if request.param == "words":
        return tokenizer_files.from_words(WORDS, pattern=r" [12]|ab|[\s\S]")
    if request.param == "bytes":
        return by_bytes
    how = {"steps": (), "spaces": ALWAYS} if request.param == "metaspace" else {}
    return tokenizer_files.load(write(tmp_path, **how))


LABELS = [(" 1", " 2"), ("1", "2", " ab"), ("#1 ", "#2 "), (" ", "ab"), ("é", " #")]


@pytest.mark.parametrize("labels", LABELS)
def test_a_trace_has_the_tokens_that_the_sampler_forces(tokenizer, labels):
    """They are told apart from what follows, although some would merge with it."""
    paths = "<Path>ab</Path><Path> 2</Path><Path>#ab</Path><Path></Path>"
    paths = paths[: [30, 46][len(labels) > 2]]
    text = f"ab<Parallel>{paths}</Parallel>\n<Summary>ab</Summary>\n<Parallel>"
    text += f"{paths}</Parallel>\n<Summary></Summary> 1"
    vocab = Vocab.of(tokenizer, tags.Grammar(labels))
    assert vocab.label_ids == tokenizer.label_ids(labels)
    text = tags.canonical(text, tags.Grammar(labels))
    how = {"variant": "structured", "grammar": tags.Grammar(labels)}
    trace = traces.from_text([5], text, tokenizer, **how)
    assert tokenizer.decode(trace.tokens, continues=True) == text
    starts = np.flatnonzero(trace.tokens == tokenizer.tag_ids[tags.PATH])
    assert len(starts) == 2 * min(len(labels), 3)
    forced = np.zeros(len(trace.tokens), bool)
    for start in starts:
        label = vocab.label_ids[trace.path[start] - 1]
        assert tuple(trace.tokens[start + 1 :][: len(label)]) == label
        forced[start + 1 :][: len(label)] = True
    np.testing.assert_array_equal(trace.forced, forced)


def test_a_label_that_would_merge_is_kept_apart(tmp_path):
    t = tokenizer_files.load(write(tmp_path))
    text = "<Parallel><Path> ab</Path><Path>-a</Path></Parallel>\n<Summary></Summary>"
    how = {"variant": "structured"}
    merged = traces.from_text([5], text, t, **how)
    apart = traces.from_text([5], text, t, grammar=tags.Grammar((" ", "-")), **how)
    assert len(apart.tokens) == len(merged.tokens) + 1
    pieces = t.pieces(apart.tokens, continues=True)
    assert [pieces[i] for i in np.flatnonzero(apart.forced)] == [" ", "-"]


@pytest.mark.parametrize("words", [False, True])
def test_plans_are_tokens_where_they_are_used(words, tmp_path):
    t = tokenizer_files.load(write(tmp_path))
    if words:
        t = tokenizer_files.from_words(WORDS, pattern=r" [12]|ab|[\s\S]")
    size, six = t.vocab_size, dict(t.tag_ids)
    assert [*six] == [*tags.TAGS] and Vocab.of(t).tag_ids == (*six.values(),)
    t.use_plans()
    grammar = tags.Grammar((" 1", " 2"), planned=True)
    assert [*t.tag_ids] == [*grammar.tags] and t.vocab_size == size + 2
    assert t.new_tags[-2:] == tags.PLAN_TAGS
    vocab = Vocab.of(t, grammar)
    assert vocab.tag_ids == (*t.tag_ids.values(),) and vocab.num_tokens == size + 2
    assert vocab.ban_ids == (*six.values(), *t.eos_ids, size, size + 1)
    path, end = "<Path> 1ab</Path><Path> 2</Path>", "</Parallel>\n<Summary></Summary>"
    text = f"ab<Parallel><Plan>ab</Plan><Plan></Plan>{path}{end}"
    how = {"variant": "structured"}
    trace = traces.from_text([5], text, t, grammar=grammar, **how)
    assert t.decode(trace.tokens, continues=True) == text
    assert trace.tokens.tolist().count(size) == 2
    assert np.flatnonzero(trace.path)[0] == trace.tokens.tolist().index(six["<Path>"])
    plain = traces.from_text([5], f"ab<Parallel>{path}{end}", t, **how)
    with pytest.raises(ValueError, match="where <Path> was expected"):
        traces.from_text([5], text, t, **how)  # ordinary text, and out of place
    assert plain.num_blocks == 1


@pytest.mark.parametrize("label", ["<Path>", " 1</Path>", "{eos}"])
def test_a_label_with_a_special_token_is_named(tokenizer, label):
    label = label.replace("{eos}", tokenizer.hf_tokenizer.eos_token)
    assert_refused(tokenizer, label, "has a special token, such as a tag or EOS")


def test_a_label_that_tokens_do_not_spell_exactly_is_named(tmp_path):
    words = tokenizer_files.from_words(WORDS, pattern=r" [12]|ab|[\s\S]")
    assert_refused(words, "one", "is no text of the tokenizer (not in the vocabulary")
    composing = write(tmp_path, steps=(normalizers.NFC(), PREPEND, REPLACE))
    assert_refused(tokenizer_files.load(composing), "e\u0301", "is read as 'é' once")


def assert_refused(tokenizer, label, reason):
    with pytest.raises(ValueError, match="rollout.path_labels: ") as error:
        Vocab.of(tokenizer, tags.Grammar((" 1", label)))
    message = str(error.value)
    assert repr(label) in message and reason in message and "\n" not in message
    assert "or () for none" in message


SETTINGS = {"max_prompt_tokens": 8, "max_response_tokens": 60}


@pytest.mark.parametrize(
    "labels, reason",
    [
        (" 12", "must hold texts"),
        ((" 1", ""), "must hold texts"),
        ((" 1", 2), "must hold texts"),
        (None, "must hold texts"),
        ((" 1",), "is too few for rollout.num_paths=2"),
        ((" 1", " 1"), "has a label twice"),
    ],
)
def test_settings_refuse_labels_that_do_not_name_the_paths(labels, reason):
    with pytest.raises(ValueError, match="rollout.path_labels=") as error:
        Settings(**SETTINGS, path_labels=labels)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_paths_must_have_room_for_their_labels(by_bytes):
    settings = Settings(**SETTINGS, path_labels=[" 1", " no 2"], min_path_tokens=6)
    assert settings.path_labels == (" 1", " no 2")  # JSON has lists
    vocab = Vocab.of(by_bytes, settings.grammar)
    with pytest.raises(ValueError, match="min_path_tokens=6 .* set it to 7 or more"):
        settings.check_vocab(vocab)


def test_streams_label_what_lacks_it_and_drop_what_has_too_many_paths(by_bytes):
    block = "<Parallel><Path>a</Path>{}<Path> 2 b</Path></Parallel><Summary></Summary>"
    source = [
        {"question": "x", "answer": "1", "response": block.format(more)}
        for more in ("", "<Path>c</Path>", "")
    ]
    stream = streams.trace_stream(
        source,
        by_bytes,
        variant="structured",
        template="plain",
        max_prompt_tokens=9,
        max_response_tokens=99,
        grammar=tags.Grammar((" 1", " 2")),
        batch_size=2,
        seed=0,
        shuffle=False,
    )
    texts = [by_bytes.decode(t.tokens) for t in next(stream)]
    expected = "<Parallel><Path> 1 a</Path><Path> 2 b</Path></Parallel>\n<Summary>"
    assert texts == [f"{expected}</Summary>"] * 2
    assert stream.counts == {"kept": 2, "malformed": 1}
