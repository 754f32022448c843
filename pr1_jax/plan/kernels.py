"""What the TPU compiler makes of a program's Pallas kernels.

A kernel has no `estimated_cycles`. It is compiled again by itself, in another process,
since libtpu reads its flags once: there the compiler dumps the kernel's instructions
(`bundles`), seconds of work a kernel.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pr1_jax.plan import hlo
from pr1_jax.system.accelerators import Hardware

_CORES = {"v4": 2, "v5p": 2}  # of a device, which share a grid's parallel axes
_LIMIT_SEC = 600
_ROOT = pathlib.Path(__file__).parents[2]  # the package lies in it


@dataclasses.dataclass(frozen=True)
class Body:
    """A step of a kernel's grid, as the compiler makes it.

    Attributes:
      flops: of its matrix products. bytes: of transfers that it starts itself.
      bundles: in a cycle each; 0 = not counted.
      steps: of the grid; 0 = not known. cores: that share them.
      error: why nothing is known.
    """

    flops: float = 0.0
    bytes: float = 0.0
    bundles: int = 0
    steps: int = 0
    cores: int = 1
    error: str = ""

    def share(self, hardware: Hardware) -> float:
        """Of the peak, that its bundles allow, 0 to 1; 0 for one without products."""
        if not self.bundles:
            return 0.0
        return self.flops / hardware.flops_per_sec / self._step_sec(hardware)

    def _step_sec(self, hardware: Hardware) -> float:
        """Of a step, at the peak at best: of products, bundles count up to a fifth less."""
        issued = self.bundles / self.cores / hardware.clock_hz
        return max(issued, self.flops / hardware.flops_per_sec)

    def seconds(
        self, flops: float | None, bytes_: float | None, hardware: Hardware
    ) -> float | None:
        """Of all of the kernel's bundles; None where that is not known.

        They are as many times those of a step as its FLOPs and bytes are, whichever says
        more. Where neither says anything, all steps of the grid count.

        Args:
          flops, bytes_: of the whole kernel, as it declares them.
        """
        pairs = (flops, self.flops), (bytes_, self.bytes)
        times = [whole / part for whole, part in pairs if whole and part]
        times = max(times, default=self.steps)
        if not self.bundles or not times:
            return None
        return times * self._step_sec(hardware)


def measure(program: hlo.Program, hardware: Hardware) -> dict[str, Body]:
    """Of a program's kernels, by the name of the instruction that calls them.

    A kernel that cannot be compiled by itself says why in `error`.
    """
    found = {}
    for inside in program.computations.values():
        for x in inside.values():
            if x.kernel is not None:
                operands = [a for name in x.operands for a in inside[name].results]
                found[x.name] = _request(x.kernel.config, operands, x.results)
    bodies = _known(hardware)
    if new := [x for x in dict.fromkeys(found.values()) if x not in bodies]:
        bodies.update(zip(new, _count(new, hardware), strict=True))
    return {name: bodies[request] for name, request in found.items()}


@functools.cache
def _known(hardware: Hardware) -> dict[str, Body]:
    """Bodies by request; most programs of a config call the same kernels."""
    del hardware  # the key
    return {}


def _request(config: Mapping[str, Any], operands, results) -> str:
    arrays = lambda of: [(a.dtype, a.dims) for a in of]
    return json.dumps(
        {"config": config, "operands": arrays(operands), "results": arrays(results)}
    )


def _count(requests: Sequence[str], hardware: Hardware) -> list[Body]:
    shape = "x".join(["2", "2", "1"][: hardware.dimensions])
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory(prefix="bundles-") as folder:
        file = pathlib.Path(folder) / "requests.json"
        file.write_text(f"[{','.join(requests)}]")
        topology, dumps = f"{hardware.name}:{shape}", f"{folder}/dumps"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pr1_jax.plan.bundles", file, topology, dumps],
                capture_output=True,
                check=False,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
                text=True,
                timeout=_LIMIT_SEC,
            )
        except subprocess.TimeoutExpired as error:
            return [Body(error=str(error))] * len(requests)
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    missing = [{"error": f"the compiler of kernels stopped: {said}"}]
    lines += missing * (len(requests) - len(lines))
    return [_body(x, hardware) for x in lines]


def _body(found: Mapping[str, Any], hardware: Hardware) -> Body:
    if "error" in found:
        return Body(error=found["error"])
    cores = _CORES.get(hardware.name, 1) if found["parallel"] else 1
    names = "flops", "bytes", "bundles"
    return Body(*(found[x] for x in names), steps=found["steps"] or 0, cores=cores)
