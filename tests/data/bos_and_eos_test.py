"""What prompts begin with and responses end with, as a folder's files say."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from pr1_jax.data import tokenizer_files, traces
from pr1_jax.data.prompts import INSTRUCTION, prompt_tokens
from pr1_jax.huggingface.config import token_ids
from pr1_jax.sampler.settings import Vocab

END, START, TURN, BEGIN = range(256, 260)
SPECIALS = ("<|end|>", "<|start|>", "<|turn|>", "<|begin|>")
CHATTY = "{% for m in messages %}<|start|>{{ m.content }}<|turn|>{% endfor %}<|start|>"


@pytest.fixture
def write(tmp_path):
    """Writes a folder of a tokenizer of bytes and four specials; files by name."""

    def write(processor=None, own=SPECIALS[0], chat_template=None, **files):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        model = models.BPE({letter: i for i, letter in enumerate(letters)}, [])
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([*SPECIALS])
        if processor:
            ids = [(name, 256 + i) for i, name in enumerate(SPECIALS)]
            backend.post_processor = processors.TemplateProcessing(
                single=processor, special_tokens=ids
            )
        backend.save(str(tmp_path / "tokenizer.json"))
        files["tokenizer_config"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": own,
            "chat_template": chat_template,
        } | files.get("tokenizer_config", {})
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def eos(*ids):
    return {"eos_token_id": list(ids) if len(ids) != 1 else ids[0]}


@pytest.mark.parametrize(
    "generation, config, own, expected",
    [
        (None, None, SPECIALS[0], (END,)),
        ({}, {}, SPECIALS[0], (END,)),
        (eos(TURN, END), eos(END), SPECIALS[0], (TURN, END)),
        (eos(TURN), None, SPECIALS[0], (TURN, END)),
        (None, eos(TURN, START), SPECIALS[0], (TURN, START, END)),
        ({"eos_token_id": None}, eos(TURN), SPECIALS[0], (TURN, END)),
        (eos(TURN), eos(START), SPECIALS[0], (TURN, END)),
        (eos(), eos(TURN), SPECIALS[0], (TURN, END)),
        (eos(TURN, TURN), None, SPECIALS[2], (TURN,)),
        (eos(TURN, START), None, None, (TURN, START)),  # the tokenizer has none
        (None, eos(END, 260, 5000), SPECIALS[0], (END,)),  # 260 is to be a tag
    ],
)
def test_eos_ids_of_a_folder(
    write, tmp_path, caplog, generation, config, own, expected
):
    files = {"generation_config": generation, "config": config}
    given = {name: content for name, content in files.items() if content is not None}
    t = tokenizer_files.load(write(own=own, **given))
    assert t.eos_ids == expected and t.eos_id in expected
    if own:
        assert t.eos_id == 256 + SPECIALS.index(own)
    assert Vocab.of(t).eos_ids == expected
    assert Vocab.of(t).tag_ids == tuple(t.tag_ids.values())
    assert ("no token [260, 5000]" in caplog.text) == ("5000" in str(config))
    response = [*t.encode("5"), *expected]
    assert t.decode(response) == "5"
    names = ["5", *(SPECIALS[i - 256] for i in expected)]
    assert t.pieces(response) == names
    trace = traces.from_text([5], "5", t, variant="structured")
    assert trace.tokens.tolist() == [*t.encode("5"), t.eos_id]


@pytest.mark.parametrize("value", ["2", True, -1, 1.0, [1, None], {"a": 1}, 2**31])
def test_eos_ids_that_are_none_are_named(write, value):
    folder = write(generation_config={"eos_token_id": value})
    match = r"generation_config\.json: eos_token_id=.* is not an id or a list of ids"
    with pytest.raises(ValueError, match=match):
        tokenizer_files.load(folder)


def test_a_tag_and_too_many_ids_are_no_eos(write):
    folder = write()
    tokenizer_files.load(folder).save(folder)  # now with the tags
    (folder / "config.json").write_text(json.dumps(eos(END, 261)))
    with pytest.raises(ValueError, match="EOS id 261 is that of the tag </Parallel>"):
        tokenizer_files.load(folder)
    (folder / "config.json").write_text(json.dumps(eos(*range(30))))
    with pytest.raises(ValueError, match="31 EOS ids, at most are 25"):
        tokenizer_files.load(folder)


def test_an_export_keeps_the_eos_ids(write):
    one = tokenizer_files.load(write())
    assert token_ids(one) == {
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    files = {"tokenizer_config": {"bos_token": SPECIALS[3]}}
    t = tokenizer_files.load(write(generation_config=eos(TURN, END), **files))
    written = token_ids(t)
    assert written["eos_token_id"] == [TURN, END] and written["bos_token_id"] == BEGIN
    assert token_ids(None)["eos_token_id"] is None


def test_an_ordinary_token_that_ends_responses_stays_text(write):
    """Else a text that has it would lose it wherever it stands."""
    letter = tokenizer_files.load(write()).encode("#")[0]
    t = tokenizer_files.load(write(config=eos(letter)))
    assert t.eos_ids == (letter, END)
    assert t.decode(t.encode("#1#")) == "#1#" == "".join(t.pieces(t.encode("#1#")))


BOTH = "<|begin|> $A <|end|>"


@pytest.mark.parametrize(
    "processor, config, begins",
    [
        (None, {}, []),
        ("$A <|end|>", {}, []),
        ("<|begin|> $A", {}, [BEGIN]),
        (BOTH, {"bos_token": "<|begin|>"}, [BEGIN]),
        ("<|start|> <|begin|> $A", {}, [START, BEGIN]),
        (None, {"bos_token": "<|begin|>"}, []),
        # Of a tokenizer.json, its own post-processor counts.
        (None, {"bos_token": "<|begin|>", "add_bos_token": True}, []),
        ("<|begin|> $A", {"bos_token": "<|begin|>", "add_bos_token": False}, [BEGIN]),
    ],
)
def test_prompts_begin_as_transformers_begins_them(write, processor, config, begins):
    t = tokenizer_files.load(write(processor, tokenizer_config=config))
    reference = transformers.AutoTokenizer.from_pretrained(
        write(processor, tokenizer_config=config)
    )
    for text in ("hi", " hi", "\n"):
        theirs = reference(text).input_ids
        assert theirs[: len(begins)] == begins
        ours = prompt_tokens(text, t, template="plain").tolist()
        assert ours == [*begins, *t.encode(text)]
        assert ours == theirs[: len(ours)] and set(theirs[len(ours) :]) <= {END}
    told = prompt_tokens("hi", t, template="instruction").tolist()
    assert told[: len(begins)] == begins and told.count(BEGIN) == begins.count(BEGIN)
    t.use_bos("no")
    assert prompt_tokens("hi", t, template="plain").tolist() == t.encode("hi")


@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("template", ["chat", "own"])
def test_a_chat_template_writes_its_own_bos_or_none(write, template, writes_bos):
    chat = "{{ bos_token }}" * writes_bos + CHATTY
    named = {"bos_token": "<|begin|>"}
    files = {"chat_template": chat, "tokenizer_config": named}
    t = tokenizer_files.load(write("<|begin|> $A", **files))
    messages = [{"role": "user", "content": "hi"}]
    if template == "chat":
        messages.insert(0, {"role": "system", "content": INSTRUCTION})
    reference = t.hf_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ours = prompt_tokens("hi", t, template=template).tolist()
    assert ours == reference and ours.count(BEGIN) == writes_bos
    t.use_bos("yes")
    assert prompt_tokens("hi", t, template=template).tolist().count(BEGIN) == 1
    assert prompt_tokens("<|begin|>a", t, template="plain").tolist().count(BEGIN) == 1


@pytest.mark.parametrize(
    "written, count",
    [("\n\n{{ bos_token }}", 1), (" ", 1), ("a{{ bos_token }}", 2)],
)
def test_bos_behind_blanks_of_a_chat_template_is_there_once(write, written, count):
    files = {"tokenizer_config": {"bos_token": "<|begin|>"}}
    t = tokenizer_files.load(write(chat_template=written + CHATTY, **files))
    t.use_bos("yes")
    assert prompt_tokens("hi", t, template="own").tolist().count(BEGIN) == count


def test_bos_of_tokenizers_without_one(write):
    t = tokenizer_files.load(write())
    with pytest.raises(ValueError, match=r"data\.bos=yes, but .* has no BOS token"):
        t.use_bos("yes")
    with pytest.raises(ValueError, match=r"data\.bos='never' is not one of"):
        t.use_bos("never")
    named = {"bos_token": "<|begin|>"}
    t = tokenizer_files.load(write(tokenizer_config=named))
    t.use_bos("yes")  # though the tokenizer puts none
    assert prompt_tokens("", t, template="plain").tolist() == [BEGIN]
