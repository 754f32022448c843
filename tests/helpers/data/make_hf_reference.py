"""Makes tests/helpers/data/hf_reference: tiny folders written by `transformers`, with logits.

Run where torch is installed; the tests then need neither. Weights are random, biases
and norm scales included, so that a tensor left out or mixed up shows.

    python tests/helpers/data/make_hf_reference.py
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "hf_reference"
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "qwen3": transformers.Qwen3Config(
        **SHAPE, head_dim=8, tie_word_embeddings=True, rms_norm_eps=1e-6
    ),
    "qwen2": transformers.Qwen2Config(
        **SHAPE,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
    ),
    "llama": transformers.LlamaConfig(
        **SHAPE,
        head_dim=6,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
    ),
}


def main():
    rng = np.random.default_rng(0)
    lengths = np.array([[14], [9], [1]])
    mask = np.arange(lengths.max()) < lengths  # padded on the right
    tokens = np.where(mask, rng.integers(0, SHAPE["vocab_size"], mask.shape), 0)
    arrays = {"tokens": tokens, "mask": mask}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                centre = 1.0 if "norm" in key else 0.0
                value.copy_(centre + 0.3 * torch.randn_like(value))
            logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask))
        arrays[name] = logits.logits.numpy()
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(FOLDER / "logits.npz", **arrays)


if __name__ == "__main__":
    main()
