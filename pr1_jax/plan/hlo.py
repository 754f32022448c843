"""Reads the text of a compiled program: XLA's HLO after optimization and scheduling.

The text is what `compiled.as_text()` gives. Instructions of a computation stand in the
order in which the device runs them. Nothing here knows what an instruction costs, but
that the TPU compiler notes `estimated_cycles` beside some of them, and XLA's GPU compiler
microseconds, where it is told to (`hardware.environment`).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEAD = re.compile(r"(ENTRY )?%(\S+) \(")
_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
# An instruction, the head of a computation or of the module, an end, an empty line.
_BEGIN = re.compile(
    rf"\s+(ROOT )?%\S+ = |{_HEAD.pattern}|HloModule |{_END.pattern}|\s*$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations|"
    r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_MODELS = ("indexing-cost-model", "", "sol")  # of one kernel's tiles, of any, of links
_ESTIMATE = re.compile(
    rf'"exec_time_us":([\d.e+-]+)[^}}]*"name":"({"|".join(_MODELS)})"'
)
_CUBLAS = re.compile(
    r'custom_call_target="__cublas.*?"lhs_contracting_dimensions":\[([^\]]*)\]'
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_INTEGER = re.compile(r"-?\d+")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_CONFIG = "backend_config="


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of an instruction: `on_chip` where it is not in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Without what tiles pad."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.search(r"\d+", self.dtype)[0])  # bf16, s32, f8e4m3
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel, as Mosaic gives it to the TPU compiler.

    Attributes:
      config: the compiler's settings; `body` is the kernel itself.
      flops, bytes: of one call, as its `pl.CostEstimate` declares them; None = it does
        not.
    """

    config: Mapping[str, Any]
    flops: int | None = None
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      results: the arrays that it makes, those of a tuple in order.
      operands: names. arguments: their text; of a constant its value.
      called: names of computations. cycles: as the compiler estimates them, or None.
      op_name: by what it was made, as `jit(f)/while/body/attention/dot_general`.
      rest: the attributes as text.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool = False

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of computations."""
        found = _CALLED.findall(self.rest)
        return tuple(name for text in found for name in _NAME.findall(text))

    def computation(self, role: str) -> str:
        """The name of the computation that is its `body`, `condition` or `calls`."""
        return re.search(rf"\b{role}=%([\w.\-]+)", self.rest)[1]

    @functools.cached_property
    def cycles(self) -> int | None:
        """As the compiler estimates them."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @functools.cached_property
    def seconds(self) -> float | None:
        """As XLA's GPU compiler estimates them, by the best of its models that says it."""
        found = {name: float(x) / 1e6 for x, name in _ESTIMATE.findall(self.rest)}
        return next((found[name] for name in _MODELS if name in found), None)

    @functools.cached_property
    def contracted(self) -> tuple[int, ...]:
        """Of a product that is left to cuBLAS: dimensions of the first operand that it sums.

        Empty for all else.
        """
        found = _CUBLAS.search(self.rest)
        return tuple(map(int, _INTEGER.findall(found[1]))) if found else ()

    @functools.cached_property
    def kernel(self) -> Kernel | None:
        """Of an instruction that calls one."""
        if self.opcode != "custom-call" or _KERNEL not in self.rest:
            return None
        text = self.rest.partition(_CONFIG)[2]
        found = json.JSONDecoder().raw_decode(text)[0] if text else {}
        config = found.get("custom_call_config", {})
        declared = config.get("cost_estimate", {})
        number = lambda name: int(declared[name]) if name in declared else None
        return Kernel(config, number("flops"), number("bytes_accessed"))

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the traced function it comes from; "" if that is not said."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]  # by name, in the order of execution


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a program."""

    computations: Mapping[str, Computation]
    entry: str

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        found = self.computations[computation].values()
        return next(x for x in found if x.is_root)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body at most; None where that is not a constant.

        It is the least of the constants that the condition compares a counter with;
        counters are taken to start at zero and to rise by one.
        """
        bounds = [*self._bounds(loop.computation("condition"))]
        return min(bounds) if bounds else None

    def _bounds(self, computation: str) -> Iterator[int]:
        inside = self.computations[computation]
        for x in inside.values():
            if x.opcode == "fusion":
                yield from self._bounds_of_fusion(x, inside)
            elif x.opcode == "compare" and "direction=LT" in x.rest:
                yield from _constants(x.operands[1:], inside)

    def _bounds_of_fusion(self, fusion: Instruction, outside: Computation):
        """Bounds that a fused condition compares with, in it or handed to it."""
        inside = self.computations[fusion.called[0]]
        for x in inside.values():
            if x.opcode != "compare" or "direction=LT" not in x.rest:
                continue
            bound = inside[x.operands[1]]
            if bound.opcode == "parameter":
                given = fusion.operands[int(bound.arguments)]
                yield from _constants([given], outside)
            else:
                yield from _constants([bound.name], inside)


def _constants(names, computation: Computation) -> Iterator[int]:
    for name in names:
        x = computation[name]
        if x.opcode == "constant" and _INTEGER.fullmatch(x.arguments):
            yield int(x.arguments)


def parse(text: str) -> Program:
    """Reads a program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    inside, entry = None, ""
    for line in _lines(text):
        if inside is None:
            head = _HEAD.match(line)
            if head and line.rstrip().endswith("{"):
                inside = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif _END.match(line):
            inside = None
        elif " = " in line:
            x = _instruction(line)
            inside[x.name] = x
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY")
    return Program(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Lines, those of an instruction joined: texts in its attributes may go over some."""
    parts: list[str] = []
    for line in text.splitlines():
        if parts and not _BEGIN.match(line):
            parts.append(line)
            continue
        yield "".join(parts)
        parts = [line]
    yield "".join(parts)


def _instruction(line: str) -> Instruction:
    """`  ROOT %name = shape opcode(arguments), attributes`."""
    left, _, right = line.strip().partition(" = ")
    is_root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opcode, _, _ = right.partition("(")
    end = _closing(right, len(opcode))
    arguments, rest = right[len(opcode) + 1 : end - 1], right[end:]
    return Instruction(
        name=name,
        opcode=opcode,
        results=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        rest=rest,
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has been closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(n) for n in dims.split(",") if n)
        # S(1) and up are memories on the chip; 0, the default, is not written.
        yield Array(dtype, sizes, on_chip="S(" in layout)
