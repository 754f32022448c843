"""Rotary positions of config.json: what `transformers` computes, its spellings, errors.

tests/helpers/data/make_rope_reference.py made the numbers of rope.npz, with
`transformers`, from the settings in rope.json.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from pr1_jax.huggingface import weights
from pr1_jax.huggingface.config import config_json, read_config
from pr1_jax.model.rope import Linear, Llama3, Yarn
from pr1_jax.workdir import checkpoint
from tests.helpers import causal_logits

REFERENCE = Path(__file__).parents[1] / "helpers" / "data" / "hf_reference"
CASES = json.loads((REFERENCE / "rope.json").read_text())
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture(scope="module")
def reference():
    return np.load(REFERENCE / "rope.npz")


def changed(folder, changes, kind="llama"):
    """A folder of the reference's weights, some fields of its config.json changed."""
    shutil.copytree(REFERENCE / kind, folder)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", CASES["logits"])
def test_logits_equal_those_of_transformers(name, reference, tmp_path):
    kind, changes = CASES["logits"][name]
    folder = changed(tmp_path / "in", changes, kind)
    config = read_config(folder)
    assert config.rope_scaling is not None
    params = weights.load_params(folder, config)
    tokens = reference["tokens"]
    logits = causal_logits.compute(config, params, tokens)
    np.testing.assert_allclose(logits, reference[name], atol=1e-5, rtol=0)
    plain = dataclasses.replace(config, rope_scaling=None)
    gap = causal_logits.compute(plain, params, tokens) - reference[name]
    assert np.abs(gap).max() > 1e-2  # the scaling is seen
    # And an export is the same model, for us and for `transformers`.
    weights.save_params(tmp_path / "out", params, config)
    assert read_config(tmp_path / "out") == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert theirs["rope_theta"] == config.rope_base
    stated = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if v}
    assert stated.items() <= theirs.items()


@pytest.mark.parametrize("name", CASES["frequencies"])
def test_frequencies_of_published_models_equal_those_of_transformers(
    name, reference, tmp_path
):
    head_dim, parameters = CASES["frequencies"][name]
    changes = {"head_dim": head_dim, "rope_parameters": parameters}
    config = read_config(changed(tmp_path / "in", changes))
    found, factor = config.rope_scaling.frequencies(head_dim, config.rope_base)
    expected = reference[f"frequencies of {name}"]
    # Almost all are the same to the bit; the angle of position 100,000 is then, too.
    np.testing.assert_allclose(found, expected[:-1], rtol=2e-7)
    assert (found == expected[:-1]).mean() > 0.9
    np.testing.assert_allclose(factor, expected[-1], rtol=1e-7)


def test_scalings_by_hand():
    """Two frequencies, 1 and 1/100, of waves of 6.28 and 628 positions."""
    two = {"head_dim": 4, "base": 1e4}
    found, factor = Linear(4.0).frequencies(**two)
    np.testing.assert_allclose(found, [1 / 4, 1 / 400], rtol=1e-6)
    assert factor == 1
    # 16 waves of the first in 100 tokens, and a sixth of the second.
    found, factor = Llama3(8.0, 1.0, 4.0, 100).frequencies(**two)
    np.testing.assert_allclose(found, [1, 1 / 800], rtol=1e-6)
    assert factor == 1
    # 3 waves in 18.85 tokens are amid 2 and 4: half the share of each.
    found, _ = Llama3(8.0, 2.0, 4.0, 6 * np.pi).frequencies(**two)
    np.testing.assert_allclose(found, [(1 + 1 / 8) / 2, 1 / 800], rtol=1e-6)
    found, factor = Yarn(4.0, 100, beta_fast=10.0).frequencies(**two)
    np.testing.assert_allclose(found, [1, 1 / 400], rtol=1e-6)
    np.testing.assert_allclose(factor, 0.1 * np.log(4) + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 7.0},
        {"rope_parameters": None, "rope_theta": 7.0},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 9.0, "factor": 3.0}},
        {"rope_scaling": {}, "rope_theta": 7.0},
    ],
    ids=str,
)
def test_spellings_mean_what_they_mean_to_transformers(changes, tmp_path):
    folder = changed(tmp_path / "in", changes)
    config = read_config(folder)
    theirs = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert config.rope_base == theirs["rope_theta"]
    expected = None
    if theirs["rope_type"] == "linear":
        expected = Linear(theirs["factor"])
    assert config.rope_scaling == expected


SCALINGS = (None, Linear(4.0), Llama3(4.0, 1.0, 4.0, 16), Yarn(4.0, 16))


@pytest.mark.parametrize("there", SCALINGS, ids=str)
@pytest.mark.parametrize("here", SCALINGS, ids=str)
def test_a_checkpoint_is_not_taken_for_one_of_another_scaling(there, here):
    model = {"rope_scaling": there and dataclasses.asdict(there)}
    wanted = {"rope_scaling": here and dataclasses.asdict(here)}
    if there == here:
        return checkpoint.check_about(model, wanted, "it")
    with pytest.raises(ValueError, match="it was made with another rope_scaling"):
        checkpoint.check_about(model, wanted, "it")


def test_a_model_without_scaling_is_written_as_before():
    config = read_config(REFERENCE / "llama")
    settings = config_json(config, "float32", None, 64)
    assert settings["rope_theta"] == 500.0 and "rope_scaling" not in settings


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "type='dynamic' is none of .*default com"),
        ({"rope_type": "longrope"}, "rope_type='longrope' is none of default, linear,"),
        ({"rope_type": None}, "rope_type=None is none of"),
        ({"rope_type": ["yarn"]}, r"rope_type=\['yarn'\] is none of"),
        ({"full_attention": YARN}, "full_attention=.* is of one kind of layer"),
        (YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, supported"),
        (YARN | {"rope_theta": "1"}, "rope_theta='1' is not a positive number"),
        (YARN | {"rope_theta": 1}, "rope_theta=1 of yarn is not greater than 1"),
        ({"rope_type": "linear"}, "lacks factor, a number from 1"),
        ({"rope_type": "yarn"}, "lacks factor, a number from 1"),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "factor": "4"}, "factor='4' is"),
        (YARN | {"factor": 0.5}, "factor=0.5 is not a number from 1"),
        (YARN | {"factor": float("nan")}, "factor=nan is not a number from 1"),
        (YARN | {"factor": True}, "factor=True is not a number from 1"),
        (YARN | {"attention_factor": 0}, "attention_factor=0 is not a number from 0"),
        (YARN | {"beta_fast": -1}, "beta_fast=-1 is not a number from 0"),
        (YARN | {"beta_fast": 0.5}, "beta_fast=0.5 is less than beta_slow=1.0"),
        (YARN | {"truncate": None}, "truncate=None is not true or false"),
        (YARN | {"original_max_position_embeddings": 1.5}, "embeddings=1.5 is not a w"),
        ({n: LLAMA3[n] for n in list(LLAMA3)[:3]}, "lacks high_freq_factor, a number"),
        (LLAMA3 | {"low_freq_factor": 4}, "high_freq_factor=4.0 is not greater than"),
        (LLAMA3 | {"high_freq_factor": [4]}, r"high_freq_factor=\[4\] is not a number"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_named(scaling, message, tmp_path):
    for name in ("rope_scaling", "rope_parameters"):
        folder = changed(tmp_path / name, {name: scaling})
        with pytest.raises(ValueError, match=message) as error:
            read_config(folder)
        text = str(error.value)
        assert text.startswith(f"{folder / 'config.json'}: {name}: ")
        assert "\n" not in text and len(text) < 600
