"""Tests of pr1_jax.bench: costs by hand, plans that are followed, fair baselines."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr1_jax import layout, policy, tags
from pr1_jax.bench import lanes, limits, plans, shapes, suites, timing
from pr1_jax.bench.published import request_programs, requests
from pr1_jax.kernels import attention
from pr1_jax.model import costs
from pr1_jax.model.backend import choose
from pr1_jax.model.forward import forward as forward_forward
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.settings import END_PATH, END_SUMMARY, EOS, PARALLEL, SUMMARY_OPEN
from pr1_jax.system import tables
from tests.helpers import command

CONFIG = shapes.SHAPES["tiny"].model
KEY = jax.random.key(3)
BENCH = shapes.Bench(
    shape=shapes.SHAPES["tiny"],
    sizes=shapes.QUICK,
    repeats=1,
    limits=limits.Limits(1e9, 1e9, {64: 1e9}, {"sum": 1e9}),
    quick=True,
)
VOCAB = BENCH.vocab
TAG_IDS = dict(zip(tags.TAGS, VOCAB.special_ids))


@functools.cache
def drawn_plans(num_paths):
    return plans.make_plans(plans.builtin_traces(), 6, num_paths, 56, seed=1)[0]


@functools.cache
def params():
    """Far from uniform, so that log-probs tell contexts apart."""
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, BENCH.params)


def prompts_of(planned):
    return BENCH.prompts([plan.prompt for plan in planned])


def lengths(tokens, block, path):
    """What of a response a plan says: main, paths, summaries, tail."""
    ids, tokens = VOCAB.special_ids, np.asarray(tokens)
    main, summaries, count = [], [], 0
    for token, p in zip(tokens.tolist(), path.tolist()):
        if p:
            continue
        count += 1
        if token == ids[PARALLEL]:
            main.append(count)
        elif token == ids[END_SUMMARY]:
            summaries.append(count)
        if token in (ids[PARALLEL], ids[END_SUMMARY], ids[SUMMARY_OPEN]):
            count = 0
    paths = tuple(
        tuple(np.bincount(path[block == b])[1:].tolist())
        for b in range(1, block.max(initial=0) + 1)
    )
    assert tokens[-1] == ids[EOS]
    return tuple(main), paths, tuple(summaries), count


def of_plan(plan):
    return plan.main, plan.paths, plan.summaries, plan.tail


@functools.cache
def programs(kernels):
    backend = choose(CONFIG, kernels)
    return request_programs.Programs(
        backend, VOCAB, steps_per_chunk=8, prefill_rows=(2,)
    )


@functools.cache
def requests_of(num_paths, rows, kernels="xla"):
    planned, made = drawn_plans(num_paths), programs(kernels)
    prompts = prompts_of(planned)
    return requests.decode_requests(made, params(), prompts, planned, KEY, rows=rows)


@jax.jit
def teacher_forced(tokens, positions, block, path, bans):
    """Log-probs [T] of tokens [T]; entry 0 has no meaning."""

    def attend(q, k, v, cache):
        return attention.label_attention(q, k, v, block[None], path[None]), cache

    hidden, _ = forward_forward(
        Xla(CONFIG), params(), tokens[None], positions[None], attend
    )
    logits = policy.policy_logits(
        Xla(CONFIG).logits(params(), hidden)[0, :-1],
        bans[1:],
        special_ids=VOCAB.special_ids,
    )
    return jnp.pad(policy.token_logps(logits, tokens[1:]), (1, 0))


def largest_gap(tokens, laid_out, logps, compared):
    """Between log-probs of free draws and the teacher-forced ones."""
    T = 128
    pad = lambda x: jnp.asarray(np.pad(np.asarray(x, np.int32), (0, T - len(x))))
    no_tags = pad(np.full(len(tokens), 0b1111111))
    forced = teacher_forced(pad(tokens), *map(pad, laid_out), no_tags)
    return np.abs(np.asarray(forced)[: len(tokens)] - logps)[compared].max(initial=0)


def test_costs_by_hand():
    layer, names = BENCH.params["layer_0"], ("q", "k", "v", "o", "gate", "up", "down")
    weights = sum(layer[name]["kernel"].size for name in names)
    assert costs.layer_weights(CONFIG) == weights == 1920
    assert costs.head_weights(CONFIG) == BENCH.params["embedding"].size == 1024
    cost = costs.forward(CONFIG, tokens=3, pairs=6, cached=5, logits=2)
    assert cost.flops == 2 * 1920 * 3 + 4 * (2 * 8) * 6 + 2 * 1024 * 2
    assert cost.bytes == 4 * (1920 + 1024 + 2 * (1 * 8) * 5)
    bare = costs.forward(CONFIG, tokens=1, pairs=0, cached=0, logits=0)
    assert bare == costs.Cost(2 * 1920, 4 * 1920)  # no logits: the head is not read
    half = dataclasses.replace(CONFIG, dtype="bfloat16", num_layers=3)
    cost = costs.forward(half, tokens=1, pairs=1, cached=1, logits=1)
    assert cost.flops == 3 * (2 * 1920 + 4 * 16) + 2 * 1024
    assert cost.bytes == 2 * (3 * (1920 + 2 * 8) + 1024)


def test_costs_of_steps_prompts_and_updates_by_hand():
    forward = functools.partial(costs.forward, CONFIG)
    step = costs.decode_step(CONFIG, rows=4, prompt=5, response=2, lanes=3)
    assert step == forward(tokens=12, pairs=12 * 7, cached=4 * 7, logits=12)
    prompt = costs.prefill(CONFIG, rows=2, tokens=3)
    assert prompt == forward(tokens=6, pairs=2 * (1 + 2 + 3), cached=0, logits=0)
    flops = costs.update_flops(CONFIG, rows=2, tokens=3, trained=2)
    assert flops == 6 * (6 * 1920 + 4 * 1024) + 3 * 4 * 16 * 2 * (1 + 2 + 3)
    flops = costs.update_flops(CONFIG, rows=4, tokens=3, trained=1, group_rows=2)
    pairs = 2 * (1 + 2) + 4 * 3  # of two prompts, and of four responses to them
    assert flops == 6 * ((2 * 2 + 4) * 1920 + 4 * 1024) + 3 * 4 * 16 * pairs


def test_the_limit_is_the_slower_of_both_at_every_step():
    cost = costs.Cost(flops=30.0, bytes=8.0)
    assert cost.seconds(limits.Limits(10.0, 4.0)) == 3.0
    assert cost.seconds(limits.Limits(30.0, 2.0)) == 4.0
    seconds = costs.decode_seconds(
        CONFIG, limits.Limits(1e9, 1e6), rows=2, prompt=5, tokens=2
    )
    steps = [costs.decode_step(CONFIG, rows=2, prompt=5, response=n) for n in (0, 1)]
    assert seconds == pytest.approx(sum(step.bytes for step in steps) / 1e6)


def test_a_plan_by_hand():
    # a <Parallel> | <Path> x </Path> · <Path> </Path> | </P> nl <S> | s </S> | b EOS
    plan = plans.Plan(prompt=3, main=(2,), paths=((3, 2),), summaries=(2,), tail=2)
    assert plan.tokens == 2 + 5 + 3 + 2 + 2
    assert plan.opens == [1]
    assert plan.sequential() == plans.Plan(3, tail=plan.tokens)
    two = plans.Plan(3, (2, 1), ((3, 2), (2, 2)), (2, 1), 2)
    assert two.opens == [1, 12]
    assert two.tokens == 12 + (1 + 4 + 3 + 1) + 2


def test_drawn_plans_have_their_paths_and_fit():
    for num_paths in (2, 8):
        planned, factor = plans.make_plans(plans.builtin_traces(), 40, num_paths, 300)
        assert {len(p) for plan in planned for p in plan.paths} == {num_paths}
        if num_paths == 2:
            assert 290 <= max(plan.tokens for plan in planned) <= 300
            assert 0.1 < factor < 2
    blocks = np.mean([len(trace.main) for trace in plans.builtin_traces(2000)])
    assert blocks == pytest.approx((259 + 2 * 58 + 3 * 12 + 4 * 6) / 338, abs=0.05)


@pytest.mark.slow
def test_the_sampler_follows_plans():
    num_paths = 3
    planned = drawn_plans(num_paths)
    sampler = BENCH.planned(planned, rows=4, num_paths=num_paths, steps_per_chunk=8)
    sampled, _ = sampler.sample(params(), prompts_of(planned), 1, BENCH.key)
    may_be_forced = {*VOCAB.special_ids[1:5], VOCAB.newline_id}
    may_be_forced -= {VOCAB.special_ids[END_PATH]}
    for plan, t in zip(planned, sampled, strict=True):
        assert lengths(t.tokens, t.block, t.path) == of_plan(plan)
        assert len(t.tokens) == plan.tokens
        assert set(t.tokens[t.forced].tolist()) <= may_be_forced


CASES = [(2, 8), (3, 16)]


@pytest.mark.parametrize("num_paths, rows", CASES)
def test_requests_follow_plans(num_paths, rows):
    planned, result = drawn_plans(num_paths), requests_of(num_paths, rows)
    for plan, tokens, logps in zip(planned, result.tokens, result.logps, strict=True):
        parsed = layout.structured(tokens, TAG_IDS, 0)
        assert lengths(tokens, parsed.block, parsed.path) == of_plan(plan)
        assert len(tokens) == len(logps) == plan.tokens
    contexts = sum(len(r.context) - 1 for r in result.requests)
    assert result.prefilled_tokens == contexts


@pytest.mark.parametrize(
    "num_paths, rows, kernels", [*((*case, "xla") for case in CASES), (2, 8, "auto")]
)
def test_requests_decode_with_the_same_model(num_paths, rows, kernels):
    """Plain causal decoding of every request's own context."""
    result = requests_of(num_paths, rows, kernels)
    for r in result.requests:
        whole = np.array([*r.context, *r.tokens])
        logps = np.concatenate([np.zeros(len(r.context)), r.logps])
        free = np.arange(len(whole)) >= len(r.context)
        free[-1] = False  # the tag that ends it
        assert largest_gap(whole, layout.causal(len(whole)), logps, free) < 1e-4
    drawn = np.concatenate([r.logps for r in result.requests])
    assert drawn.min() < -5  # the policy is far from uniform


@pytest.mark.slow
def test_the_sampler_follows_plans_of_planned_blocks():
    shapes_ = [((6, 5, 4),), ((7, 7),), ((4, 4, 5, 6), (5, 5))]
    planned = [
        plans.Plan(5, (4,) * len(x), x, (2,) * len(x), 3, path_plan=4) for x in shapes_
    ]
    sampler = BENCH.planned(planned, rows=3, num_paths=4)
    found = sampler.sample(params(), prompts_of(planned), 1, BENCH.key)[0]
    for t, plan in zip(found, planned, strict=True):
        assert len(t.tokens) == plan.tokens and t.finished
        _, paths, summaries, tail = lengths(t.tokens, t.block, t.path)
        assert (paths, summaries, tail) == (plan.paths, plan.summaries, plan.tail)


FAST = ("limits", "sampling", "blocks")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST))
        for name in suites.SUITES
    ],
)
def test_every_suite_runs(name, tmp_path):
    shown = []
    found = suites.run(BENCH, [name], out=tmp_path, show=shown.append)
    assert "error" not in found["suites"][name]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    text = (tmp_path / "results.md").read_text()
    for table in shown:
        table.terminal()
        assert table.rows and table.title in text
    if name == "blocks":
        check_schemes(shown[0])
    if name == "lanes":
        check_lanes(shown[0])
        (both,) = shown[1].rows
        assert both["paths"] == "2" and both["live"] == 4 * 2


def check_schemes(table):
    rows = {row["scheme"]: row for row in table.rows}
    assert len({row["tokens"] for row in rows.values()}) == 1
    ours, again = rows["ours"], rows["requests"]
    assert again["prefilled tokens"] > 3 * ours["prefilled tokens"]
    assert rows["sequential"]["critical path"] > ours["critical path"]


def check_lanes(table):
    """Of 4 rows, 0, 1, 2 and 4 in a block of two paths of 18 tokens behind 4 others."""
    some = [row for row in table.rows if row["slots"] < 22 or row["rows in a block"]]
    assert [row["live"] for row in some] == [4, 5, 6, 8]
    assert [row["slots"] for row in some] == [13, 15, 18, 22]
    (longer,) = [row for row in table.rows if row not in some]
    assert (longer["live"], longer["slots"]) == (4, 22)
    assert some[0]["relative"].median == 1.0
    block = some[-1]
    for name, base in (("relative", some[0]), ("relative at equal slots", longer)):
        assert block[name] == block["ms per step"].over(base["ms per step"])


def test_a_mix_of_rows_by_hand():
    mix = lanes._Mix(rows=4, inside=1, paths=3, steps=10)
    assert mix.live == 3 + 3
    assert mix.slots == (4 + 5, 4 + 3 * 5)
    block, *others = mix.plans(7)
    assert block.paths == ((10, 10, 10),) and len(others) == 3
    assert {plan.tokens for plan in others} == {4 + 10}
    P = BENCH.sizes.prompt_tokens
    cost = costs.forward(
        BENCH.config,
        tokens=6,
        pairs=3 * (P + 9) + 3 * (P + 19),
        cached=3 * (P + 9) + (P + 19),
        logits=6,
    )
    assert mix.seconds(BENCH) == cost.seconds(BENCH.limits)


def test_one_that_fails_is_told_and_others_run(tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise ValueError("no room")

    monkeypatch.setitem(suites.SUITES, "sampling", fails)
    found = suites.run(BENCH, ["sampling", "limits"], out=tmp_path)["suites"]
    assert found["sampling"]["error"] == "ValueError: no room"
    assert len(found["limits"]["tables"]) == 2
    assert "failed: ValueError: no room" in (tmp_path / "results.md").read_text()
    assert "sampling failed" in capsys.readouterr().err


def test_cells():
    spread = tables.Spread((0.25, 0.2, 0.5))
    assert tables.cell("seconds", spread) == "0.25 (0.2–0.5)"
    assert tables.cell("share of limit", spread) == "25 (20–50) %"
    assert tables.cell("tokens", 12345) == "12,345"
    assert tables.cell("MFU", 0.123456) == "12.3 %"
    assert tables.cell("ms", None) == ""
    assert tables.cell("ratio", tables.Spread((1.0, 1.0))) == "1"
    assert spread.rate(1.0).median == 4.0
    # Of each turn, not of the medians.
    assert spread.over(tables.Spread((0.5, 0.1, 0.1))).values == (0.5, 2.0, 5.0)


def test_compared_work_takes_turns():
    calls = []
    works = {name: functools.partial(calls.append, name) for name in "ab"}
    runs = timing.alternate(works, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(runs["a"].sec.values) == 2


bench = functools.partial(command.run, "pr1_jax.bench", "--shape=tiny", "--quick")


def test_json_alone_is_on_standard_output():
    done = bench("--repeats=1", "--suite=limits", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shape"] == "tiny" and found["flops_per_sec"] > 0
    assert found["suites"]["limits"]["tables"][0]["rows"]


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("--suite=limits,foo", "'foo' is not one of all, limits"),
        ("--shape=huge", "one of <small|qwen3_0_6b|tiny>"),
        ("--repeats=0", "0 is not a positive integer"),
        ("--out=README.md", "File exists"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(flag, reason):
    done = bench(flag)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert flag in done.stderr and reason in done.stderr
