"""Tokenizers of Llama-2's kind, which put a space before each piece of a text."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

from pr1_jax import tags
from pr1_jax.data import tokenizer_files, traces
from pr1_jax.data.prompts import prompt_tokens
from tests.helpers.llama_tokenizer import ALWAYS, PREPEND, REPLACE, SPACE, write

TRACE = (
    "ab<Parallel><Path>ab a</Path><Path> ab</Path></Parallel>\n"
    "<Summary>b\n</Summary>\n\nab é"
)
TEXTS = [TRACE, "", " ", "ab", " ab", "  a", f"{SPACE}", "\n", "<Path>ab", " <Path>a"]
TEXTS += ["x <Path>", "<Path> <Path> ab</Path>", "🙂 ab"]


@pytest.fixture(
    params=[{}, {"steps": (REPLACE, PREPEND)}, {"steps": (), "spaces": ALWAYS}],
    ids=["prepend", "other order", "metaspace"],
)
def folder(request, tmp_path):
    return write(tmp_path, **request.param)


def test_ids_are_those_of_transformers(folder):
    """Those of its own class; it takes a first space for the one that it would put."""
    t = tokenizer_files.load(folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(reference, transformers.LlamaTokenizer)
    added = [tokenizers.AddedToken(tag, normalized=False) for tag in tags.TAGS]
    reference.add_tokens(added)
    as_file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = t.encode(text)
        if not text.startswith((" ", SPACE)):
            assert ids == reference(text, add_special_tokens=False).input_ids, text
        elif "<" not in text:  # as the file itself, where it has no special tokens
            own = as_file.encode(text, add_special_tokens=False).ids
            assert ids == own or as_file.normalizer is None, text


def test_decode_inverts_encode_and_no_space_is_put_behind_a_tag(folder):
    t = tokenizer_files.load(folder)
    for continues in (False, True):
        how = {"continues": continues}
        for text in TEXTS:
            ids = t.encode(text, **how)
            assert t.decode(ids, **how) == text.replace(SPACE, " ")
            assert "".join(t.pieces(ids, **how)) == t.decode(ids, **how)
            plain = t.encode(text, allow_tags=False, **how)
            assert t.decode(plain, **how) == text.replace(SPACE, " ")
            assert not {*plain} & {*t.tag_ids.values()}
    t.save(folder / "saved")
    again = tokenizer_files.load(folder / "saved")
    assert [again.encode(text) for text in TEXTS] == [t.encode(text) for text in TEXTS]


def test_a_prompt_and_its_response_are_what_they_are_as_one_text(folder):
    t = tokenizer_files.load(folder)
    prompt = prompt_tokens("ab\n", t, template="plain").tolist()
    for text in TEXTS:
        whole = t.encode("ab\n" + text)
        assert prompt + t.encode(text, continues=True) == whole
    trace = traces.from_text(prompt, TRACE, t, variant="structured")
    assert prompt + trace.tokens.tolist() == [*t.encode("ab\n" + TRACE), t.eos_id]
    for tag in tags.TAGS:
        assert t.decode(t.tag_pieces(tag), continues=True) == tag
    drawn = np.random.default_rng(0).integers(259, t.vocab_size, 60).tolist()
    assert t.decode([*prompt, *drawn]) == "ab\n" + t.decode(drawn, continues=True)


@pytest.mark.parametrize(
    "steps, spaces",
    [
        ((PREPEND,), None),
        ((PREPEND, REPLACE, normalizers.NFKC()), None),
        ((PREPEND, normalizers.Replace(" ", "_")), None),
        ((normalizers.Prepend("__"), REPLACE), None),
        ((PREPEND, REPLACE), pre_tokenizers.Digits()),
    ],
)
def test_other_normalisers_that_prepend_are_refused_with_what_to_do(
    tmp_path, steps, spaces
):
    with pytest.raises(ValueError, match="puts .* before each text .*save_pretrained"):
        tokenizer_files.load(write(tmp_path, steps, spaces))


def test_steps_before_are_kept(tmp_path):
    steps = (normalizers.NFKC(), PREPEND, REPLACE)
    t = tokenizer_files.load(write(tmp_path, steps))
    assert t.encode("ａ<Path>ａ") == t.encode("a<Path>a")
