"""Adapters as a folder: what stands in it, and that `peft` computes what we do."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from pr1_jax.huggingface import adapters as folders
from pr1_jax.huggingface import weights
from pr1_jax.model import adapters
from tests.helpers import causal_logits
from tests.helpers.tiny import QWEN3, random_adapters, random_params

SCANNED = dataclasses.replace(QWEN3, scan_layers=True)
LLAMA = dataclasses.replace(QWEN3, qk_norm=False, tie_embeddings=False)
IDS = (10, 11, 13)
SETTINGS = adapters.Settings(3, 6.0, adapters.projections((adapters.ALL,)), IDS)
SOME = adapters.Settings(2, 4.0, ("q", "down"))


def written(tmp_path, config, settings):
    """The folders of a model and of adapters, and the policy's parameters."""
    frozen = adapters.Frozen(random_params(config), settings)
    trained = random_adapters(config, settings)
    weights.save_params(tmp_path / "model", frozen.params, config)
    to = tmp_path / "adapters"
    folders.save_adapters(to, frozen, trained, config, base=str(tmp_path / "model"))
    return adapters.merge_all(frozen.with_adapters(trained))


@pytest.mark.parametrize(
    ("config", "settings"), [(SCANNED, SETTINGS), (LLAMA, SETTINGS), (LLAMA, SOME)]
)
def test_the_folder_holds_what_merged_weights_differ_by(tmp_path, config, settings):
    """By the names and shapes of peft: W + alpha / r · B A, and rows as they are."""
    policy = written(tmp_path, config, settings)
    said = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    factor = said["lora_alpha"] / said["r"]
    base = safetensors.numpy.load_file(tmp_path / "model/model.safetensors")
    parts = safetensors.numpy.load_file(tmp_path / "adapters/adapter_model.safetensors")
    expected = tmp_path / "merged"
    weights.save_params(expected, policy, config)
    wanted = safetensors.numpy.load_file(expected / "model.safetensors")
    for name, value in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in parts:
            assert module.split(".")[-1] in said["target_modules"]
            a, b = (parts.pop(f"{module}.lora_{x}.weight") for x in "AB")
            value = value + factor * b @ a
        rows = parts.pop(f"{module}.token_adapter.trainable_tokens_delta", None)
        if rows is not None:
            value[list(IDS)] = rows
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, err_msg=name)
    assert not parts
    ids = said["trainable_token_indices"]
    apart = {"embed_tokens": [*IDS], "lm_head": [*IDS]}
    tied = [*IDS] if config.tie_embeddings else apart
    assert ids == (tied if settings.row_ids else None)


@pytest.mark.parametrize("config", [SCANNED, LLAMA], ids=["qwen3-tied", "llama-apart"])
def test_peft_computes_the_same_logits(tmp_path, config):
    torch = pytest.importorskip("torch", reason="peft needs torch")
    peft = pytest.importorskip("peft", reason="pip install torch peft")
    transformers = pytest.importorskip("transformers")
    policy = written(tmp_path, config, SETTINGS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    tokens = np.arange(1, 21)[None]  # tags among them
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
    expected = causal_logits.compute(config, policy, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).max() > 1  # and not of nothing


def test_nothing_is_written_into_a_folder_that_holds_something(tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "mine").touch()
    with pytest.raises(FileExistsError, match="adapters exists and is not an empty"):
        written(tmp_path, LLAMA, SOME)
