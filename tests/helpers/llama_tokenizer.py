"""Files of a tokenizer of Llama-2's kind, which puts a space before each piece of text."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
PREPEND, REPLACE = normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)
ALWAYS = pre_tokenizers.Metaspace(SPACE, "always", split=False)


def write(folder: pathlib.Path, steps=(PREPEND, REPLACE), spaces=None) -> pathlib.Path:
    """A tokenizer.json with merges of letters; bytes spell what else there is."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [SPACE, "a", "b", "ab", f"{SPACE}a", f"{SPACE}ab"]
    merges = [("a", "b"), (SPACE, "a"), (f"{SPACE}a", "b"), (SPACE, "ab")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([*steps]) if steps else None
    if spaces:
        backend.pre_tokenizer = spaces
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(pieces[:3])
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
