"""Laws of the sampler: what is sampled is exactly what the trainer computes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, policy, tags
from pr1_jax.kernels import attention
from pr1_jax.model.backend import choose
from pr1_jax.model.forward import forward
from pr1_jax.model.params import init_params
from pr1_jax.model.rope import Llama3
from pr1_jax.sampler import loop, schedule
from pr1_jax.sampler.rows import Rows
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import END_PARALLEL, EOS
from pr1_jax.trajectory import Trajectory, pack, structured
from tests.helpers.laws import assert_laws
from tests.helpers.tiny import (
    LABELS,
    LLAMA,
    QWEN3,
    SETTINGS,
    TEXTS,
    VOCAB,
    VOCAB_SIZE,
    YARN,
    needs_kernels,
    with_vocab,
)


@functools.cache
def random_params(config, seed=0, scale=2.0):
    """Parameters whose policy is far from uniform, and likes tags."""
    init = functools.partial(init_params, config)
    params = nn.unbox(jax.jit(init)(jax.random.key(seed)))
    name = "embedding" if config.tie_embeddings else "head"
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    return params | {name: params[name] * scale / 4}


def random_prompts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, rng.integers(1, 10)) for _ in range(n)]


def text_of(trajectory):
    return "".join(TEXTS.get(int(t), "x") for t in trajectory.tokens)


def teacher_forced(config, params, trajectories, settings, length=130):
    """The trainer's log-probs of every token, [B, length]."""
    batch = pack(trajectories, length, variant=settings.variant)

    @jax.jit
    def compute(params, batch):
        def attend(q, k, v, cache):
            labels = batch.block, batch.path
            return attention.label_attention(q, k, v, *labels, query_chunk=32), cache

        xla = choose(config, "xla")
        hidden, _ = forward(xla, params, batch.tokens, batch.positions, attend)
        logps_of = lambda hidden, tokens, bans: policy.logps_and_entropies(
            xla.logits(params, hidden),
            tokens,
            bans,
            special_ids=with_vocab(settings).ban_ids,
            temperature=settings.temperature or 1.0,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        targets = batch.tokens[:, 1:], batch.bans[:, 1:]
        logps, _ = policy.sequence_logps(hidden[:, :-1], logps_of, *targets, chunk=64)
        return jnp.pad(logps, [(0, 0), (1, 0)])

    return batch, np.asarray(compute(params, batch))


def make_sampler(config, settings, *, kernels="xla", vocab=None, **batching):
    backend = choose(config, kernels)
    vocab = vocab or with_vocab(settings)
    return Sampler(backend, vocab, settings, Batching(**batching))


def sample(config, params, settings, *, n=12, samples=2, rows=8, seed=0, **kwargs):
    sampler = make_sampler(config, settings, rows=rows, **kwargs)
    prompts = random_prompts(n, seed)
    return sampler.sample(params, prompts, samples, jax.random.key(seed))[0]


LABELLED = {"path_labels": LABELS, "min_path_tokens": 5, "max_sequential_steps": 36}
PLANNED = {"path_labels": LABELS, "min_path_tokens": 5, "planned": True}
CASES = [
    pytest.param(QWEN3, {"num_paths": 3, **LABELLED}, "xla", id="qwen3-labelled"),
    pytest.param(LLAMA, {"num_paths": 3}, "xla", id="llama-3-paths"),
    pytest.param(
        dataclasses.replace(QWEN3, scan_layers=True),
        {
            "num_paths": 8,
            "max_response_tokens": 120,
            "max_path_tokens": 6,
            "max_plan_tokens": 5,
            **PLANNED,
        },
        "xla",
        id="scan-8-planned-paths",
    ),
    pytest.param(
        QWEN3,
        {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "max_path_tokens": 0},
        "xla",
        id="truncated",
    ),
    pytest.param(
        dataclasses.replace(
            QWEN3, qkv_bias=True, qk_norm=False, rope_scaling=Llama3(8.0, 1.0, 4.0, 16)
        ),
        {"ban_illegal": False},
        "xla",
        id="qwen2-no-bans",
    ),
    pytest.param(
        dataclasses.replace(QWEN3, qkv_bias=True, rope_scaling=YARN),
        {
            "num_paths": 4,
            "max_response_tokens": 90,
            "max_path_tokens": 6,
            "max_plan_tokens": 5,
            "max_sequential_steps": 60,
            **PLANNED,
        },
        "cpu",
        id="cpu-kernels-planned",
        marks=needs_kernels,
    ),
]


STRUCTURED_FIRST = pytest.mark.parametrize(
    "variant", ["structured", pytest.param("causal", marks=pytest.mark.slow)]
)


def both_variants(cases, slow=()):
    """Cases in both variants; the causal ones of `slow` are left to the slow tests."""
    return [
        pytest.param(
            *case.values,
            variant,
            id=f"{case.id or i}-{variant}",
            marks=[
                *case.marks,
                *[pytest.mark.slow] * (variant == "causal" and i in slow),
            ],
        )
        for i, case in enumerate(cases)
        for variant in layout.VARIANTS
    ]


@pytest.mark.parametrize(
    "config, changes, kernels, variant", both_variants(CASES, slow=(1, 3, 4))
)
def test_sampled_logps_equal_teacher_forced(config, changes, kernels, variant):
    settings = dataclasses.replace(SETTINGS, variant=variant, **changes)
    params, how = random_params(config), {"kernels": kernels, "steps_per_chunk": 7}
    trajectories = sample(config, params, settings, **how)
    assert sum(t.num_blocks for t in trajectories) >= 6  # the case is worth testing
    for t in trajectories:
        assert_laws(t, settings, with_vocab(settings))
    batch, logps = teacher_forced(config, params, trajectories, settings)
    compared = batch.loss_mask.copy()
    if variant == "causal":  # later paths differ by design (docs/method.md, section 3)
        for row, t in enumerate(trajectories):
            start = len(t.prompt)
            compared[row, start : start + len(t.tokens)] &= t.path <= 1
    gap = np.abs(batch.old_logps - logps)[compared]
    assert compared.sum() > 150
    assert gap.max() < 1e-4
    if settings.planned:  # the model decides how many paths a block has
        decided = compared & (batch.bans >> policy.ORDINARY & 1 == 1)
        assert decided.sum() >= 3
        assert (np.exp(logps[decided]) < 1).all()


def test_paths_see_all_plans_and_no_sibling():
    """Other words in a plan change all paths, other words in a path no other one."""
    settings = dataclasses.replace(SETTINGS, num_paths=3, **PLANNED)
    plans, paths = [16, 3, 17, 16, 4, 17, 16, 9, 17], [12, 5, 13, 12, 8, 13, 12, 7, 13]
    tokens = np.array([10, *plans, *paths, 11, 2, 14, 6, 15, 1], np.int32)
    ids = dict(zip(settings.grammar.tags, with_vocab(settings).tag_ids))
    parsed = layout.structured(tokens, ids, 1)
    zeros = np.zeros(len(tokens), np.int32)
    made = Trajectory(
        prompt=np.array([5], np.int32),
        tokens=tokens,
        **{name: x[1:] for name, x in parsed._asdict().items()},
        forced=zeros > 0,
        bans=zeros,
        logps=zeros.astype(np.float32),
        finished=True,
        sequential_steps=0,
    )
    others = []
    for at in (2, 5, 8, 11, 14, 17):  # the text of each plan, and of each path
        other = tokens.copy()
        other[at] = 22
        others.append(dataclasses.replace(made, tokens=other))
    params = random_params(QWEN3)
    _, logps = teacher_forced(QWEN3, params, [made, *others], settings)
    moved = np.abs(logps[1:] - logps[0]) > 1e-5
    ends = np.array([12, 15, 18]) + 1  # what each path's text predicts
    np.testing.assert_array_equal(moved[:, ends], [[1, 1, 1]] * 3 + np.eye(3).tolist())


def test_recorded_layout_is_the_parsed_one():
    trajectories = sample(QWEN3, random_params(QWEN3), SETTINGS)
    ids = dict(zip(tags.TAGS, VOCAB.special_ids))
    for t in trajectories:
        parsed = layout.structured(t.tokens, ids, len(t.prompt))
        for name in ("positions", "block", "path"):
            expected = getattr(parsed, name)[len(t.prompt) :]
            np.testing.assert_array_equal(getattr(t, name), expected)
        relaid = structured(dataclasses.replace(t, positions=None))
        np.testing.assert_array_equal(relaid.positions, t.positions)


def test_causal_sampling_of_structured_responses_parts_from_them_after_a_block():
    """The shortcut of the published code: exact up to `</Parallel>`, then another policy."""
    causal = dataclasses.replace(SETTINGS, variant="causal")
    params = random_params(QWEN3)
    sampled = sample(QWEN3, params, causal)
    relaid = [structured(t) for t in sampled]
    batch, logps = teacher_forced(QWEN3, params, relaid, SETTINGS)
    gap = np.where(batch.loss_mask, np.abs(batch.old_logps - logps), 0.0)
    after = np.zeros_like(batch.loss_mask)
    for row, t in enumerate(sampled):
        closed = np.flatnonzero(t.tokens == VOCAB.special_ids[END_PARALLEL])
        first = closed[0] if t.num_blocks else len(t.tokens)
        after[row, len(t.prompt) + first : len(t)] = True
    assert (batch.loss_mask & after).sum() > 100
    assert gap[~after].max() < 1e-4  # its paths among them
    assert gap[after].max() > 0.1


def test_causal_path_gap_is_by_design():
    """Later paths were decoded without seeing their siblings; the trainer lets them."""
    settings = dataclasses.replace(SETTINGS, variant="causal")
    params = random_params(QWEN3)
    trajectories = sample(QWEN3, params, settings)
    batch, logps = teacher_forced(QWEN3, params, trajectories, settings)
    later = np.zeros_like(batch.loss_mask)
    for row, t in enumerate(trajectories):
        later[row, len(t.prompt) : len(t.prompt) + len(t.tokens)] = t.path > 1
    assert np.abs(batch.old_logps - logps)[later & batch.loss_mask].max() > 1e-2


@STRUCTURED_FIRST
def test_samples_do_not_depend_on_batching(variant):
    settings = dataclasses.replace(SETTINGS, variant=variant, **LABELLED)
    params = random_params(QWEN3)
    few = sample(QWEN3, params, settings, rows=4, steps_per_chunk=5)
    many = sample(
        QWEN3, params, settings, rows=24, lane_buckets=(1.25, 1.5), steps_per_chunk=64
    )
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)
        assert a.sequential_steps == b.sequential_steps


@STRUCTURED_FIRST
def test_a_prompt_is_prefilled_once_for_its_group(variant, monkeypatch):
    settings = dataclasses.replace(SETTINGS, variant=variant)
    params, prompts = random_params(QWEN3), random_prompts(6)
    prefilled = []
    admit = Rows.admit

    def counting(rows, *args):
        admission = admit(rows, *args)
        prefilled.append((admission.entries < rows.entries).sum())
        return admission

    monkeypatch.setattr(Rows, "admit", counting)
    found, entries, prefills = [], [], []
    for group_size in (1, 5):
        sampler = make_sampler(QWEN3, settings, rows=8, group_size=group_size)
        prefilled.clear()
        found.append(sampler.sample(params, prompts, 5, jax.random.key(0))[0])
        entries.append(sampler.schedule.entries)
        prefills.append(sum(prefilled))
    assert prefills[1] == len(prompts) < prefills[0]
    assert entries == [8, 7]  # copies of prompts that are kept
    for one, shared in zip(*found, strict=True):
        np.testing.assert_array_equal(one.tokens, shared.tokens)
        np.testing.assert_allclose(one.logps, shared.logps, atol=1e-4)


@needs_kernels
def test_the_kernels_sample_what_xla_does():
    """One row at a time: paths end, and the first of a block goes on alone."""
    params = random_params(QWEN3)
    how = {"samples": 5, "group_size": 5, "rows": 1}
    found = [sample(QWEN3, params, SETTINGS, kernels=k, **how) for k in ("xla", "cpu")]
    for xla, own in zip(*found, strict=True):
        np.testing.assert_array_equal(xla.tokens, own.tokens)
        np.testing.assert_allclose(xla.logps, own.logps, atol=1e-4)


@pytest.mark.parametrize(
    "kernels, fewest", [("xla", 64), pytest.param("cpu", 37, marks=needs_kernels)]
)
def test_slots_grow_with_the_responses_and_change_nothing(kernels, fewest, monkeypatch):
    """A greater budget costs nothing: the same slots, the same responses."""
    settings = dataclasses.replace(SETTINGS, max_response_tokens=150, max_blocks=0)
    late = dataclasses.replace(VOCAB, special_ids=(*VOCAB.special_ids[:-1], 17))
    params, seen, slots = random_params(QWEN3), [], []
    chunk = loop.run_chunk

    def watched(params, state, *args, **kwargs):
        slots[-1].append(state.slot_path.shape[1])
        return chunk(params, state, *args, **kwargs)

    monkeypatch.setattr(loop, "run_chunk", watched)
    monkeypatch.setattr(schedule, "FEWEST_SLOTS", fewest)
    for budget in (150, 600):
        larger = dataclasses.replace(settings, max_response_tokens=budget)
        sampler = make_sampler(QWEN3, larger, kernels=kernels, vocab=late, rows=4)
        slots.append([])
        prompts, key = random_prompts(8), jax.random.key(3)
        seen.append(sampler.sample(params, prompts, 1, key)[0])
        longest = max(len(t.tokens) for t in seen[-1])
        assert slots[-1][0] < longest <= max(slots[-1]) <= 150  # those compiled
    for small, large in zip(*seen, strict=True):
        assert small.finished
        np.testing.assert_array_equal(small.tokens, large.tokens)
        np.testing.assert_allclose(small.logps, large.logps, atol=1e-4)


def test_rows_are_kept_busy():
    """Finished rows are refilled, and there are fewer rows once none waits."""
    settings = dataclasses.replace(SETTINGS, max_response_tokens=90, max_blocks=0)

    def decode_fn(params, lanes, state, num_lanes):
        lengths = jax.random.key_data(state.key)[:, 1] % 70 + 16  # 16 to 85
        row = jnp.clip(lanes.row, 0, len(lengths) - 1)
        ends = state.emitted[row] + 1 >= lengths[row].astype(jnp.int32)
        eos = VOCAB.special_ids[EOS]
        logits = jnp.zeros((num_lanes, VOCAB_SIZE))
        return logits.at[:, eos].set(jnp.where(ends, 50.0, -50.0)), state.cache

    batching = Batching(rows=32, group_size=8)
    sampler = Sampler(None, VOCAB, settings, batching, decode_fn=decode_fn)
    found, figures = sampler.sample(
        jnp.zeros(()), random_prompts(40), 8, jax.random.key(0)
    )
    lengths = [len(t.tokens) for t in found]
    assert min(lengths) < 25 and max(lengths) > 75
    assert figures.useful_row_steps > 0.9


def test_responses_are_handed_over_as_they_finish_and_by_their_numbers():
    params, key = random_params(QWEN3), jax.random.key(0)
    sampler = make_sampler(QWEN3, SETTINGS, rows=4, steps_per_chunk=7)
    prompts = random_prompts(5)
    waiting, finished = [], {}

    def on_finished(index, response):
        assert index not in finished
        finished[index] = response
        waiting.append(10 - len(finished))

    whole, _ = sampler.sample(params, prompts, 2, key, on_finished=on_finished)
    assert all(finished[i] is response for i, response in enumerate(whole))
    assert waiting[0] >= 6  # so the first one came while others had not begun
    parts = [
        *sampler.sample(params, prompts[:3], 2, key)[0],
        *sampler.sample(params, prompts[3:], 2, key, ids=range(6, 10))[0],
    ]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.slow
def test_greedy_sampling_takes_the_most_likely_token():
    settings = dataclasses.replace(SETTINGS, temperature=0.0, max_blocks=0)
    params = random_params(QWEN3)
    for t in sample(QWEN3, params, settings, n=3, samples=1):
        tokens = np.concatenate([t.prompt, t.tokens])[None]
        zeros = jnp.zeros_like(tokens)

        def attend(q, k, v, cache, zeros=zeros):
            return attention.label_attention(q, k, v, zeros, zeros), cache

        positions = jnp.arange(tokens.shape[1])[None]
        xla = choose(QWEN3, "xla")
        hidden, _ = forward(xla, params, tokens, positions, attend)
        logits = np.array(xla.logits(params, hidden)[0, len(t.prompt) - 1 : -1])
        banned = [i for i in VOCAB.special_ids if i != VOCAB.special_ids[EOS]]
        logits[:, banned] = -np.inf
        np.testing.assert_array_equal(logits.argmax(-1), t.tokens)
        assert t.num_blocks == 0


@pytest.mark.parametrize(
    "field, value",
    [("num_paths", 99), ("num_paths", 1), ("top_p", 0.0), ("variant", "seen")],
)
def test_bad_settings_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"rollout.{field}={value}"):
        dataclasses.replace(SETTINGS, **{field: value})


def test_long_prompt_is_refused():
    sampler = make_sampler(QWEN3, SETTINGS, rows=2)
    with pytest.raises(ValueError, match="prompt 1 has 10 tokens.*max_prompt_tokens=9"):
        sampler.sample(None, [[3], [3] * 10], 1, jax.random.key(0))
