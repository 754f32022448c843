"""Writes a seeded random Qwen3 as a Hugging Face folder, for the peers to share.

`python make_weights.py FOLDER [--layers N] [--width D]`, in an environment of
requirements.txt and with the repository on PYTHONPATH.
"""

import argparse
from pathlib import Path

import jax

from pr1_jax.huggingface import weights
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="must not exist, or be empty")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    config = ModelConfig(
        vocab_size=4096,
        num_layers=args.layers,
        width=args.width,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        mlp_width=3 * args.width,
    )
    params = unbox(init_params(config, jax.random.key(0)))
    weights.save_params(args.folder, params, config, max_positions=1024)


if __name__ == "__main__":
    main()
