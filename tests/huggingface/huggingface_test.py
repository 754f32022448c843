"""Tests of pr1_jax.huggingface: parity with `transformers`, round trips, tag rows, errors.

tests/helpers/data/hf_reference holds tiny folders written by `transformers` and their logits
(made by tests/helpers/data/make_hf_reference.py), so parity is checked without torch.
"""

import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from tokenizers import decoders, models, pre_tokenizers

from configs import rl_alternating
from pr1_jax import tags
from pr1_jax.data import tokenizer_files
from pr1_jax.data.tokenizer import Tokenizer
from pr1_jax.huggingface import weights
from pr1_jax.huggingface.config import read_config
from pr1_jax.huggingface.tags import resize_embeddings
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params
from pr1_jax.stages import experiment
from tests.helpers import causal_logits

REFERENCE = Path(__file__).parents[1] / "helpers" / "data" / "hf_reference"
KINDS = ("qwen3", "qwen2", "llama")


def make_config(kind="qwen3", **changes):
    return ModelConfig(
        **{
            "vocab_size": 48,
            "num_layers": 3,
            "width": 16,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "mlp_width": 20,
            "tie_embeddings": kind == "qwen3",
            "qk_norm": kind == "qwen3",
            "qkv_bias": kind == "qwen2",
            "rope_base": 5000.0,
            "rms_eps": 1e-5,
            **changes,
        }
    )


def make_params(config, seed=0):
    """Random parameters, biases and norm scales included."""
    rng = np.random.default_rng(seed)
    init = lambda: nn.unbox(init_params(config, jax.random.key(0)))
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype),
        jax.eval_shape(init),
    )


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), actual, expected
    )


def make_tokenizer(pad_rows=0, with_tags=False):
    """A tokenizer of bytes, and a config whose vocabulary has `pad_rows` spare rows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE({s: i for i, s in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>"
    )
    if with_tags:
        fast.add_tokens(list(tags.TAGS))
    size = len(fast)
    return Tokenizer(fast), make_config("llama", vocab_size=size + pad_rows)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind, scan_layers):
    reference = np.load(REFERENCE / "logits.npz")
    config = read_config(REFERENCE / kind, scan_layers=scan_layers)
    params = weights.load_params(REFERENCE / kind, config)
    logits = causal_logits.compute(config, params, reference["tokens"])
    mask = reference["mask"]  # padded on the right
    np.testing.assert_allclose(logits[mask], reference[kind][mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_export_holds_the_same_as_the_folder_of_transformers(kind, tmp_path):
    config = read_config(REFERENCE / kind)
    params = weights.load_params(REFERENCE / kind, config)
    weights.save_params(tmp_path / "out", params, config, max_positions=64)
    read = lambda folder: safetensors.numpy.load_file(folder / "model.safetensors")
    ours, theirs = read(tmp_path / "out"), read(REFERENCE / kind)
    assert_same_tree(ours, theirs)
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    theirs = transformers.AutoConfig.from_pretrained(REFERENCE / kind).to_dict()
    free = {"_name_or_path", "bos_token_id", "eos_token_id", "attention_bias"}
    free |= {"head_dim"} if kind == "qwen2" else set()  # has none, but heeds it
    for field in theirs.keys() - free:
        assert ours[field] == theirs[field], field


@pytest.mark.parametrize("max_shard_bytes", [2**30, 5000])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, scan_layers, max_shard_bytes, tmp_path):
    config = make_config(kind, scan_layers=scan_layers)
    params = make_params(config)
    folder = tmp_path / "new" / "out"
    weights.save_params(folder, params, config, max_shard_bytes=max_shard_bytes)
    assert read_config(folder, scan_layers=scan_layers) == config
    assert_same_tree(weights.load_params(folder, config), params)
    parts = list(folder.glob("*.safetensors"))
    assert len(parts) == 1 if max_shard_bytes > 5000 else len(parts) > 2
    assert all(part.stat().st_size < max_shard_bytes + 3000 for part in parts)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_layers_stack_on_axis_0(tmp_path):
    config = make_config(num_layers=2)
    params = make_params(config)
    weights.save_params(tmp_path / "out", params, config)
    stacked = read_config(tmp_path / "out", scan_layers=True)
    stacked = weights.load_params(tmp_path / "out", stacked)
    expected = jax.tree.map(
        lambda *x: jnp.stack(x), params["layer_0"], params["layer_1"]
    )
    assert_same_tree(stacked["layers"], expected)


def test_dtypes(tmp_path):
    config = make_config(param_dtype="bfloat16")
    params = make_params(config)
    weights.save_params(tmp_path / "out", params, config)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16"
    read = read_config(
        tmp_path / "out", dtype="bfloat16", param_dtype="bfloat16", remat=True
    )
    assert (read.dtype, read.remat) == ("bfloat16", True)
    assert_same_tree(weights.load_params(tmp_path / "out", read), params)
    wide = weights.load_params(tmp_path / "out", read_config(tmp_path / "out"))
    assert_same_tree(wide, jax.tree.map(lambda x: x.astype("float32"), params))


def test_tensors_go_to_their_shardings(tmp_path):
    config = make_config(scan_layers=True)
    params = make_params(config)
    weights.save_params(tmp_path / "out", params, config)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    spec = lambda x: PartitionSpec(None, "data") if x.ndim > 1 else PartitionSpec()
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), params)
    loaded = weights.load_params(tmp_path / "out", config, shardings=shardings)
    assert_same_tree(loaded, params)
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.sharding, s), loaded, shardings)
    weights.save_params(tmp_path / "again", loaded, config)
    assert_same_tree(weights.load_params(tmp_path / "again", config), params)


def test_a_run_loads_a_folder_straight_to_its_devices(tmp_path, monkeypatch):
    # 260 rows are split over four devices, and the 263 with the tags are not.
    t, config = make_tokenizer(pad_rows=3)
    weights.save_params(tmp_path / "out", make_params(config), config)
    monkeypatch.setattr(tokenizer_files, "load", lambda folder: t)
    run = rl_alternating.get_config("smoke")
    run.model.path = str(tmp_path / "out")
    loaded = []
    for sizes in ((8, 1), (2, 4)):
        run.mesh.data, run.mesh.fsdp = sizes
        made = experiment.build(run)
        loaded.append(made.initial_params())
        same = lambda x, wanted: np.testing.assert_equal(x.sharding, wanted.sharding)
        jax.tree.map(same, loaded[-1], made.abstract_params())
    assert loaded[0]["embedding"].shape[0] == 263
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(loaded[1]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, *loaded)


def test_nothing_half_written_stays(tmp_path):
    config = make_config()
    params = make_params(config)
    del params["layer_2"]
    with pytest.raises(KeyError):
        weights.save_params(tmp_path / "out", params, config)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists"):
        weights.save_params(tmp_path / "full", make_params(config), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type='gemma3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=.*sliding_attention"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_unsupported_configs_are_named(changes, message, tmp_path):
    settings = json.loads((REFERENCE / "llama" / "config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_older_config_fields(tmp_path):
    settings = json.loads((REFERENCE / "qwen2" / "config.json").read_text())
    del settings["rope_parameters"], settings["layer_types"]
    settings |= {"rope_theta": 1e6, "rope_scaling": None, "attention_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read_config(tmp_path)
    assert (config.rope_base, config.head_dim, config.qkv_bias) == (1e6, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing from .*changed",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(17, np.float32)}),
            r"model\.norm\.weight has shape \(17,\), expected \(16,\): .*safetensors",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24)}),
            r"q_proj\.bias is none of this model",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    folder = shutil.copytree(REFERENCE / "llama", tmp_path / "changed")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        weights.load_params(folder, read_config(folder))
    assert "\n" not in str(error.value)


def test_damaged_folders_are_named(tmp_path):
    folder = tmp_path / "cut"
    with pytest.raises(FileNotFoundError, match=r"cut/config\.json"):
        read_config(folder)
    shutil.copytree(REFERENCE / "llama", folder)
    config = read_config(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is truncated"):
        weights.load_params(folder, config)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model\.safetensors"):
        weights.load_params(folder, config)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json does not hold a JSON object"):
        read_config(folder)


@pytest.mark.parametrize("pad_rows", [0, 4, 9])
def test_tag_rows_are_means_and_differ(pad_rows):
    t, config = make_tokenizer(pad_rows)
    params = make_params(config)
    old_size = t.vocab_size - 6
    key = jax.random.key(0)
    new, new_config = resize_embeddings(params, config, t, key, noise=0.1)
    again, _ = resize_embeddings(params, config, t, key, noise=0.1)
    assert_same_tree(new, again)
    assert new_config.vocab_size == max(config.vocab_size, t.vocab_size)
    for name in ["embedding", "head"]:
        old, rows = np.asarray(params[name]), np.asarray(new[name])
        assert rows.shape == (new_config.vocab_size, config.width)
        np.testing.assert_array_equal(rows[:old_size], old[:old_size])
        np.testing.assert_array_equal(rows[t.vocab_size :], old[t.vocab_size :])
        for tag, i in t.tag_ids.items():
            off = rows[i] - old[t.tag_pieces(tag)].mean(0)
            assert 0.04 / 2 < off.std() < 0.04 * 2  # a tenth of the rows' 0.4
        tag_rows = rows[list(t.tag_ids.values())]
        gaps = np.linalg.norm(tag_rows[:, None] - tag_rows, axis=-1)
        assert gaps[~np.eye(6, dtype=bool)].min() > 0.04
    exact, _ = resize_embeddings(params, config, t, key, noise=0.0)
    for tag, i in t.tag_ids.items():
        mean = params["head"][jnp.array(t.tag_pieces(tag))].mean(0)
        np.testing.assert_allclose(exact["head"][i], mean, atol=1e-6)
    assert new["layer_0"] is params["layer_0"]


def test_tokenizer_that_has_the_tags_changes_nothing():
    t, config = make_tokenizer(with_tags=True)
    params = make_params(config)
    same, same_config = resize_embeddings(params, config, t, jax.random.key(0))
    assert same_config == config
    assert_same_tree(same, params)


def test_vocabulary_mismatch_is_named():
    t, config = make_tokenizer(pad_rows=-1)
    with pytest.raises(ValueError, match="tokenizer has 257 tokens.*vocab_size is 256"):
        resize_embeddings({}, config, t, jax.random.key(0))


def test_exported_tokenizer_and_rows_come_back(tmp_path):
    t, config = make_tokenizer()
    params = make_params(config)
    params, config = resize_embeddings(params, config, t, jax.random.key(0))
    weights.save_params(tmp_path / "out", params, config, t)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["eos_token_id"] == t.eos_id
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "1<Parallel><Path>a</Path><Path>b</Path></Parallel>\n<Summary>c</Summary>"
    assert auto.encode(text, add_special_tokens=False) == t.encode(text)
    assert_same_tree(weights.load_params(tmp_path / "out", config), params)
