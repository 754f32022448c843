"""Tests of pr1_jax.plan: counts by hand, real programs compiled, plans that say why."""

import dataclasses
import functools
import json

import jax
import pytest

from configs import rl_alternating, sft_structured
from pr1_jax.model.config import REMAT_POLICIES
from pr1_jax.model.params import init_params, param_count, unbox
from pr1_jax.plan import costs, hardware, largest, memory, planning, shapes, timing
from pr1_jax.plan.programs import (
    abstract_batch,
    build,
    device_bytes,
    lower_update,
    sampling_shape,
)
from pr1_jax.system import accelerators

GIB = accelerators.GIB
UNIT = accelerators.Hardware("unit", 1e6, GIB, 1e6, 1e6)  # a second for each million
CPU = hardware.Topology("unit:8", UNIT, (8,))


def tiny(**fields):
    """Layers, width, heads, … such that counts are short products."""
    config = rl_alternating.get_config("smoke")
    config.model.num_layers, config.model.width, config.model.mlp_width = 2, 8, 16
    config.model.num_heads, config.model.num_kv_heads, config.model.head_dim = 2, 1, 4
    config.rollout.rows, config.rollout.prompts_per_prefill = 8, 8
    config.sft.micro_batch_size = 8
    config.rl.prompts_per_step, config.rl.group_size, config.rl.mini_batches = 4, 4, 2
    for name, value in fields.items():
        *section, field = name.split("__")
        (config[section[0]] if section else config)[field] = value
    return config


def built(**fields):
    return build(tiny(**fields), jax.devices())


@functools.cache
def smoke_plan():
    """A plan of programs that are really compiled, and these: update first."""
    found = []

    def compile_program(*args):
        found.append(compile_really(*args))
        return found[-1]

    compile_really = memory.compile_program
    config = tiny(mesh__data=2, mesh__fsdp=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "compile_program", compile_program)
        plan = planning.make(config, CPU, jax.devices())
    return plan, found[:3]


# --- Topologies and shapes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "shape", "devices"),
    [
        ("v5e:4x4", "v5e", (4, 4), 16),
        ("v5p:2x2x2", "v5p", (2, 2, 2), 8),
        ("tpu7x:2x2x1", "tpu7x", (2, 2, 1), 8),  # two devices a chip
        ("gpu:h100x8", "h100", (8,), 8),
        ("gpu:a100-80x16", "a100-80", (16,), 16),
    ],
)
def test_topology_is_parsed(text, name, shape, devices):
    found = hardware.parse_topology(text)
    assert (found.hardware.name, found.shape) == (name, shape)
    assert found.num_devices == devices
    assert found.is_gpu == text.startswith("gpu:")


@pytest.mark.parametrize(
    "text", ["", "v5e", "v9:4x4", "v5e:0x4", "gpu:h100", "gpu:h900x8", "h100x8"]
)
def test_unknown_topology_lists_the_known_ones(text):
    with pytest.raises(ValueError, match=r"--topology=.*v5e.*tpu7x.*a100-40.*h100"):
        hardware.parse_topology(text)
    with pytest.raises(ValueError, match=r"v5p has 3 dimensions, e.g. v5p:4x4x4"):
        hardware.parse_topology("v5p:4x4")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-1.7B-Base", 1.72),
        ("Parallel-R1/Qwen3-4B-Base-add-special-token", 4.02),
        ("Qwen/Qwen3-8B", 8.19),
        ("HuggingFaceTB/SmolLM2-135M", 0.1345),
    ],
)
def test_published_shapes_have_the_published_size(name, billions):
    shape, num_tokens = shapes.published(name)
    params = jax.eval_shape(lambda: init_params(shape, jax.random.key(0)))
    count = param_count(unbox(params))
    assert count == pytest.approx(1e9 * billions, rel=2e-3)
    assert num_tokens <= shape.vocab_size


def test_tags_take_padding_first_and_then_new_rows():
    qwen, tokens = shapes.published("Qwen/Qwen3-4B")
    assert (qwen.vocab_size, tokens) == (151936, 151669 + 6)
    smollm2, tokens = shapes.published("HuggingFaceTB/SmolLM2-135M")
    assert smollm2.vocab_size == tokens == 49152 + 6


@pytest.mark.parametrize("path", ["", "Qwen/Qwen3-4B"])
def test_what_remat_keeps_reaches_the_program_and_its_costs(path):
    """The more a layer keeps, the more memory, and the less is computed again."""
    all_made = [
        built(model__path=path, model__remat=True, model__remat_policy=policy)
        for policy in REMAT_POLICIES
    ]
    policies = [made.training_backend.config.remat_policy for made in all_made]
    assert policies == ["nothing", "attention", "dots"]
    lengths = costs.Lengths(10, 50, 76)
    nothing, attention, dots = (
        costs.step_work(made, UNIT, lengths)[-1].flops for made in all_made
    )
    c, rows = all_made[0].model, costs.responses(all_made[0])
    heads = c.num_layers * c.num_heads * c.head_dim
    # Nobody reads what `down` made; `attention` keeps what `o` made, and the scores' use.
    down = 2 * rows * 76 * c.num_layers * c.width * c.mlp_width
    assert nothing == pytest.approx(dots / 3 * 4 - down)
    kept = 4 * heads * rows * 76 * 77 // 2 + 2 * heads * c.width * rows * 76
    assert nothing - attention == pytest.approx(kept)
    sizes = [memory.estimated_update(made).total for made in all_made]
    none = memory.estimated_update(built(model__path=path)).total
    assert sorted({*sizes, none}) == [*sizes, none]


def test_an_evaluation_keeps_a_prompt_for_each_row():
    """8 rows a device; in RL two groups and what waits for the slowest of them."""
    made = built(rollout__rows=64)
    parts = memory.sampling_parts(made)
    kept = memory.Program(sum(parts.values()))
    *others, evaluation = memory.sampling_moments(made, memory.Program(0), kept)
    assert evaluation.name == "evaluation" and sampling_shape(made).entries == 7
    assert evaluation.parts[memory.PROMPTS] == parts[memory.PROMPTS] / 7 * 8
    rest = sum(x for n, x in evaluation.parts.items() if n != memory.PROMPTS)
    assert rest == max(x.total for x in others[1:]) - parts[memory.PROMPTS]
    made = dataclasses.replace(made, config=tiny(stages=("coldstart",)))
    moments = memory.sampling_moments(made, memory.Program(0), kept)
    assert [x.name for x in moments] == ["prefill", "decode", "cache growth"]


def test_unknown_model_names_the_field():
    with pytest.raises(ValueError, match=r"model.path=some/model is no folder") as e:
        build(tiny(model__path="some/model"), jax.devices())
    assert "Qwen/Qwen3-4B" in str(e.value)


# --- Memory by hand -----------------------------------------------------------------


def test_state_is_split_over_fsdp_and_cache_over_rows_and_heads():
    whole = memory.resident(built())
    split = memory.resident(built(mesh__data=1, mesh__fsdp=8))
    count = param_count(built().abstract_params())
    assert whole[memory.PARAMETERS] == 4 * count
    # Two moments, and a few counters.
    moments = whole[memory.OPTIMIZER] - 2 * whole[memory.PARAMETERS]
    assert 0 < moments < 64
    small = 2 * 2 * 4 * 4 * 4  # norms of heads, 4 wide, of two layers, are not split
    assert split[memory.PARAMETERS] <= 4 * count / 8 + small

    made = built(mesh__data=4, mesh__tensor=2, model__num_kv_heads=2)
    # Keys and values, layers, heads of this device, head dim, rows, tokens, float32.
    assert memory.cache_bytes(made, 3, 10) == 2 * 2 * 1 * 4 * 3 * 10 * 4
    made = built(mesh__data=4, mesh__tensor=2)  # one head is not split
    assert memory.cache_bytes(made, 3, 10) == 2 * 2 * 1 * 4 * 3 * 10 * 4


def test_reference_parameters_are_held_where_kl_is_on():
    assert memory.REFERENCE not in memory.resident(built())
    parts = memory.resident(built(rl__kl_coef=0.1))
    assert parts[memory.REFERENCE] == parts[memory.PARAMETERS]


def test_adapters_are_what_the_state_holds_and_frozen_weights_lie_beside():
    fields = {"model__lora_rank": 2, "model__dtype": "bfloat16", "rl__kl_coef": 0.1}
    made = built(**fields)
    parts = memory.resident(made)
    assert parts[memory.FROZEN] == 2 * param_count(made.abstract_params())
    # Of a layer: q and o 8 by 8, k and v 8 by 4, gate, up and down 8 by 16.
    pairs = 2 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))
    count = 2 * pairs + 6 * 8  # two layers, and the tags' rows
    assert parts[memory.PARAMETERS] == parts[memory.REFERENCE] == 4 * count
    assert 0 < parts[memory.OPTIMIZER] - 2 * 4 * count < 64
    batch = device_bytes(abstract_batch(made))
    given = sum(parts.values()) - parts[memory.REFERENCE] + batch + 4  # the step
    assert memory.update_arguments(made) == given
    assert memory.FROZEN not in memory.resident(built())


def test_adapters_bring_qwen3_4b_onto_one_gpu():
    """By arithmetic, of which the update's part is a guess within a third."""
    topology, shares = hardware.parse_topology("gpu:h100x1"), {}
    for rank in (0, 32):
        config = rl_alternating.get_config("qwen3_4b")
        config.mesh.tensor, config.rollout.rows = 1, 48
        config.model.lora_rank = rank
        plan = planning.make(config, topology, jax.devices()[:1], find_largest=False)
        assert plan.fits == (rank > 0)
        shares[rank] = {m.name: m.total / plan.limit for m in plan.moments}
        assert plan.data()["trained_parameters"] == param_count(
            plan.experiment.abstract_trained()
        )
    assert shares[0]["update"] > 1 and shares[32]["update"] < 0.66


class _TooLarge:
    """Stands in for a lowered program that the TPU compiler cannot place."""

    def __init__(self, text):
        self.text = text

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("the total required for HLO temporaries (20.00G) exceeds available HBM", 20.5),
    ],
)
def test_program_that_is_too_large_is_an_answer_and_not_a_crash(text, total):
    program = memory.compile_program(_TooLarge(text), GIB // 2)
    assert not program.fits and program.total == int(total * GIB)
    moment = memory.update_moment(built(), program)
    assert not moment.fits(100 * GIB)
    assert moment.total == pytest.approx(program.total, abs=16)
    assert moment.biggest == memory.TRAINING


def test_other_failures_of_the_compiler_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        memory.compile_program(_TooLarge("INTERNAL: something else"), 0)


# --- Costs by hand ------------------------------------------------------------------


def test_flops_of_a_step():
    made = built(model__num_heads=2, rl__group_size=4, rollout__max_response_tokens=70)
    lengths = costs.mean_lengths(made, 10, 50)
    assert lengths == costs.Lengths(10, 50, 76)  # the next length bucket
    works = {work.name: work for work in costs.step_work(made, UNIT, lengths)}
    trained = 70  # prompts need no logits
    V = made.model.vocab_size
    # Layers · (q, o: 2 heads; k, v: 1 head; three matrices of the MLP).
    weights = 2 * (8 * 4 * (2 + 2 + 1 + 1) + 3 * 8 * 16)
    pair = 4 * 2 * 4 * 2  # of scores and their use: 4 · layers · head dim · heads

    prefill = 4 * (2 * weights * 10 + pair * 10 * 11 // 2)
    assert works["prefill"].flops == prefill
    # 16 responses by 50 steps, each sees the prompt and half of the response.
    token = 2 * weights + 2 * V * 8 + pair * (10 + 25)
    assert works["decode"].flops == 16 * 50 * token
    forward = 2 * weights * 76 + 2 * V * 8 * trained + pair * 76 * 77 // 2
    assert works["update"].flops == 3 * 16 * forward
    assert works["update"].compute_sec == pytest.approx(3 * 16 * forward / 8e6)

    again = built(model__remat=True, rollout__max_response_tokens=70)
    down = 16 * 76 * 2 * 8 * 16  # tokens, layers, width, width of the MLP
    update = costs.step_work(again, UNIT, lengths)[-1]
    assert update.flops == 4 * 16 * forward - 2 * down


@pytest.mark.parametrize("size, micro_batches", [(8, 2), (32, 1)])
def test_rows_that_hold_several_are_timed_as_they_run(size, micro_batches):
    fields = {"model__packed_tokens": 200, "rl__micro_batch_size": size}
    fields |= {"model__length_buckets": (90, 120, 150), "rl__prompts_per_step": 16}
    made = built(**fields)
    assert made.policy(sampling=True).lengths == (120, 150)  # others are of no use
    lengths = costs.mean_lengths(made, 12, 46)
    # Of 58 tokens 3 in rows of 200, and 2 in those of 150 or 120, which loses least.
    assert lengths == costs.Lengths(12, 46, 60, per_row=2, packed_tokens=120)
    assert costs.mean_lengths(made, 12, 54).packed_tokens == 200
    mean = timing.of_lengths(made, lengths)
    batch = abstract_batch(mean)
    assert batch.tokens.shape == batch.start.shape == (micro_batches, size, 120)
    assert mean.policy(sampling=True).sizes(mean.row_tokens) == [(120, (0,))]
    assert abstract_batch(made).tokens.shape == (32 // size, size, 200)


def test_decode_reads_weights_its_own_cache_and_each_groups_prompt():
    plain = {"rollout__max_sequential_steps": 0, "rollout__path_labels": ()}
    made = built(mesh__data=2, mesh__tensor=4, rollout__rows=16, **plain)
    lengths = costs.mean_lengths(made, 10, 50)
    decode = costs.step_work(made, UNIT, lengths)[1]
    weights = 2 * (8 * 4 * 6 + 3 * 8 * 16) + made.model.vocab_size * 8
    token = 2 * 2 * 4 * 4  # keys and values, layers, head dim, bytes
    # 8 rows on a device: 25 tokens each on average, and two prompts.
    step = weights * 4 / 4 + token * (8 * 25 + 2 * 10)
    assert decode.bytes == pytest.approx(50 * step)
    assert decode.seconds == max(decode.compute_sec, decode.memory_sec)
    # By a deadline the same tokens take fewer steps, which read the weights less often.
    labels = {"rollout__path_labels": (" 1", " 2")}
    shape = {"mesh__data": 2, "mesh__tensor": 4, "rollout__rows": 16}
    made = built(rollout__max_sequential_steps=30, **shape, **labels)
    sooner = costs.step_work(made, UNIT, lengths)[1]
    assert sooner.bytes == pytest.approx(30 * step)
    assert sooner.flops == decode.flops


def test_traffic_is_by_mesh_axis():
    lengths = costs.Lengths(10, 50, 76)
    of = lambda **mesh: {
        traffic.name.split(":")[0]: traffic.bytes
        for traffic in costs.step_traffic(built(**mesh), UNIT, lengths)
    }
    assert set(of(mesh__data=8)) == {"data", "sampler"}
    found = of(mesh__data=1, mesh__fsdp=8)
    count = param_count(built().abstract_params())
    # Two micro-batches: two gathers and one scatter, all but a device's own eighth.
    assert found["fsdp"] == 2 * 3 * 4 * count * 7 / 8
    assert found["sampler"] == 4 * count * 7 / 8
    assert "tensor" in of(mesh__data=4, mesh__tensor=2)


@pytest.mark.parametrize("flag", ["prompt_tokens", "response_tokens"])
@pytest.mark.parametrize("value", [0, 1000])
def test_length_out_of_range_names_the_flag(flag, value):
    given = {"prompt_tokens": None, "response_tokens": None} | {flag: value}
    with pytest.raises(ValueError, match=f"--{flag}={value} must be from 1 to"):
        costs.mean_lengths(built(), **given)


# --- The search ---------------------------------------------------------------------


def test_a_straight_line_takes_two_trials():
    asked = []

    def total(n):
        asked.append(n)
        return 100 + 7 * n

    sizes = [8, 16, 32, 64, 128, 256]
    assert largest.largest(sizes, total, 100 + 7 * 130, {16: total(16)}) == 128
    assert len(asked) <= 4


@pytest.mark.parametrize("limit", [0, 150, 164, 200, 1000, 10**6])
@pytest.mark.parametrize("start", [8, 64, 256])
def test_what_is_found_fits_and_the_next_does_not(limit, start):
    sizes = [8, 16, 32, 64, 128, 256]
    total = lambda n: 100 + 7 * n + n**2 // 100  # bent a little
    found = largest.largest(sizes, total, limit, {start: total(start)}, trials=6)
    fitting = [n for n in sizes if total(n) <= limit]
    assert found == max(fitting, default=None)


# --- Real programs ------------------------------------------------------------------


def test_parts_add_up_to_what_the_programs_allocate():
    plan, (update, _, decode) = smoke_plan()
    moments = {moment.name: moment for moment in plan.moments}
    parts = moments["update"].parts
    assert moments["update"].total == pytest.approx(update.total, abs=16)
    assert all(size >= 0 for size in parts.values())
    known = sum(parts[n] for n in (memory.PARAMETERS, memory.OPTIMIZER, memory.BATCH))
    assert update.arguments == pytest.approx(known, abs=256)

    parts = dict(moments["decode"].parts)
    sampling = parts[memory.WEIGHTS] + parts[memory.RESPONSES] + parts[memory.PROMPTS]
    assert sampling + parts[memory.DECODE] == decode.total
    # Besides, a few numbers a row, and labels of its slots.
    shape = sampling_shape(plan.experiment)
    labels = 8 * shape.rows * shape.slots
    assert decode.arguments == pytest.approx(sampling + labels, abs=256)
    resident = memory.resident(plan.experiment)
    assert moments["decode"].total == decode.total + sum(resident.values())


def test_each_shard_has_its_share_of_the_rows():
    shape = sampling_shape(built(rollout__rows=16))
    assert (shape.shards, shape.rows, shape.lanes) == (8, 2, 4)
    assert shape.prompts_per_prefill == 1
    shape = sampling_shape(built(mesh__data=4, mesh__tensor=2))
    assert (shape.shards, shape.rows) == (4, 2)


def test_largest_batches_are_tried_and_fit():
    plan, _ = smoke_plan()
    assert plan.fits and not plan.advice
    # There is no lack of memory: a mini-batch whole, a step's responses all at once.
    assert plan.largest == {"rl.micro_batch_size": 8, "rollout.rows": 16}
    data = json.loads(json.dumps(plan.data()))
    assert data["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    moments = data["memory"]
    assert list(moments) == [
        *("update", "prefill", "decode", "cache growth", "evaluation")
    ]
    for moment in moments.values():
        assert moment["total"] == sum(moment["parts"].values())
    assert data["peak_bytes"] == max(m["total"] for m in moments.values())
    assert set(data["step"]["phases"]) == {"prefill", "decode", "update"}
    assert data["step"]["seconds"] > 0 and data["step"]["flops"] > 0


def _with_limit(plan, limit):
    small = dataclasses.replace(UNIT, hbm_bytes=limit)
    return dataclasses.replace(plan, topology=dataclasses.replace(CPU, hardware=small))


def test_plan_that_does_not_fit_names_the_tenant_and_what_to_change():
    plan = _with_limit(smoke_plan()[0], 1000)
    assert not plan.fits and plan.data()["headroom_bytes"] < 0
    parts = plan.moments[0].parts
    tenant = max(parts, key=parts.get)
    assert f"the biggest tenant is its {tenant}" in plan.advice[0]
    made = plan.experiment
    for tenant, field in [
        (memory.RESPONSES, "lower rollout.rows (now 8)"),
        (memory.WEIGHTS, "raise mesh.tensor (now 1)"),
        (memory.OPTIMIZER, "raise mesh.fsdp (now 4)"),
        (memory.TRAINING, "lower rl.micro_batch_size (now 8)"),
        (memory.PREFILL, "lower rollout.prompts_per_prefill (now 8)"),
    ]:
        moment = memory.Moment("moment", {tenant: 2 * GIB, "others": 1})
        text = memory.advice(made, moment, GIB)
        assert f"its {tenant} (2.0 GiB)" in text and field in text
    moment = memory.Moment("update", {memory.TRAINING: GIB})
    assert "set model.remat (now False)" in memory.advice(made, moment, 1)


def gpu_plan(config):
    topology = hardware.parse_topology("gpu:h100x8")
    return planning.make(config, topology, jax.devices(), find_largest=False)


def test_sft_alone_is_planned_too():
    plan = gpu_plan(sft_structured.get_config("smoke"))
    assert [work.name for work in plan.works] == ["update"]
    assert plan.data()["largest"] == {}
    assert lower_update(plan.experiment).as_text()


def test_larger_micro_batches_of_sft_are_planned_beside_those_of_rl():
    plan = gpu_plan(tiny(sft__micro_batch_size=16, rl__micro_batch_size=8))
    first, second = plan.moments[:2]
    assert (first.name, second.name) == ("update", memory.SFT_UPDATE)
    assert second.parts[memory.TRAINING] > first.parts[memory.TRAINING]
    moment = dataclasses.replace(second, parts={memory.TRAINING: GIB})
    advice = memory.advice(plan.experiment, moment, 1)
    assert "lower sft.micro_batch_size (now 16)" in advice
    plan = gpu_plan(tiny(sft__micro_batch_size=8, rl__micro_batch_size=8))
    assert memory.SFT_UPDATE not in [moment.name for moment in plan.moments]


def test_gpu_memory_is_arithmetic_and_says_so(monkeypatch):
    monkeypatch.setattr(memory, "compile_program", None)  # nothing is compiled
    config = tiny(model__path="Qwen/Qwen3-4B", model__dtype="bfloat16")
    config.model.scan_layers = True
    config.mesh.data, config.mesh.fsdp = 1, -1
    plan = gpu_plan(config)
    update, _, decode = (moment.parts for moment in plan.moments[:3])
    assert update[memory.PARAMETERS] == pytest.approx(4 * 4.022e9 / 8, rel=0.01)
    assert decode[memory.WEIGHTS] == pytest.approx(2 * 4.022e9, rel=0.01)
    assert any("arithmetic" in line for line in plan.assumptions)
    assert not plan.data()["compiled"]


def test_estimate_is_of_the_size_of_the_real_thing():
    """Only of the size: this program is small, and compiled for a CPU."""
    plan, (update, _, decode) = smoke_plan()
    guess = memory.estimated_update(plan.experiment).total
    assert 0.2 < guess / update.total < 5
    guess = memory.estimated_sampling(plan.experiment)[1].total
    assert 0.2 < guess / decode.total < 5
