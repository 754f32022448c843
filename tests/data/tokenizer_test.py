"""Tests of pr1_jax.tokenizer: exact round trips, tags, files, errors."""

import shutil
import time

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pr1_jax import tags
from pr1_jax.data import tokenizer, tokenizer_files

WORDS = ["\n", " ", ",", "+", "=", " yes", "Final Answer:", *map(str, range(20))]
PATTERN = r"Final Answer:| yes|[0-9]{1,2}|[\s\S]"
TRACE = (
    "12+3=15<Parallel><Path> yes,5</Path><Path>1</Path></Parallel>\n"
    "<Summary>\n</Summary>\nFinal Answer: 15"
)
TEXTS = [TRACE, "", " ", "\n\n", "2 <Path> 3", "</Path></Path>", "  1\n <Summary>"]


def words_tokenizer():
    return tokenizer_files.from_words(WORDS, pattern=PATTERN)


def byte_tokenizer(**special_tokens):
    """A tokenizer whose tokens are bytes, as `transformers` would hand it in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "Pa", "th"])}
    merges = [("P", "a"), ("t", "h")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "<|end|>", **special_tokens}
    )


def test_from_words_numbers_specials_words_and_tags_in_order():
    t, known = words_tokenizer(), [*WORDS, *tags.TAGS]
    assert (t.pad_id, t.eos_id) == (0, 1)
    assert [t.encode(text) for text in known] == [[2 + i] for i in range(len(known))]
    assert t.vocab_size == 2 + len(known) and not t.new_tags


@pytest.mark.parametrize("words", [True, False])
def test_decode_inverts_encode_before_and_after_saving(words, tmp_path):
    t = words_tokenizer() if words else tokenizer.Tokenizer(byte_tokenizer())
    t.save(tmp_path)
    loaded = tokenizer_files.load(tmp_path)
    assert list(t.tag_ids) == list(tags.TAGS) and t.newline_id == t.encode("\n")[0]
    for name in ("tag_ids", "vocab_size", "newline_id", "eos_id", "pad_id"):
        assert getattr(loaded, name) == getattr(t, name)
    assert not loaded.new_tags
    for text in TEXTS:
        ids = t.encode(text)
        assert t.decode(ids) == loaded.decode(ids) == text
        assert loaded.encode(text) == ids
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto.encode(TRACE, add_special_tokens=False) == t.encode(TRACE)
    assert auto.decode(t.encode(TRACE), skip_special_tokens=True) == TRACE


def test_text_outside_the_words_is_named():
    t = words_tokenizer()
    with pytest.raises(ValueError, match=r"not in the vocabulary: \['x', '½'\]"):
        t.encode("1x<Path>½")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        t.encode("<Path>", allow_tags=False)


@pytest.mark.parametrize(
    ("words", "pattern", "message"),
    [
        (["\n", "a", "a"], ".", "distinct"),
        (["\n", ""], ".", "not empty"),
        (["\n", "<eos>"], ".", "<eos>"),
        (["\n", "ab"], r"[\s\S]", "splits the word 'ab'"),
        (["a"], r"[\s\S]", "not in the vocabulary"),
    ],
)
def test_from_words_refuses(words, pattern, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_files.from_words(words, pattern=pattern)


def test_tags_are_added_where_missing():
    hf = byte_tokenizer()
    size = len(hf)
    t = tokenizer.Tokenizer(hf)
    assert t.new_tags == tags.TAGS
    assert list(t.tag_ids.values()) == list(range(size, size + 6))
    assert t.vocab_size == size + 6
    assert t.pad_id == t.eos_id  # it has no padding token
    some = tokenizer.Tokenizer(byte_tokenizer(additional_special_tokens=["<Path>"]))
    assert some.new_tags == tuple(tag for tag in tags.TAGS if tag != "<Path>")
    assert len({*some.tag_ids.values()}) == 6
    for text in ["Grüße, 数学 🙂 don't  n't .", "tab\t\r\n<Path>\n\n</Path>"]:
        assert t.decode(t.encode(text)) == text


def test_tags_that_are_there_are_taken_as_they_are():
    hf = byte_tokenizer(additional_special_tokens=list(tags.TAGS), pad_token="<|pad|>")
    size = len(hf)
    t = tokenizer.Tokenizer(hf)
    assert not t.new_tags
    assert t.vocab_size == size
    assert t.pad_id != t.eos_id
    ids = [t.pad_id, *t.encode(TRACE), t.eos_id]
    assert t.decode(ids) == TRACE  # visible though special; EOS and padding dropped


@pytest.mark.parametrize("given", [(), tags.PLAN_TAGS])
def test_tags_of_plans_are_text_until_blocks_are_planned(given):
    """Also in a folder that has them as special tokens, which other texts hide."""
    t = tokenizer.Tokenizer(byte_tokenizer(additional_special_tokens=list(given)))
    before, text = t.vocab_size, "<Parallel><Plan>a</Plan><Path>"
    assert {*t.tag_ids} == {*tags.TAGS}
    t.use_plans()
    assert (*t.tag_ids,) == tags.Grammar(planned=True).tags
    ids = t.encode(text)
    assert ids[1] == t.tag_ids["<Plan>"] and ids[-2] == t.tag_ids["</Plan>"]
    assert t.decode(ids) == text
    assert t.vocab_size == before + 2 - len(given)


def test_tag_pieces_spell_the_tag():
    t = tokenizer.Tokenizer(byte_tokenizer())
    pieces = t.tag_pieces("</Path>")
    assert t.decode(pieces) == "</Path>"
    assert len(pieces) == len(["<", "/", "Pa", "th", ">"])
    assert not set(pieces) & set(t.tag_ids.values())
    text = "Use <Path>1</Path>.<|end|>"
    plain = t.encode(text, allow_tags=False)
    assert plain[-1] == t.eos_id  # other special tokens stay tokens
    assert not set(plain) & set(t.tag_ids.values())
    assert t.decode(plain) == text.removesuffix("<|end|>")


def test_no_eos_and_a_newline_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match="no EOS"):
        tokenizer.Tokenizer(byte_tokenizer(eos_token=None))
    hf = byte_tokenizer()
    hf.backend_tokenizer.normalizer = normalizers.Replace("\n", "\r\n")
    with pytest.raises(ValueError, match="newline between the tags must be one token"):
        tokenizer.Tokenizer(hf)


def test_chat_prompt():
    pytest.importorskip("jinja2")  # which transformers needs for templates
    t = tokenizer.Tokenizer(byte_tokenizer())
    messages = [{"role": "user", "content": "1+1?"}]
    with pytest.raises(ValueError, match="no chat template"):
        t.chat_prompt(messages)
    t.hf_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert t.chat_prompt(messages) == "[user] 1+1?\n[assistant] "


def joins_to_the_text(t, rng, ids):
    """The law of `pieces`, on tokens drawn from the first `ids` ids."""
    for length in [0, 1, 2, 3, *rng.integers(4, 40, 60)]:
        drawn = rng.integers(0, ids, length)
        pieces = t.pieces(drawn)
        assert len(pieces) == length
        assert "".join(np.array(pieces, object)[drawn != t.eos_id]) == t.decode(drawn)
        ends = set(np.array(pieces, object)[drawn == t.eos_id])
        assert ends <= {t.hf_tokenizer.eos_token}


def test_pieces_by_hand():
    t = words_tokenizer()
    ids = t.encode("12+3<Path>")
    assert t.pieces([*ids, t.eos_id]) == ["12", "+", "3", "<Path>", "<eos>"]
    assert t.pieces([]) == []
    t = tokenizer.Tokenizer(byte_tokenizer(pad_token="<|pad|>"))
    ids = t.encode("Pé<Path>🙂.</Path>")
    smile = ["", "", "", "🙂"]
    assert t.pieces(ids) == ["P", "", "é", "<Path>", *smile, ".", "</Path>"]
    half = [*t.encode("🙂")[:2], *t.encode("a"), t.pad_id, t.eos_id]
    assert t.pieces(half) == ["", "\ufffd", "a", "", "<|end|>"]


def test_pieces_of_whatever_a_model_writes_join_to_the_text_in_time():
    rng = np.random.default_rng(0)
    for t in (words_tokenizer(), tokenizer.Tokenizer(byte_tokenizer())):
        joins_to_the_text(t, rng, t.vocab_size + 9)  # some that it does not know
    began = time.process_time()
    for text in ("数🙂" * 1000, "é" * 4000):
        pieces = t.pieces(t.encode(text))
        assert [x for x in pieces if x] == list(text)
    t.pieces(rng.integers(0, 256, 8000))
    assert time.process_time() - began < 3  # 0.1 s; a minute if it were quadratic


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_file(model_type, tmp_path):
    lines = [f"If {i} friends share {i * 7} clips, who gets 1?" for i in range(60)]
    prefix = tmp_path / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=["[INST]"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file = prefix.with_suffix(".model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for source in [file, tmp_path]:
        t = tokenizer_files.load(source)
        assert t.vocab_size == original.vocab_size() + 6
        assert t.eos_id == original.eos_id()
        for text in [*lines[:3], "who  gets\n\n [INST]é 12?", " If", "If "]:
            assert t.encode(text) == original.encode(text)
            assert t.decode(t.encode(text)) == text
        assert t.decode([*t.encode(TRACE), t.eos_id]) == TRACE
        assert "".join(t.pieces(t.encode(" a é"))) == " a é"  # its own space dropped
        joins_to_the_text(t, np.random.default_rng(0), t.vocab_size + 9)
    assert t.with_bos([7], is_chat=False) == [7]  # sentencepiece itself adds none
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    t = tokenizer_files.load(tmp_path)  # as `transformers` reads it
    assert t.with_bos([7], is_chat=False) == [original.bos_id(), 7]
    t.save(tmp_path / "saved")
    loaded = tokenizer_files.load(tmp_path / "saved")
    assert loaded.encode(TRACE) == t.encode(TRACE)
    assert loaded.decode(t.encode(TRACE)) == TRACE


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "absent.model", "x"])
def test_local_paths_are_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=name):
        tokenizer_files.load(name)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        tokenizer_files.load(tmp_path)
    (tmp_path / "a.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(ValueError, match=r"a\.model is not a sentencepiece model"):
        tokenizer_files.load(tmp_path)
    words_tokenizer().save(tmp_path / "words")
    shutil.copytree(tmp_path / "words", tmp_path / "cut")
    file = tmp_path / "cut" / "tokenizer.json"
    file.write_text(file.read_text()[:300])
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_files.load(tmp_path / "cut")
