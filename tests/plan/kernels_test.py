"""Pallas kernels in a program's time: bundles and prices are counted by hand."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pr1_jax.plan import bundles, hardware, hlo, kernels, schedule, timing
from pr1_jax.plan.kernels import Body
from pr1_jax.system import accelerators
from tests.plan import schedule_test
from tests.plan.schedule_test import UNIT  # 1,000 FLOPs and a byte a nanosecond

CALL = """
  %p = f32[1000]{0} parameter(0)
  ROOT %k = f32[1000]{0} custom-call(%p), custom_call_target="TARGET", metadata={op_name="jit(f)/attention/k"}, backend_config=CONFIG
"""


def program(declared=None, target="tpu_custom_call"):
    config = {"body": "TUzvUg=="}
    if declared:
        names = "flops", "bytes_accessed", "transcendentals"
        config["cost_estimate"] = {
            n: str(x) for n, x in zip(names, declared, strict=True)
        }
    text = json.dumps({"flag_configs": [], "custom_call_config": config})
    return schedule_test.text(
        CALL.replace("CONFIG", text).replace("TARGET", target) + ", other={}"
    )


def cost(declared=None, body=None, **kwargs):
    bodies = {} if body is None else {"k": body}
    (found,) = schedule.of_program(program(declared, **kwargs), UNIT, bodies).costs
    assert found.group == "attention"
    return found


# 500 FLOPs a bundle are half of the unit's peak; 100 bundles a step of 7.
BODY = Body(flops=50_000, bundles=100, steps=7)


@pytest.mark.parametrize(
    ("declared", "body", "nanoseconds", "moved", "source"),
    [
        # Operands and results alone, 8,000 bytes.
        (None, None, 8000, 8000, "bytes"),
        (None, Body(error="x"), 8000, 8000, "bytes"),
        # All steps of the grid: 700 cycles, which bytes outlast.
        (None, BODY, 8000, 8000, "bundles"),
        (None, Body(50_000, bundles=10_000, steps=7), 70_000, 8000, "bundles"),
        (None, Body(50_000, bundles=10_000, steps=7, cores=2), 35_000, 8000, "bundles"),
        (None, Body(50_000, bundles=10_000), 8000, 8000, "bytes"),
        # What is declared, at the peak or at the bandwidth.
        ((9_000_000, 30, 5), None, 9000, 30, "declared"),
        ((9_000_000, 12_000, 5), None, 12_000, 12_000, "declared"),
        # At the share of the peak that bundles allow.
        ((9_000_000, 30, 5), BODY, 18_000, 30, "bundles"),
        ((9_000_000, 20_000, 5), BODY, 20_000, 20_000, "bundles"),
        (
            (9_000_000, 30, 5),
            Body(50_000, bundles=100, steps=7, cores=2),
            9000,
            30,
            "bundles",
        ),
        # Of 60 bytes a step 200 are 20 thirds of its bundles, which take longer.
        ((1, 200, 5), Body(50_000, 60, bundles=100, steps=9), 333.333, 200, "bundles"),
        # No share of the peak is above 1.
        ((9_000_000, 30, 5), Body(50_000, bundles=40, steps=7), 9000, 30, "bundles"),
        # Without products all steps count, whatever is declared.
        ((9_000_000, 30, 5), Body(0, bundles=100, steps=7), 700, 30, "bundles"),
        ((9_000_000, 30, 5), Body(0, bundles=100), 9000, 30, "declared"),
    ],
)
def test_a_kernel_costs_its_bytes_or_its_bundles(
    declared, body, nanoseconds, moved, source
):
    found = cost(declared, body)
    assert round(1e9 * found.seconds, 3) == nanoseconds
    assert (found.bytes, found.source) == (moved, source)


def test_what_bundles_allow_is_told_and_what_they_do_not_count_too():
    assert cost((1000, 1, 1), BODY).peak_share == pytest.approx(0.5)
    assert cost((1000, 1, 1)).peak_share == 0
    found = schedule.of_program(program((9_000_000, 30, 5)), UNIT)
    assert found.unestimated_seconds == pytest.approx(9e-6)
    counted = schedule.of_program(program((9_000_000, 30, 5)), UNIT, {"k": BODY})
    assert counted.unestimated_seconds == 0


@pytest.mark.parametrize(("size", "waits"), [(1000, 4000), (0, 0)])
def test_a_kernel_and_copies_beside_it_share_the_bandwidth(size, waits):
    text = program((1, 9000, 5)).replace("ROOT %k", "%k")
    entry = f"""  %q = f32[{size}]{{0}} parameter(1)
  %s = (f32[{size}]{{0:S(1)}}, f32[{size}]{{0}}, u32[]) copy-start(%q)
  %k = """
    text = text.replace("  %k = ", entry)
    text = text.replace(
        ", other={}",
        f"""
  ROOT %d = f32[{size}]{{0:S(1)}} copy-done(%s)""",
    )
    found = schedule.of_program(text, UNIT, {"k": BODY})
    assert round(1e9 * found.seconds("attention")) == 9000
    assert round(1e9 * found.seconds(schedule.COPIES)) == waits
    assert round(1e9 * found.seconds()) == 9000 + waits


def test_other_custom_calls_are_no_kernels():
    found = cost((9_000_000, 30, 5), BODY, target="TopK")
    assert (found.bytes, found.source) == (8000, "bytes")


# A grid of 4 steps, with what begins and ends the pipeline; a loop of 8, and one of
# unknown length, in which one bundle is empty.
BUNDLES = """\
    LB: loop body
= control target key end

     0   :  { %s1 = smov 0 /* a remark: LB: >> { %p = x, 3 /* loop exit test */ */ }
   0x1   :  {}
   0x2 LB: > { %v1 = vld [vmem:[%s1]] }
   0x3 PF: > { %s2 = smov 0 }
   0x4 LB: >> { %v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1 ;; %p1 = scmp.ge.s32.totalorder %s2, 8 /* loop exit test */ }
   0x5   :  {}
   0x6   : >> { %9 = sbr.rel (!%p1) target = $region4 }
   0x7   :  {}
   0x8 PF: > { %s3 = smov 0 }
   0x9 LB: >> { %p2 = scmp.ge.s32.totalorder %s3, %s9 /* loop exit test */ }
   0xa   :  {}
   0xb   : > { %p3 = scmp.ge.s32.totalorder %s1, 6 /* loop exit test */ }
   0xc   :  {} /* End region 4
hlo: k */ }
   0xd   :  { %1 = vsyncpa [#allocation5], 1 }
"""


def test_bundles_of_a_step():
    # 0x2, 0x3, 0x8, 0xb, 0xc; 8 × 4; 0x9, 0xa.
    assert bundles.count(BUNDLES, has_grid=True) == 5 + 8 * 4 + 2
    # Products in a loop of unknown length: an iteration of it, and nothing else.
    moved = BUNDLES.replace("vmatmul", "vadd").replace("{ %p2", "{ vmatmul ;; %p2")
    assert bundles.count(moved, has_grid=True) == 2
    # A kernel of one step has no loop over them: its own loops have their trips.
    once = re.sub(r"> \{", " {", BUNDLES.replace("%s1, 6 /* loop exit test */", ""))
    once = once.replace("0x2 LB", "0x2   ")
    assert bundles.count(once, has_grid=False) == 8 + 8 * 4 + 2


def kernel(count, x, y, out):
    add = lambda i, _: out.__setitem__(
        ..., out[...] + jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)
    )
    jax.lax.fori_loop(2, 5, add, None)

    @pl.when(pl.program_id(0) == 0)
    def _():
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    if KERNEL["unknown"]:
        jax.lax.fori_loop(0, count[0], add, None)


KERNEL = {"unknown": False}


def lower(rows, *, parallel=False, **kwargs):
    """A kernel of steps of [16, 256] · [256, 128], lowered for TPUs."""
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows // 16, 2),
            in_specs=[
                pl.BlockSpec((16, 256), lambda i, j, n: (i, 0)),
                pl.BlockSpec((256, 128), lambda i, j, n: (0, j)),
            ],
            out_specs=pl.BlockSpec((16, 128), lambda i, j, n: (i, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, 256), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[("arbitrary", "parallel")[parallel], "arbitrary"]
        ),
        cost_estimate=pl.CostEstimate(
            flops=1234, bytes_accessed=56, transcendentals=789
        ),
    )
    shapes = [
        ((1,), jnp.int32),
        ((rows, 256), jnp.bfloat16),
        ((256, 256), jnp.bfloat16),
    ]
    arguments = [jax.ShapeDtypeStruct(*x, **kwargs) for x in shapes]
    traced = jax.jit(lambda *xs: call(*xs)).trace(*arguments)
    return traced.lower(lowering_platforms=("tpu",))


def body_of(lowered):
    return re.search(r"body\\22: \\22([^\\]*)", lowered.as_text())[1]


PRODUCT = 2 * 16 * 256 * 128


@pytest.mark.parametrize(
    ("unknown", "flops"), [(False, (3 + 1) * PRODUCT), (True, PRODUCT)]
)
def test_products_of_a_step_are_read_from_the_kernel(monkeypatch, unknown, flops):
    monkeypatch.setitem(KERNEL, "unknown", unknown)
    module = bundles.read_module(body_of(lower(64, parallel=unknown)))
    assert bundles.work(module) == (flops, 0)
    assert bundles.grid(module) == (8, unknown)


def test_transfers_of_a_step_are_read_from_the_kernel():
    def kernel(x, out, buffer, arrived):
        @pl.loop(0, 3)
        def _(i):
            rows = x.at[pl.ds(pl.multiple_of(8 * i, 8), 8)]
            copy = pltpu.make_async_copy(rows, buffer, arrived)
            copy.start()
            copy.wait()
            out[...] += buffer[...].astype(jnp.float32)

    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.bfloat16), pltpu.SemaphoreType.DMA],
    )
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((24, 128), jnp.bfloat16))
    lowered = traced.lower(lowering_platforms=("tpu",))
    module = bundles.read_module(body_of(lowered))
    assert bundles.work(module) == (0, 3 * 8 * 128 * 2)
    assert bundles.grid(module) == (1, False)


def test_a_kernel_that_cannot_be_compiled_says_why(monkeypatch):
    monkeypatch.setattr(kernels, "_ROOT", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(kernels.sys, "executable", "false")
    found = kernels.measure(hlo.parse(program()), UNIT)
    assert "stopped: it said nothing" in found["k"].error
    assert kernels.measure(hlo.parse(program()), UNIT) == found


def test_cores_share_what_is_parallel():
    found = {"flops": 8.0, "bytes": 4.0, "bundles": 3, "steps": None, "parallel": True}
    body = lambda name: kernels._body(found, accelerators.TPUS[name])
    assert body("v5p") == Body(8.0, 4.0, 3, cores=2)
    assert body("v5e") == Body(8.0, 4.0, 3, cores=1)


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason='needs libtpu: pip install "jax[tpu]"'
)
def test_the_tpu_compiler_counts_bundles(monkeypatch):
    topology = hardware.parse_topology("v5e:2x2")
    for name, value in hardware.environment(topology).items():
        monkeypatch.setenv(name, value)
    device = hardware.open_devices(topology)[0]
    place = jax.sharding.SingleDeviceSharding(device)
    compiled = lower(64, sharding=place).compile()
    found = kernels.measure(hlo.parse(compiled.as_text()), topology.hardware)
    ((name, body),) = found.items()
    assert (body.flops, body.steps, body.error) == (4 * PRODUCT, 8, "")
    # 4 products of 2 passes, each of 128 × 128 weights pushed: no fewer, nor many more.
    assert 4 * 2 * 16 / 4 < body.bundles < 4000
    timed = timing.Timing(
        name="f",
        schedule=schedule.of_program(compiled.as_text(), topology.hardware, found),
        runs=1,
        flops=1.0,
        needed_bytes=0.0,
        memory_bytes=1,
        compile_sec=1.0,
        bodies=found,
    )
    (data,) = timed.data(topology.hardware)["kernels"]
    assert (data["name"], data["source"], data["bytes"]) == (name, "bundles", 56)
    assert data["bundles"] == body.bundles
