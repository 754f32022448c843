"""What the workers for ours and for Tunix share: shapes, flags, and the price of a program.

`python -m tests.programs.tpu_peers.{ours,tunix} --work WORK --topology v5e:4x4
--layers N --out FILE.json`. Nothing here or there makes an array: programs are lowered
from shapes, and compiled for devices that need not be there.
"""

import argparse
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from configs import rl_alternating
from pr1_jax.plan import hardware, kernels, timing
from pr1_jax.system import files

MODEL_LAYERS = 36  # Qwen3-4B
TENSOR = 4  # devices that share the heads
ROWS = 32  # responses of a shard that are decoded at the same time
# Tokens in decoding, at most. Prompts are as long, responses half as long on average.
PROMPT, RESPONSE = 2000, 3000
TOKENS = 3072  # of a sequence of a micro-batch
TRAINED = TOKENS * RESPONSE // (PROMPT + RESPONSE)  # the response's


@dataclasses.dataclass(frozen=True)
class Program:
    """What a worker compiles.

    Attributes:
      work: a run is a decode step, or an update's micro-batch.
      tokens: that a run makes or trains, on all devices of the topology.
      mesh: sizes by axis. setting: in words, for the table.
      busy_steps: of the grids of kernels that declare no cost, the share that computes.
      own_bytes: of main memory that the program reads by its nature, on one device; 0 =
        not counted.
    """

    work: timing.Work
    tokens: int
    mesh: Mapping[str, int]
    setting: str
    busy_steps: float = 1.0
    own_bytes: float = 0.0


def sequences(topology: hardware.Topology) -> int:
    """Of a micro-batch, on all devices: as many as our config takes there."""
    return settings(topology).rl.micro_batch_size


def settings(topology: hardware.Topology) -> ml_collections.ConfigDict:
    """Our config of the model on these devices."""
    return rl_alternating.get_config(f"qwen3_4b,{topology.text}")


def part(topology: hardware.Topology) -> hardware.Topology:
    """The devices that share one copy of the weights in decoding, as a topology."""
    shape = "x".join(["2", "2", "1"][: topology.hardware.dimensions])
    return hardware.parse_topology(f"{topology.hardware.name}:{shape}")


def price(
    program: Program, topology: hardware.Topology, text_file: Path | None = None
) -> dict[str, Any]:
    """Compiles a program, and what a run of it costs, as `timing.Timing.data` has it.

    Args:
      text_file: to keep the compiled program's text in.
    """

    def count(parsed, device):
        return {
            name: dataclasses.replace(x, steps=round(x.steps * program.busy_steps))
            for name, x in kernels.measure(parsed, device).items()
        }

    keep = text_file.write_text if text_file else lambda text: None
    timed = timing.read(program.work, topology.hardware, count=count, keep=keep)
    return timed.data(topology.hardware) | {
        "tokens": program.tokens,
        "mesh": dict(program.mesh),
        "setting": program.setting,
        "own_bytes": program.own_bytes,
    }


def main(
    peer: str,
    packages: Sequence[str],
    works: Mapping[str, Callable[[hardware.Topology, int], Program]],
) -> None:
    """Prices the work that the command line names, and writes it.

    Args:
      peer: whose worker this is. packages: whose versions are kept.
      works: functions of a topology and a number of layers.
    """
    flags = argparse.ArgumentParser()
    flags.add_argument("--work", choices=works, required=True)
    flags.add_argument("--topology", required=True)
    flags.add_argument("--layers", type=int, required=True)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--hlo", type=Path, help="keeps the program's text there")
    args = flags.parse_args()
    topology = hardware.parse_topology(args.topology)
    os.environ |= hardware.environment(topology)
    found = price(works[args.work](topology, args.layers), topology, args.hlo)
    found |= {
        "peer": peer,
        "work": args.work,
        "topology": args.topology,
        "layers": args.layers,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    files.write_json(args.out, found)
