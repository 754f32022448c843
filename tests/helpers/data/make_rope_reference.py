"""Makes hf_reference/rope.npz: what `transformers` computes with scaled positions.

Run where torch is installed, after make_hf_reference.py. hf_reference/rope.json says of
which config.json: logits are those of a folder of hf_reference with some fields changed,
frequencies those of published models (Llama 3.1 and so on), without their weights.

    python tests/helpers/data/make_rope_reference.py
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FOLDER = Path(__file__).parent / "hf_reference"
LENGTH = 48  # tokens, thrice the shortest first context of rope.json


def logits_of(kind, changes, tokens):
    """Logits of a folder with fields of its config.json changed."""
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(FOLDER / kind, Path(parent) / kind)
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(settings))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()


def frequencies_of(head_dim, parameters):
    """Frequencies, and the factor of sines and cosines behind the last."""
    config = transformers.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    made, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    return np.append(made.numpy(), np.float32(factor))


def main():
    cases = json.loads((FOLDER / "rope.json").read_text())
    tokens = np.random.default_rng(1).integers(0, 32, (1, LENGTH))
    arrays = {"tokens": tokens}
    for name, (kind, changes) in cases["logits"].items():
        arrays[name] = logits_of(kind, changes, tokens)
    for name, (head_dim, parameters) in cases["frequencies"].items():
        arrays[f"frequencies of {name}"] = frequencies_of(head_dim, parameters)
    np.savez_compressed(FOLDER / "rope.npz", **arrays)


if __name__ == "__main__":
    main()
