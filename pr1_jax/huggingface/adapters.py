"""Adapters as a folder that `peft` loads beside the model that they were trained on.

Names and shapes are those of peft 0.21: `lora_A` is [r, in], `lora_B` [out, r], and
`trainable_tokens_delta` has, whatever its name says, the rows themselves.
"""

import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.huggingface.tensors import tensor_table
from pr1_jax.huggingface.usage import Usage
from pr1_jax.huggingface.weights import whole_folder
from pr1_jax.model.adapters import PROJECTIONS, Frozen, Settings
from pr1_jax.model.config import ModelConfig
from pr1_jax.system import files

_PREFIX = "base_model.model."
_MODULES = {"embedding": "embed_tokens", "head": "lm_head"}


def save_adapters(
    folder: str | os.PathLike,
    frozen: Frozen,
    adapters: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    base: str = "",
    usage: Usage | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, in float32.

    The model that they go with needs a row for every tag: where it has none, it is
    resized first (docs/adapters.md).

    Args:
      folder, tokenizer, usage: as of `weights.save_params`.
      adapters: as they are trained. config: of the model.
      base: name or folder of the model; "" = not said.
    """
    settings, tied = frozen.settings, config.tie_embeddings
    with whole_folder(folder) as temporary:
        arrays = _pairs(adapters, config)
        for name, delta in adapters.get("rows", {}).items():
            ids = np.array(settings.row_ids)
            rows = np.asarray(frozen.params[name][ids], np.float32) + np.asarray(delta)
            module = "model.embed_tokens" if name == "embedding" else "lm_head"
            arrays[f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
        said, file = (
            temporary / f"adapter_{name}"
            for name in ("config.json", "model.safetensors")
        )
        files.write_json(said, _adapter_config(settings, tied, base))
        arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
        safetensors.numpy.save_file(arrays, file, metadata={"format": "pt"})
        shutil.copymode(said, file)  # it is made readable for its owner alone
        if tokenizer is not None:
            tokenizer.save(temporary)
        if usage is not None:
            usage.write(temporary)


def _pairs(adapters: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Both matrices of every projection by their names in peft."""
    arrays = {}
    for path, tensors in tensor_table(config).items():
        pair = adapters.get(path[0], {}).get(path[1]) if len(path) == 3 else None
        if pair is None or path[-1] != "kernel":
            continue
        a, b = np.asarray(pair["a"]), np.asarray(pair["b"])
        for tensor in tensors:
            one = (a, b) if tensor.layer is None else (a[tensor.layer], b[tensor.layer])
            name = _PREFIX + tensor.name.removesuffix(".weight")
            arrays[f"{name}.lora_A.weight"] = one[0].reshape(-1, a.shape[-1]).T
            arrays[f"{name}.lora_B.weight"] = one[1].reshape(a.shape[-1], -1).T
    return arrays


def _adapter_config(settings: Settings, tied: bool, base: str) -> dict[str, Any]:
    ids = [*settings.row_ids]
    names = [n for n, ours in PROJECTIONS.items() if ours in settings.projections]
    apart = {module: ids for module in _MODULES.values()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": names,
        "trainable_token_indices": (ids if tied else apart) if ids else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
