"""Counts the instructions that the TPU compiler makes of a Pallas kernel.

    python -m pr1_jax.plan.bundles REQUESTS.json TOPOLOGY FOLDER

compiles each kernel of the requests (`kernels.py` writes them) by itself, with libtpu's
dumps of its VLIW schedule in FOLDER, and prints one JSON object a kernel: what a step of
its grid computes, and in how many bundles. A bundle is what a core issues in a cycle.

Loops inside a kernel count with their trips where these are constants. Where products
stand in loops of unknown length, only these loops count, an iteration each. All that is
conditional is taken to happen: a step that begins and ends a row at once, so the count
is rather too high.
"""

import base64
import json
import math
import operator
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
_DTYPES = {
    "pred": "bool",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    **{f"s{bits}": f"int{bits}" for bits in (4, 8, 16, 32)},
    **{f"u{bits}": f"uint{bits}" for bits in (4, 8, 16, 32)},
}
# `  0x12 LB: >> { …instructions… }`, of loops as deep as there are marks.
_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|\d+) +([A-Z]{2})?: *(>*) *\{(.*)")
_EXIT = re.compile(r"(?:, (\d+)|(.)) +/\* loop exit test")
_ARITHMETIC = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": operator.floordiv,
    "index_cast": lambda x: x,
}
_MATMUL = re.compile(r"\bvmatmul")


def count(text: str, *, has_grid: bool) -> int:
    """Bundles of a step of a kernel's grid.

    Args:
      text: of the dump `…final_bundles.txt`.
      has_grid: whether its outermost loop is one over steps of a grid.
    """
    root = _loops(text)
    if has_grid and root.inside:
        root.inside = [max(root.inside, key=lambda loop: loop.own)]
        root.inside[0].trips = 1  # a step
        root.own = 0
    if found := [*root.unknown_with_products()]:
        return sum(loop.bundles() for loop in found)
    return root.bundles()


class _Loop:
    """Bundles of a loop, `own` without the loops inside; trips None = not known."""

    def __init__(self):
        self.own, self.products, self.trips = 0, 0, None
        self.inside: list[_Loop] = []

    def bundles(self) -> int:
        return self.own + sum((x.trips or 1) * x.bundles() for x in self.inside)

    def unknown_with_products(self) -> Iterator["_Loop"]:
        """The outermost loops of unknown length that hold products."""
        for x in self.inside:
            if x.trips is None and x.has_products():
                yield x
            else:
                yield from x.unknown_with_products()

    def has_products(self) -> bool:
        return self.products > 0 or any(x.has_products() for x in self.inside)


def _loops(text: str) -> _Loop:
    stack = [_Loop()]
    stack[0].trips = 1
    for line in text.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        mark, depth, instructions = bundle[1], len(bundle[2]), bundle[3]
        if instructions.startswith("}"):  # an empty one has no marks
            depth = len(stack) - 1
        del stack[depth + (mark != "LB") :]
        while len(stack) <= depth:
            stack[-1].inside.append(_Loop())
            stack.append(stack[-1].inside[-1])
        loop = stack[depth]
        loop.own += 1
        loop.products += len(_MATMUL.findall(instructions))
        if end := _EXIT.search(instructions):
            loop.trips = int(end[1]) if end[1] else None
    return stack[0]


def work(module: Any) -> tuple[float, float]:
    """What `count` counts the bundles of: FLOPs of its products, and bytes.

    Bytes are of transfers that the kernel starts itself, not of its blocks.

    Args:
      module: of Mosaic, an `ir.Module`.
    """
    (body, *_) = module.body.operations  # the others say where blocks lie
    found = [*_walk(body.operation, 1, False)]
    unknown = [x for x in found if x.unknown]
    chosen = unknown if any(x.flops for x in unknown) else found
    return sum(x.flops for x in chosen), sum(x.bytes for x in chosen)


class _Work(NamedTuple):
    flops: float
    bytes: float
    unknown: bool  # whether a loop of unknown length is around it


def _walk(operation: Any, times: int, unknown: bool) -> Iterator[_Work]:
    seen = []  # upper bounds of loops: one that begins there is the rest of another
    for block in (block for region in operation.regions for block in region):
        for x in block.operations:
            name = x.operation.name.removeprefix("stable_mosaic.")
            inner, is_unknown = times, unknown
            if name == "tpu.matmul":
                yield _Work(times * _flops(x), 0.0, unknown)
            elif name == "tpu.enqueue_dma":
                yield _Work(0.0, times * _bytes(x.operands[0].type), unknown)
            elif name == "scf.for":
                low, high, step = (_constant(x.operands[i]) for i in range(3))
                if x.operands[0] in seen:
                    continue
                seen.append(x.operands[1])
                if None in (low, high, step):
                    # What is around it does not matter: an iteration counts.
                    inner, is_unknown = 1, True
                elif not unknown:
                    inner = times * max(0, -(-(high - low) // step))
            elif name == "scf.while":
                inner, is_unknown = 1, True
            yield from _walk(x.operation, inner, is_unknown)


def _bytes(memref: Any) -> float:
    bits = re.search(r"\d+", str(memref.element_type))
    return math.prod(memref.shape) * int(bits[0]) / 8


def _flops(matmul: Any) -> float:
    """2 · all of the result · what is summed over."""
    shapes = [[*matmul.operands[0].type.shape], [*matmul.results[0].type.shape]]
    summed = re.search(r"<\[([\d, ]*)\]", str(matmul.attributes["dimension_numbers"]))
    axes = [int(n) for n in summed[1].split(",") if n.strip()]
    return 2.0 * math.prod(shapes[1]) * math.prod(shapes[0][axis] for axis in axes)


def _constant(value: Any) -> int | None:
    """What an integer is, as far as constants alone make it."""
    x = value.owner
    name = getattr(x, "name", "").rpartition(".")[2]  # none: an argument
    if name == "constant":
        return int(str(x.attributes["value"]).split(":")[0])
    if name not in _ARITHMETIC:
        return None
    known = [_constant(operand) for operand in x.operands]
    return None if None in known else _ARITHMETIC[name](*known)


def read_module(body: str) -> Any:
    """The Mosaic module of a kernel, an `ir.Module`, from its `backend_config`.

    Raises:
      ValueError: it is none.
    """
    from jax._src.interpreters import mlir  # no public name reads these
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    context = mlir.JaxIrContext()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        try:
            return ir.Module.parse(base64.b64decode(body))
        except ir.MLIRError as error:
            raise ValueError(f"this is no Mosaic module: {error}") from error


def grid(module: Any) -> tuple[int | None, bool]:
    """Steps of a kernel's grid, None if not known; whether two cores may share them."""
    attributes = next(iter(module.body.operations)).attributes
    if "iteration_bounds" not in attributes:
        return 1, False
    bounds = [int(n) for n in _numbers(str(attributes["iteration_bounds"]))]
    parallel = "parallel" in str(attributes["dimension_semantics"])
    return (math.prod(bounds) if min(bounds, default=1) > 0 else None), parallel


def _numbers(text: str) -> list[str]:
    """Those of `array<i64: 1, 8, 6>`."""
    return re.findall(r"-?\d+", text.partition(":")[2])


def measure(request: dict[str, Any], device: Any, folder: pathlib.Path) -> dict:
    """Compiles a kernel by itself and counts.

    Args:
      request: `config`: the `custom_call_config`; `operands`, `results`: pairs of HLO's
        dtype and dimensions.
      device: that it is compiled for. folder: where the compiler dumps.
    """
    import jax

    module = read_module(request["config"]["body"])
    steps, parallel = grid(module)
    flops, transferred = work(module)
    struct = lambda array, **kwargs: jax.ShapeDtypeStruct(
        tuple(array[1]), _DTYPES[array[0]], **kwargs
    )
    call = jax.ffi.ffi_call(
        "tpu_custom_call",
        [struct(x) for x in request["results"]],
        custom_call_api_version=1,
        legacy_backend_config=json.dumps({"custom_call_config": request["config"]}),
    )
    place = jax.sharding.SingleDeviceSharding(device)
    operands = [struct(x, sharding=place) for x in request["operands"]]
    before = {*folder.iterdir()} if folder.is_dir() else set()
    jax.jit(lambda *xs: call(*xs)).lower(*operands).compile()
    made = {*folder.iterdir()} - before
    (dump,) = [x for x in made if re.search(r"ffi_call.*\d-final_bundles", x.name)]
    found = {
        "flops": flops,
        "bytes": transferred,
        "bundles": count(dump.read_text(), has_grid=steps != 1),
        "steps": steps,
        "parallel": parallel,
    }
    for file in made:  # hundreds of files a kernel
        file.unlink()
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints a line of JSON a kernel; `error` where it could not be compiled."""
    requests, topology, folder = arguments
    folder = pathlib.Path(folder)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {DUMP_FLAGS.format(folder=folder)}"
    from jax.experimental import topologies

    device = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices[0]
    known: dict[str, dict] = {}  # kernels that differ in lines of source alone are one
    for request in json.loads(pathlib.Path(requests).read_text()):
        try:
            text = str(read_module(request["config"]["body"]))
            config = request["config"] | {"body": text}
            key = json.dumps(request | {"config": config})
            found = known.get(key) or measure(request, device, folder)
            known[key] = found
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
