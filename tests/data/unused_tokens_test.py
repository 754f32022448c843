"""Tokens that a model has no rows for: unused ones are left out, used ones refused."""

import dataclasses
import json

import jax
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from pr1_jax import tags
from pr1_jax.data import tokenizer_files
from pr1_jax.huggingface.tags import check_vocab_size, resize_embeddings
from pr1_jax.model.config import ModelConfig
from pr1_jax.sampler.settings import Vocab
from tests.helpers.tiny import ONE_LAYER, random_params

ROWS = 259  # 256 bytes and three tokens
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


def write(folder, *added, rows=ROWS, processor=None, **settings):
    """A tokenizer of bytes, of `ROWS` tokens and those that were added later.

    Beside it is the config.json of a model of so many rows.
    """
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({text: i for i, text in enumerate(alphabet)}, [])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<e>", "<|im_start|>", "<|im_end|>", *added])
    if processor:
        backend.post_processor = processor(backend)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<e>", "chat_template": TEMPLATE} | settings
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def shape(rows=ROWS) -> ModelConfig:
    return dataclasses.replace(ONE_LAYER, vocab_size=rows, tie_embeddings=False)


@pytest.mark.parametrize(
    "added, settings",
    [
        (["[PAD]"], {"pad_token": "[PAD]"}),
        (["[PAD]", "<|x|>"], {"pad_token": "[PAD]", "extra_special_tokens": ["<|x|>"]}),
        (["<|x|>"], {"extra_special_tokens": {"image_token": "<|x|>"}}),
        (["<unk>"], {"unk_token": "<unk>"}),  # of which the vocabulary does not know
    ],
)
def test_unused_tokens_are_left_out_and_named(added, settings, tmp_path, caplog):
    t = tokenizer_files.load(write(tmp_path, *added, **settings))
    (said,) = [r.message for r in caplog.records if "left out" in r.message]
    assert all(repr(token) in said for token in added) and "259 rows" in said
    check_vocab_size(shape(), t)
    # Every id that is read, written or padded with has a row, and is a known token.
    assert [*t.tag_ids.values()] == [*range(ROWS, ROWS + 6)]
    assert t.vocab_size == Vocab.of(t).num_tokens == ROWS + 6
    assert t.pad_id == t.eos_id == 256
    for token in added:
        ids = t.encode(f"a{token}<Path>")
        assert max(ids[:-1]) < 256 and t.decode(ids) == f"a{token}<Path>"
        assert max(t.encode(token, allow_tags=False)) < 256
    params, config = resize_embeddings(
        random_params(shape()), shape(), t, jax.random.key(0)
    )
    assert len(params["embedding"]) == config.vocab_size == t.vocab_size
    # What is saved is the same tokenizer, to us and to `transformers`.
    t.save(tmp_path / "out")
    again = tokenizer_files.load(tmp_path / "out")
    assert again.fingerprint == t.fingerprint
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(auto) == t.vocab_size
    assert not {*added} & {*auto.get_vocab()}


def test_nothing_is_left_out_where_all_have_rows(tmp_path, caplog):
    write(tmp_path, "[PAD]", rows=ROWS + 1, pad_token="[PAD]")
    fitting = tokenizer_files.load(tmp_path)
    (tmp_path / "config.json").unlink()
    whole = tokenizer_files.load(tmp_path)
    assert whole.fingerprint == fitting.fingerprint and not caplog.records
    assert fitting.pad_id == ROWS


def bos_first(backend):
    bos = ("[BOS]", backend.token_to_id("[BOS]"))
    return processors.TemplateProcessing(single="[BOS] $A", special_tokens=[bos])


@pytest.mark.parametrize(
    "added, settings",
    [
        (["<eos>"], {"eos_token": "<eos>"}),
        (["[BOS]"], {"bos_token": "[BOS]"}),
        (["[BOS]"], {"processor": bos_first}),
        (["<|user|>"], {"chat_template": "{{ '<|user|>' }}"}),
        (["[PAD]"], {"pad_token": "[PAD]", "chat_template": "{{ pad_token }}"}),
        (["[PAD]", "<eos>"], {"pad_token": "[PAD]", "eos_token": "<eos>"}),
        (list(tags.TAGS), {}),
    ],
)
def test_used_tokens_without_rows_are_refused(added, settings, tmp_path, caplog):
    t = tokenizer_files.load(write(tmp_path, *added, **settings))
    assert not caplog.records
    message = f"has {ROWS + len(added)} tokens.*vocab_size is 259.*{added[0]}"
    message = message.replace("[", r"\[").replace("|", r"\|")
    with pytest.raises(ValueError, match=message):
        check_vocab_size(shape(), t)


def test_a_vocabulary_beyond_the_rows_is_refused(tmp_path):
    t = tokenizer_files.load(write(tmp_path, rows=200))
    with pytest.raises(ValueError, match="has 259 tokens.*vocab_size is 200"):
        check_vocab_size(shape(200), t)
