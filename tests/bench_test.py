"""Tests of pr1_jax.bench: costs by hand, plans that are followed, fair baselines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import attention, decode, layout, losses, model, tags
from pr1_jax.bench import limits, plans, request_programs, requests, shapes

CONFIG = shapes.SHAPES["tiny"].model
KEY = jax.random.key(3)
BENCH = shapes.Bench(
    shape=shapes.SHAPES["tiny"],
    sizes=shapes.QUICK,
    repeats=1,
    limits=limits.Limits(1e9, 1e9),
    traces=plans.builtin_traces(),
    traces_from="the built-in deciles",
    quick=True,
)
VOCAB = BENCH.vocab
TAG_IDS = dict(zip(tags.TAGS, VOCAB.special_ids))


@functools.cache
def drawn_plans(num_paths):
    return plans.make_plans(BENCH.traces, 6, num_paths, 60, seed=1)[0]


@functools.cache
def params():
    """Far from uniform, so that log-probs tell contexts apart."""
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, BENCH.params)


def prompts_of(planned):
    return BENCH.prompts([plan.prompt for plan in planned])


def lengths(tokens, block, path):
    """What of a response a plan says: main, paths, summaries, tail."""
    ids, tokens = VOCAB.special_ids, np.asarray(tokens)
    main, summaries, inside, count = [], [], False, 0
    for token, p in zip(tokens.tolist(), path.tolist()):
        if p:
            continue
        count += 1
        if token == ids[decode.PARALLEL]:
            main.append(count)
        elif token == ids[decode.END_SUMMARY]:
            summaries.append(count)
        if token in (
            ids[decode.PARALLEL],
            ids[decode.END_SUMMARY],
            ids[decode.SUMMARY_OPEN],
        ):
            count = 0
    paths = tuple(
        tuple(np.bincount(path[block == b])[1:].tolist())
        for b in range(1, block.max(initial=0) + 1)
    )
    assert tokens[-1] == ids[decode.EOS] and not inside
    return tuple(main), paths, tuple(summaries), count


def of_plan(plan):
    return plan.main, plan.paths, plan.summaries, plan.tail


@functools.cache
def requests_of(num_paths, copies, rows):
    programs = request_programs.Programs(
        CONFIG, VOCAB, steps_per_chunk=8, prefill_rows=(2,)
    )
    planned = drawn_plans(num_paths)
    prompts = prompts_of(planned)
    how = {"rows": rows, "copies": copies}
    return requests.decode_requests(programs, params(), prompts, planned, KEY, **how)


@jax.jit
def teacher_forced(tokens, positions, block, path, bans):
    """Log-probs [T] of tokens [T]; entry 0 has no meaning."""

    def attend(q, k, v, cache):
        return attention.label_attention(q, k, v, block[None], path[None]), cache

    hidden, _ = model.forward(CONFIG, params(), tokens[None], positions[None], attend)
    logits = losses.policy_logits(
        model.logits(params(), hidden)[0, :-1],
        bans[1:],
        special_ids=VOCAB.special_ids,
    )
    return jnp.pad(losses.token_logps(logits, tokens[1:]), (1, 0))


def largest_gap(tokens, laid_out, logps, compared):
    """Between log-probs of free draws and the teacher-forced ones."""
    T = 128
    pad = lambda x: jnp.asarray(np.pad(np.asarray(x, np.int32), (0, T - len(x))))
    no_tags = pad(np.full(len(tokens), 0b1111111))
    forced = teacher_forced(pad(tokens), *map(pad, laid_out), no_tags)
    return np.abs(np.asarray(forced)[: len(tokens)] - logps)[compared].max(initial=0)


@pytest.mark.parametrize("num_paths", [2, 3])
def test_the_sampler_follows_plans(num_paths):
    planned = drawn_plans(num_paths)
    sampler = plans.planned_sampler(
        CONFIG, VOCAB, planned, KEY, rows=4, num_paths=num_paths, steps_per_chunk=8
    )
    sampled = sampler.sample(params(), prompts_of(planned), 1, KEY)
    for plan, t in zip(planned, sampled, strict=True):
        assert lengths(t.tokens, t.block, t.path) == of_plan(plan)
        assert len(t.tokens) == plan.tokens
        tags_and_newline = {*VOCAB.special_ids[1:5], VOCAB.newline_id}
        assert set(t.tokens[t.forced].tolist()) <= tags_and_newline - {
            VOCAB.special_ids[decode.END_PATH]
        }


CASES = [(2, False, 3), (2, False, 32), (2, True, 4), (3, True, 32)]


@pytest.mark.parametrize("num_paths, copies, rows", CASES)
def test_requests_follow_plans(num_paths, copies, rows):
    planned, result = drawn_plans(num_paths), requests_of(num_paths, copies, rows)
    prompts = prompts_of(planned)
    for plan, tokens, logps in zip(planned, result.tokens, result.logps, strict=True):
        parsed = layout.structured(tokens, TAG_IDS, 0)
        assert lengths(tokens, parsed.block, parsed.path) == of_plan(plan)
        assert len(tokens) == len(logps) == plan.tokens
    contexts = sum(len(r.context) - 1 for r in result.requests)
    alone = sum(len(prompt) - 1 for prompt in prompts)
    assert result.prefilled_tokens == (alone if copies else contexts)


@pytest.mark.parametrize("num_paths, copies, rows", CASES)
def test_requests_decode_with_the_same_model(num_paths, copies, rows):
    planned, result = drawn_plans(num_paths), requests_of(num_paths, copies, rows)
    if copies:  # the sampler's function, over the whole response
        for prompt, tokens, logps in zip(
            prompts_of(planned), result.tokens, result.logps
        ):
            laid_out = layout.structured(tokens, TAG_IDS, len(prompt))
            whole = np.concatenate([prompt, tokens])
            logps = np.concatenate([np.zeros(len(prompt)), logps])
            free = ~np.isin(whole, (*VOCAB.special_ids, VOCAB.newline_id))
            free[: len(prompt)] = False
            assert largest_gap(whole, laid_out, logps, free) < 1e-4
    else:  # plain causal decoding of every request's own context
        for r in result.requests:
            whole = np.array([*r.context, *r.tokens])
            logps = np.concatenate([np.zeros(len(r.context)), r.logps])
            free = np.arange(len(whole)) >= len(r.context)
            free[-1] = False  # the tag that ends it
            laid_out = layout.causal(len(whole))
            assert largest_gap(whole, laid_out, logps, free) < 1e-4
    drawn = np.concatenate([r.logps for r in result.requests])
    assert drawn.min() < -6  # the policy is far from uniform
