"""A head of its own beside `tie_word_embeddings: true`, as `transformers` reads it.

There (`PreTrainedModel.tie_weights`), rows that are in the file and differ are not tied,
and rows that are equal are.
"""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from configs import rl_alternating
from pr1_jax.data import tokenizer_files
from pr1_jax.huggingface import weights
from pr1_jax.huggingface.config import read_config
from pr1_jax.stages import experiment
from tests.helpers import causal_logits

REFERENCE = Path(__file__).parents[1] / "helpers" / "data" / "hf_reference"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_folder(folder, change=lambda head, embedding: head):
    """A folder said to be tied, whose head is `change` of that in the file."""
    shutil.copytree(REFERENCE / "llama", folder)
    say_tied(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[HEAD] = change(tensors[HEAD], tensors[EMBEDDING])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def say_tied(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))


def in_parts(folder):
    """The same folder with its tensors in two files, the head in the second."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": sorted({*tensors} - {HEAD}), "b.safetensors": [HEAD]}
    for part, names in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in names}, folder / part)
    weight_map = {name: part for part, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("arrange", [lambda folder: folder, in_parts])
def test_another_head_is_used_and_said(arrange, tmp_path, caplog):
    folder = arrange(tied_folder(tmp_path / "in"))
    configs = [read_config(folder) for _ in range(3)]
    assert not any(config.tie_embeddings for config in configs)
    said = [r.message for r in caplog.records if "tie_word_embeddings" in r.message]
    assert len(said) == 1 and str(folder / "config.json") in said[0]
    reference = np.load(REFERENCE / "logits.npz")
    params = weights.load_params(folder, configs[0])
    logits = causal_logits.compute(configs[0], params, reference["tokens"])
    mask = reference["mask"]
    np.testing.assert_allclose(logits[mask], reference["llama"][mask], atol=1e-4)
    # The export says what the model is, and is the same again.
    weights.save_params(tmp_path / "out", params, configs[0])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    assert read_config(tmp_path / "out") == configs[0]
    again = weights.load_params(tmp_path / "out", configs[0])
    np.testing.assert_array_equal(again["head"], params["head"])


@pytest.mark.parametrize("row", [0, -1])
def test_one_number_makes_another_head(row, tmp_path, monkeypatch):
    monkeypatch.setattr("pr1_jax.huggingface.tensors._ROWS", 5)  # of 32

    def change(head, embedding):
        head = embedding.copy()
        head[row, 3] += 1e-6
        return head

    assert not read_config(tied_folder(tmp_path / "in", change)).tie_embeddings


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_equal_head_stays_tied(dtype, tmp_path, caplog):
    def change(head, embedding):
        embedding[...] = embedding.astype(dtype)
        return embedding.astype(dtype)

    config = read_config(tied_folder(tmp_path / "in", change))
    assert config.tie_embeddings and not caplog.records
    params = weights.load_params(tmp_path / "in", config)
    assert "head" not in params
    weights.save_params(tmp_path / "out", params, config)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert HEAD not in written
    assert read_config(tmp_path / "out") == config


def test_a_head_of_another_shape_is_named(tmp_path):
    folder = tied_folder(tmp_path / "in", lambda head, embedding: head[:-1])
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(31, 16\)"):
        weights.load_params(folder, read_config(folder))


def test_a_missing_head_is_named_with_the_way_out(tmp_path):
    folder = shutil.copytree(REFERENCE / "llama", tmp_path / "in")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors[HEAD]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.* missing .*tie_word_embeddings="):
        weights.load_params(folder, read_config(folder))
    say_tied(folder)
    assert "head" not in weights.load_params(folder, read_config(folder))


def test_weights_that_cannot_be_read_are_told_by_whoever_reads_them(tmp_path):
    folder = tied_folder(tmp_path / "in")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    config = read_config(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        weights.load_params(folder, config)


def test_a_run_trains_the_head(tmp_path):
    tokenizer_files.from_words(["\n", "a"], pattern=r"[\s\S]").save(tmp_path)
    tied_folder(tmp_path / "in")
    for file in (tmp_path / "in").iterdir():
        shutil.move(file, tmp_path)
    config = rl_alternating.get_config("smoke")
    config.model.path, config.rollout.path_labels = str(tmp_path), ("a", "aa")
    made = experiment.build(config)
    made.check_weights()
    params = made.initial_params()
    assert params["head"].shape == made.abstract_params()["head"].shape == (32, 16)
    assert np.abs(params["head"] - params["embedding"]).max() > 0.1
