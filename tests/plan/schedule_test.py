"""A program's time from its text: every figure here is counted by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pr1_jax.plan import hardware, hlo, programs, report, schedule, timing
from pr1_jax.system import accelerators
from tests.plan import plan_test

# 1 cycle, 1 byte of memory and 1 byte over links take a nanosecond each.
UNIT = accelerators.Hardware("unit", 1e12, 2**30, 1e9, 1e9, clock_hz=1e9)


def text(entry, others=""):
    return f"HloModule jit_f, is_scheduled=true\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"


def cycles(number):
    config = f'{{"flag_configs":[],"window_config":{{"estimated_cycles":"{number}"}}}}'
    return f"backend_config={config}"


def of(entry, others=""):
    return schedule.of_program(text(entry, others), UNIT)


def nanoseconds(found, group=""):
    return round(1e9 * found.seconds(group), 3)


BODY = """
%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,100]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %y = f32[8,100]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%add, metadata={op_name="jit(f)/while/body/attention/dot"}, CYCLES
  ROOT %out = (s32[], f32[8,100]{1,0}) tuple(%i, %y)
}

%condition (state: (s32[], f32[8,100])) -> pred[] {
  %state = (s32[], f32[8,100]{1,0}) parameter(0)
  %bound = s32[] constant(24)
  %i = s32[] get-tuple-element(%state), index=0
  %other = pred[] compare(%i, %i), direction=LT
  %less = pred[] compare(%i, %bound), direction=LT
  %far = s32[] constant(900)
  %least = pred[] compare(%i, %far), direction=LT
  ROOT %both = pred[] and(%less, %other)
}

%add (p: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  ROOT %sum = f32[8,100]{1,0} add(%p, %p)
}
""".replace("CYCLES", cycles(70))
LOOP = """
  %p = (s32[], f32[8,100]{1,0}) parameter(0)
  %loop = (s32[], f32[8,100]{1,0}) while(%p), condition=%condition, body=%body
  ROOT %out = f32[8,100]{1,0} get-tuple-element(%loop), index=1
"""


def test_a_loop_costs_its_body_times_its_trips():
    found = of(LOOP, BODY)
    (cost,) = found.costs
    assert (cost.times, cost.group, cost.source) == (24, "attention", "cycles")
    assert nanoseconds(found) == 24 * 70
    # A fusion reads its operand and writes its result.
    assert found.bytes("attention") == 24 * 2 * 3200 and not found.endless


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    found = of(
        LOOP,
        BODY.replace("constant(24)", "parameter(1)").replace(
            "constant(900)", "parameter(2)"
        ),
    )
    assert [*found.endless] == ["loop"] and nanoseconds(found) == 70


def test_of_a_conditional_the_longest_branch_counts():
    branch = """
%{name} (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%nothing, {cycles}
}}
"""
    short, long = (
        branch.format(name=name, cycles=cycles(n)) for name, n in (("s", 5), ("l", 50))
    )
    nothing = (
        "%nothing (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
    )
    entry = """
  %p = f32[8]{0} parameter(0)
  %which = s32[] constant(1)
  ROOT %y = f32[8]{0} conditional(%which, %p, %p), branch_computations={%s, %l}
"""
    assert nanoseconds(of(entry, nothing + short + long)) == 50


ASYNC = """
  %p = f32[1000]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %start = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%p)
  %work = f32[8]{0} negate(%q), CYCLES
  %done = f32[1000]{0:T(1024)S(1)} copy-done(%start)
  ROOT %y = f32[8]{0} add(%work, %done), TEN
"""


@pytest.mark.parametrize(("work", "waits"), [(1000, 3000), (4000, 0), (5000, 0)])
def test_a_copy_costs_what_is_waited_for(work, waits):
    entry = ASYNC.replace("CYCLES", cycles(work)).replace("TEN", cycles(10))
    found = of(entry)
    assert nanoseconds(found, schedule.COPIES) == waits
    assert nanoseconds(found) == work + waits + 10


def test_a_loop_hides_what_goes_on_beside_it():
    entry = """
  %p = (s32[], f32[8,100]{1,0}) parameter(0)
  %q = f32[1000]{0} parameter(1)
  %start = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]) copy-start(%q)
  %loop = (s32[], f32[8,100]{1,0}) while(%p), condition=%condition, body=%body
  ROOT %done = f32[1000]{0:S(1)} copy-done(%start)
"""
    found = of(entry, BODY)
    assert nanoseconds(found, schedule.COPIES) == 4000 - 24 * 70


def test_copies_take_turns():
    entry = """
  %p = f32[1000]{0} parameter(0)
  %a = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]) copy-start(%p)
  %b = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]) copy-start(%p)
  %c = f32[1000]{0:S(1)} copy-done(%b)
  ROOT %d = f32[1000]{0:S(1)} copy-done(%a)
"""
    assert nanoseconds(of(entry)) == 8000


RING = """
  %p = bf16[1000]{{0}} parameter(0)
  ROOT %y = bf16[{size}]{{0}} {name}(%p), channel_id=1, replica_groups={groups}, to_apply=%sum
"""


@pytest.mark.parametrize(
    ("name", "size", "groups", "expected"),
    [
        ("all-reduce", 1000, "{{0,1,2,3},{4,5,6,7}}", 2 * 3 / 4 * 2000),
        ("all-reduce", 1000, "[2,4]<=[8]", 2 * 3 / 4 * 2000),
        ("all-reduce", 1000, "mesh['a'=2,'b'=4] {'b'}", 2 * 3 / 4 * 2000),
        ("all-reduce", 1000, "mesh['a'=2,'b'=4] {'a','b'}", 2 * 7 / 8 * 2000),
        ("all-gather", 4000, "{{0,1,2,3}}", 3 / 4 * 8000),
        ("reduce-scatter", 250, "{{0,1,2,3}}", 3 * 500),
        ("all-reduce", 1000, "{{0},{1}}", 0),
    ],
)
def test_a_collective_costs_its_bytes_on_the_ring(name, size, groups, expected):
    found = of(RING.format(name=name, size=size, groups=groups))
    assert nanoseconds(found, schedule.COLLECTIVES) == expected
    assert round(1e9 * found.collective_seconds, 3) == expected


@pytest.mark.parametrize(("work", "waits"), [(500, 1000), (2000, 0)])
def test_a_collective_that_overlaps_is_told_apart(work, waits):
    entry = """
  %p = bf16[1000]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %start = (bf16[500]{0}, bf16[1000]{0}) all-gather-start(%p), replica_groups={{0,1}}
  %work = f32[8]{0} negate(%q), CYCLES
  ROOT %done = bf16[1000]{0} all-gather-done(%start)
""".replace("CYCLES", cycles(work)).replace("bf16[1000]{0}) all", "bf16[1500]{0}) all")
    found = of(entry)
    assert nanoseconds(found) == work + waits
    assert round(1e9 * found.collective_seconds) == 1500


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [
        ("(bf16[500]{0}, bf16[1000]{0})", "all-gather", 1 / 2 * 2000),
        (
            "((bf16[500]{0}, bf16[50]{0}), (bf16[1000]{0}, bf16[100]{0}))",
            *("all-gather", 1 / 2 * 2200),
        ),
        ("(bf16[500]{0}, bf16[500]{0}, u32[], u32[])", "collective-permute", 1000),
        ("(bf16[500]{0}, bf16[300]{0})", "all-reduce", 2 / 2 * 1600),
    ],
)
def test_bytes_of_a_collective_that_is_started(shape, name, expected):
    entry = f"""
  %p = bf16[500]{{0}} parameter(0)
  %start = {shape} {name}-start(%p), replica_groups={{{{0,1}}}}
  ROOT %done = bf16[500]{{0}} {name}-done(%start)
"""
    assert round(1e9 * of(entry).collective_seconds) == expected


WRAPPED = """
%wrapped (p: bf16[1000]) -> bf16[1000] {
  %p = bf16[1000]{0} parameter(0)
  ROOT %y = bf16[1000]{0} NAME(%p), replica_groups={{0,1}}
}
"""


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [("all-to-all", "collectives", 1000), ("negate", "other", 2000)],
)
def test_what_is_started_in_a_wrapper_is_what_it_wraps(name, group, expected):
    entry = """
  %p = bf16[1000]{0} parameter(0)
  %start = ((bf16[1000]{0}), bf16[1000]{0:S(1)}, u32[]) async-start(%p), calls=%wrapped
  ROOT %done = bf16[1000]{0:S(1)} async-done(%start)
"""
    (cost,) = of(entry, WRAPPED.replace("NAME", name)).costs
    assert (cost.group, round(1e9 * cost.seconds)) == (group, expected)


SCATTERED = """
%scattered (p: bf16[4000]) -> bf16[1000] {
  %p = bf16[4000]{0} parameter(0)
  %sum = bf16[4000]{0} all-reduce(%p), replica_groups={{0,1,2,3}}
  %at = s32[] constant(0)
  ROOT %own = bf16[1000]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={1000}
}
"""


def test_a_slice_of_a_sum_is_a_scattered_sum():
    call = "  ROOT %f = bf16[1000]{0} fusion(%p), kind=kCustom, calls=%scattered\n"
    entry = "\n  %p = bf16[4000]{0} parameter(0)\n" + call
    (cost,) = of(entry, SCATTERED).costs
    assert (cost.group, round(1e9 * cost.link_seconds)) == ("collectives", 3 * 2000)
    (cost,) = of(entry, SCATTERED.replace("all-reduce", "negate")).costs
    assert cost.group == "other" and cost.link_seconds == 0


CHAINED = """
%begin (p: bf16[500]) -> (bf16[500], bf16[1000]) {
  %p = bf16[500]{0} parameter(0)
  %all = bf16[1000]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}
  ROOT %s = (bf16[500]{0}, bf16[1000]{0}) custom-call(%all), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[500], q: f32[8]) -> (f32[8], bf16[1000]) {
  %p = bf16[500]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %all = bf16[1000]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}
  %part = bf16[1000]{0} custom-call(%all), custom_call_target="AsyncCollectivePart"
  %y = f32[8]{0} negate(%q)
  ROOT %both = (f32[8]{0}, bf16[1000]{0}) tuple(%y, %part)
}

%end (p: bf16[1000]) -> bf16[1000] {
  %p = bf16[1000]{0} parameter(0)
  %all = bf16[1000]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}
  ROOT %d = bf16[1000]{0} custom-call(%p, %all), custom_call_target="AsyncCollectiveDone"
}
"""


@pytest.mark.parametrize(("work", "waits"), [(400, 600), (1500, 0)])
def test_a_collective_goes_on_in_fusions_that_compute(work, waits):
    entry = """
  %p = bf16[500]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %start = (bf16[500]{0}, bf16[1000]{0}) fusion(%p), kind=kCustom, calls=%begin
  %a = bf16[1000]{0} get-tuple-element(%start), index=1
  %work = (f32[8]{0}, bf16[1000]{0}) fusion(%p, %q), kind=kCustom, calls=%goes_on, CYCLES
  ROOT %done = bf16[1000]{0} fusion(%a), kind=kCustom, calls=%end
""".replace("CYCLES", cycles(work))
    found = of(entry, CHAINED)
    assert nanoseconds(found) == work + waits
    assert nanoseconds(found, schedule.COLLECTIVES) == waits
    assert round(1e9 * found.collective_seconds) == 1000
    (gathered,) = [x for x in found.costs if x.group == schedule.COLLECTIVES]
    assert gathered.bytes == 1000 + 2000


def test_what_is_sliced_or_updated_in_place_moves_only_that():
    fused = """
%slice (stack: f32[24,100], i: s32[]) -> f32[1,100] {
  %stack = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,100]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,100}
}

%outer (stack: f32[24,100], i: s32[]) -> f32[1,100] {
  %stack = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  ROOT %y = f32[1,100]{1,0} negate(%row)
}

%write (cache: f32[24,100], new: f32[1,100], i: s32[]) -> f32[24,100] {
  %cache = f32[24,100]{1,0} parameter(0)
  %new = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[24,100]{1,0} dynamic-update-slice(%cache, %new, %i, %i)
}
"""
    entry = """
  %stack = f32[24,100]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %row = f32[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%outer, CYCLES
  ROOT %y = f32[24,100]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%write, CYCLES
""".replace("CYCLES", cycles(1))
    read, written = of(entry, fused).costs
    assert read.bytes == 2 * 400  # a row in, a row out
    assert written.bytes == 2 * 400
    bare = entry.replace("fusion(%stack, %row, %i), kind=kLoop, calls=%write, ", "PUT")
    _, written = of(
        bare.replace("PUT", "dynamic-update-slice(%stack, %row, %i, %i), "), fused
    ).costs
    assert written.bytes == 2 * 400


def test_attributes_may_go_over_several_lines():
    entry = """
  %p = f32[1000]{0} parameter(0)
  %k = f32[1000]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"settings":"{\\"tile\\": 8}"
}}, metadata={op_name="jit(f)/attention/k"}, FIVE
  ROOT %y = f32[1000]{0} negate(%k), SEVEN
""".replace("FIVE", cycles(5)).replace("SEVEN", cycles(7))
    found = of(entry)
    assert nanoseconds(found) == 5 + 7
    assert nanoseconds(found, "attention") == 5


def test_what_has_no_estimate_is_priced_by_bytes_and_told():
    entry = """
  %p = f32[1000]{0} parameter(0)
  %chip = f32[1000]{0:T(1024)S(1)} custom-call(%p), custom_call_target="tpu_custom_call"
  %reserved = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %y = f32[1000]{0} negate(%chip), CYCLES
""".replace("CYCLES", cycles(7))
    found = of(entry)
    assert nanoseconds(found) == 4000 + 7
    assert round(1e9 * found.unestimated_seconds) == 4000


@pytest.mark.parametrize(
    ("op_name", "group"),
    [
        ("jit(f)/while/body/attention/norms/mul", "norms"),
        ("transpose(jvp(head))/dot_general", "head"),
        ("jit(f)/project_heads/mul", "other"),
        ("jit(f)/rematted_computation/projections", "projections"),
        ("", "other"),
    ],
)
def test_the_innermost_scope_names_the_group(op_name, group):
    x = hlo.Instruction("x", "fusion", (), (), "", f'metadata={{op_name="{op_name}"}}')
    assert schedule.group_of(x) == group
    copy = dataclasses.replace(x, opcode="copy")
    assert schedule.group_of(copy) == schedule.COPIES


def test_a_text_that_is_none_and_a_clock_that_is_unknown_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        schedule.of_program("nothing", UNIT)
    with pytest.raises(ValueError, match="tpu7x has no known clock"):
        schedule.of_program(text(LOOP, BODY), accelerators.TPUS["tpu7x"])


def noted(**models):
    """What XLA's GPU compiler notes: microseconds by model, "_" standing for "-"."""
    one = '{{"end_to_end_cycles":0,"exec_time_us":{},"compute_time_us":0,"name":"{}"}}'
    costs = (one.format(x, name.replace("_", "-")) for name, x in models.items())
    return f'backend_config={{"reification_cost":[{",".join(costs)}]}}'


PRODUCT = """
  %p = bf16[64,200]{1,0} parameter(0)
  %q = bf16[64,30]{1,0} parameter(1)
  %product = (f32[200,30]{1,0}, s8[33554432]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}},"reification_cost":[{"exec_time_us":99,"name":"sol"}]}
"""


def test_what_xla_notes_of_gpu_kernels_is_read():
    """Of a kernel's models that of its tiles; of a collective that of links."""
    nothing = (
        "%nothing (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
    )
    gpu = dataclasses.replace(accelerators.GPUS["h100"], hbm_per_sec=1e9)
    entry = f"""
  %p = f32[8]{{0}} parameter(0)
  %a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%nothing, {noted(**{"": 3, "sol": 7})}
  %b = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%nothing, {noted(**{"": 500, "indexing_cost_model": 2, "sol": 9})}
  %c = f32[8]{{0}} all-reduce(%b), replica_groups={{{{0,1}}}}, {noted(sol=11)}
  ROOT %d = f32[8]{{0}} copy(%c)
"""
    found = schedule.of_program(text(entry, nothing), gpu)
    seconds = {x.name: round(1e9 * x.seconds) for x in found.costs}
    assert seconds == {"a": 3000, "b": 2000, "c": 11000, "d": 64}
    assert found.collective_seconds == pytest.approx(11e-6)
    sources = [x.source for x in found.costs]
    assert sources == 3 * [schedule.ESTIMATED] + [schedule.AT_BANDWIDTH]


@pytest.mark.parametrize(("bandwidth", "seconds"), [(1e12, 0.768), (1e6, 53.44e-3)])
def test_a_product_that_is_left_to_cublas_takes_the_longer_of_flops_and_bytes(
    bandwidth, seconds
):
    """2 · 200 · 30 · 64 FLOPs at 10^6 a second; (64 · 230) · 2 + 200 · 30 · 4 bytes."""
    gpu = dataclasses.replace(
        accelerators.GPUS["h100"], flops_per_sec=1e6, hbm_per_sec=bandwidth
    )
    if bandwidth == 1e6:
        gpu = dataclasses.replace(gpu, flops_per_sec=1e12)
    (cost,) = schedule.of_program(text(PRODUCT), gpu).costs
    assert cost.source == schedule.AT_PEAK and cost.bytes == 53440
    assert cost.seconds == pytest.approx(seconds)


def test_only_compilers_that_tell_times_are_asked(monkeypatch):
    gpu = hardware.parse_topology("gpu:h100x8")
    monkeypatch.setattr(timing, "has_gpu_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"--schedule: gpu:h100x8 .*jax\[cuda12\]"):
        timing.check_tells_times(gpu, "--schedule")
    monkeypatch.setattr(timing, "has_gpu_compiler", lambda: True)
    timing.check_tells_times(gpu, "--schedule")
    timing.check_tells_times(hardware.parse_topology("v6e:4x4"), "--search")
    with pytest.raises(
        ValueError, match=r"--search: .*tpu7x:2x2x1 .* v4, v5e, v5p, v6e"
    ):
        timing.check_tells_times(hardware.parse_topology("tpu7x:2x2x1"), "--search")
    flags = lambda times: hardware.environment(gpu, times=times)["XLA_FLAGS"]
    monkeypatch.setattr(hardware, "has_gpu_compiler", lambda: True)
    assert "cost_model_stats" in flags(True) and "cost_model_stats" not in flags(False)


def test_clocks_are_those_that_peaks_follow_from():
    """Matrix units of a device × 2 · 128² (v6e: 256²) FLOPs a cycle."""
    for name, units, side in (
        *(("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("v6e", 4, 256)),
    ):
        of = accelerators.TPUS[name]
        peak = units * 2 * side**2 * of.clock_hz
        assert peak == pytest.approx(of.flops_per_sec, rel=0.01)


def test_programs_of_this_machine_are_read_with_their_scopes():
    """XLA writes for the CPU in the same language; it estimates nothing there."""

    def f(x, w):
        def body(_, x):
            with jax.named_scope("attention"):
                return jnp.tanh(x @ w)

        return jax.lax.fori_loop(0, 17, body, x)

    ones = jnp.ones((64, 64))
    compiled = jax.jit(f).lower(ones, ones).compile()
    program = hlo.parse(compiled.as_text())
    every = [x for c in program.computations.values() for x in c.values()]
    loops = [x for x in every if x.opcode == "while"]
    assert [program.trips(x) for x in loops] == [17]
    assert any("/attention/" in x.op_name for x in every)
    found = schedule.of_program(compiled.as_text(), UNIT)
    assert {x.times for x in found.costs if x.group == "attention"} == {17}


def test_times_of_a_configs_programs():
    config = plan_test.tiny()
    topology = hardware.Topology("unit:8", UNIT, (8,))
    said = []
    made = programs.build(config, jax.devices())
    found = timing.measure(made, topology, say=said.append)
    update, _, main, blocks = found.programs
    assert update.name == "update, micro-batch of 8 × 76"
    assert (update.runs, main.runs) == (1, config.rollout.steps_per_chunk)
    assert main.name.endswith("rows in main streams") and "blocks of 2" in blocks.name
    for x in found.programs:
        assert x.before_collectives <= x.seconds() <= x.without_overlap
        assert x.memory_bytes > 0 and x.flops > 0
        assert x.seconds() == pytest.approx(x.schedule.seconds() / x.runs)
        assert {"attention", "projections", "norms"} <= {
            c.group for c in x.schedule.costs
        }
    assert {"draw", "rows"} <= {c.group for c in main.schedule.costs}
    assert {"head", "optimizer"} <= {c.group for c in update.schedule.costs}
    assert blocks.schedule.costs != main.schedule.costs  # of other programs
    assert main.needed_bytes == blocks.needed_bytes and blocks.flops > main.flops
    assert len(said) == 4
    data = json.loads(json.dumps(found.data()))
    assert [*data["programs"]] == [x.name for x in found.programs]
    assert "MFU" in str(report.timing_table(found.programs, UNIT).cells())
