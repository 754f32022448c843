"""SmolLM2-135M, a real pretrained model, through loading, sampling and export.

tests/helpers/data/smollm2_greedy.json holds what `transformers` answers to ten prompts (made
by tests/smollm2.py), so that most tests need no torch.
"""

import json
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from pr1_jax.data import tokenizer, tokenizer_files
from pr1_jax.huggingface import tags, weights
from pr1_jax.huggingface.config import max_positions, read_config
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings, Vocab
from pr1_jax.tags import PARALLEL, TAGS
from pr1_jax.training.logps import PolicySettings, policy_logps
from pr1_jax.trajectory import pack
from tests.helpers import causal_logits, smollm2

REFERENCE = json.loads(smollm2.REFERENCE.read_text())
PROMPT_IDS = [entry["prompt_ids"] for entry in REFERENCE]
MAX_PROMPT_TOKENS = max(map(len, PROMPT_IDS))


class Policy(NamedTuple):
    """The model with its six tag rows."""

    config: ModelConfig
    params: Any
    tokenizer: tokenizer.Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The Hugging Face folder; half a gigabyte, so it does not stay."""
    root = tmp_path_factory.mktemp("smollm2")
    try:
        smollm2.make_folder(root / "hf")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    yield root / "hf"
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def policy(folder):
    config = read_config(folder, scan_layers=True)
    params = weights.load_params(folder, config)
    t = tokenizer_files.load(folder)
    params, config = tags.resize_embeddings(params, config, t, jax.random.key(0))
    return Policy(config, params, t)


def make_sampler(policy, rows, **settings):
    settings = Settings(
        **{
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_response_tokens": smollm2.NEW_TOKENS,
            **settings,
        }
    )
    vocab = Vocab.of(policy.tokenizer)
    return Sampler(Xla(policy.config), vocab, settings, Batching(rows=rows))


def pad(rows):
    """[B, T] int32 and its mask, padded on the right."""
    lengths = np.array([[len(row)] for row in rows])
    mask = np.arange(lengths.max()) < lengths
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def test_reference_is_worth_comparing_with():
    chats = [entry for entry in REFERENCE if not isinstance(entry["prompt"], str)]
    assert len(REFERENCE) == 10 and 3 <= len(chats) <= 7
    assert len(set(map(len, PROMPT_IDS))) >= 8
    lengths = [len(entry["answer_ids"]) for entry in REFERENCE]
    assert max(lengths) == smollm2.NEW_TOKENS > min(lengths)


def test_config_is_that_of_the_model_card(folder):
    assert read_config(folder) == ModelConfig(
        vocab_size=49152,
        num_layers=30,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        tie_embeddings=True,
        qk_norm=False,
        rope_base=100_000.0,
        rms_eps=float(np.float32(1e-5)),
    )
    assert max_positions(folder) == 8192


def test_prompts_are_tokenized_as_by_transformers(policy):
    t = policy.tokenizer
    assert t.new_tags == TAGS
    for entry in REFERENCE:
        text = entry["prompt"]
        if not isinstance(text, str):
            text = t.chat_prompt(text)
        assert text == entry["text"]
        assert t.encode(text) == entry["prompt_ids"]
        assert t.decode(entry["answer_ids"]) == entry["answer"]


def test_numbers_are_split_into_digits(policy):
    t = policy.tokenizer
    pieces = [t.decode([i]) for i in t.encode("x = 1234,  56")]
    assert pieces == ["x", " =", " ", "1", "2", "3", "4", ",", "  ", "5", "6"]


@pytest.mark.slow
def test_greedy_answers_equal_those_of_transformers(policy):
    sampler = make_sampler(policy, rows=10, temperature=0.0, max_blocks=0)
    trajectories, _ = sampler.sample(policy.params, PROMPT_IDS, 1, jax.random.key(0))
    for entry, t in zip(REFERENCE, trajectories, strict=True):
        assert t.tokens.tolist() == entry["answer_ids"], entry["text"]
        assert t.finished == (t.tokens[-1] == policy.tokenizer.eos_id)
        assert t.num_blocks == 0
        if "capital of France" in entry["text"]:
            assert "Paris" in policy.tokenizer.decode(t.tokens)


@pytest.mark.slow
def test_sampled_logps_equal_teacher_forced(policy):
    """At temperature 1 and through blocks, on a model that has never seen the tags."""
    # `<Parallel>` is made a bit more likely than " Paris" wherever that is likely.
    prompts, (paris, *_) = PROMPT_IDS[:6:5], REFERENCE[0]["answer_ids"]
    rows, i = policy.params["embedding"], policy.tokenizer.tag_ids[PARALLEL]
    params = policy.params | {"embedding": rows.at[i].set(1.1 * rows[paris])}
    sampler = make_sampler(policy, rows=6, max_response_tokens=48, max_path_tokens=8)
    trajectories, _ = sampler.sample(params, prompts, 3, jax.random.key(1))
    assert sum(t.num_blocks for t in trajectories) >= 2  # the case is worth testing
    vocab = Vocab.of(policy.tokenizer)
    settings = PolicySettings(vocab.special_ids, vocab.num_tokens)
    length = max(map(len, trajectories))
    batch = pack(trajectories, length, variant=sampler.settings.variant)
    logps = jax.jit(
        lambda params, batch: policy_logps(Xla(policy.config), params, batch, settings)[
            0
        ]
    )(params, batch)
    mask = batch.loss_mask
    assert mask.sum() > 200
    np.testing.assert_allclose(batch.old_logps[mask], logps[mask], atol=1e-4, rtol=0)


def test_export_comes_back(policy, tmp_path):
    out = tmp_path / "out"
    weights.save_params(
        out,
        policy.params,
        policy.config,
        policy.tokenizer,
        max_shard_bytes=200 * 2**20,
    )
    assert len(list(out.glob("*.safetensors"))) == 3
    config = read_config(out, scan_layers=True)
    assert config == policy.config
    jax.tree.map(
        np.testing.assert_array_equal, weights.load_params(out, config), policy.params
    )
    t = tokenizer_files.load(out)
    assert (t.tag_ids, t.eos_id) == (policy.tokenizer.tag_ids, policy.tokenizer.eos_id)
    for entry in REFERENCE:
        assert t.encode(entry["text"]) == entry["prompt_ids"]
    shutil.rmtree(out)


def test_forced_answers_are_the_likeliest(policy):
    """What `transformers` answered greedily is what the forward pass would answer."""
    rows = [entry["prompt_ids"] + entry["answer_ids"] for entry in REFERENCE]
    tokens, _ = pad(rows)
    logits = causal_logits.compute(policy.config, policy.params, tokens)
    for row, entry in zip(logits, REFERENCE, strict=True):
        start, answer = len(entry["prompt_ids"]) - 1, entry["answer_ids"]
        assert row[start : start + len(answer)].argmax(-1).tolist() == answer
