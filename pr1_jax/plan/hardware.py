"""Topologies: so many accelerators, and their devices as JAX has them.

Nothing here imports JAX at the top: the environment that `environment` asks for has to
be there before.
"""

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pr1_jax.system.accelerators import GPUS, TPUS, Hardware

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What XLA wants to know of a GPU, from `cudaGetDeviceProperties`; bytes."""

    description: str
    capability: int  # the major one
    cores: int
    shared: int  # memory of a core
    l2: int
    clock_ghz: float


_HOPPER = _Chip("NVIDIA H100 80GB HBM3", 9, 132, 233_472, 52_428_800, 1.98)
_AMPERE = _Chip("NVIDIA A100-SXM4-80GB", 8, 108, 167_936, 41_943_040, 1.41)
_CHIPS = {
    "a100-40": _AMPERE,
    "a100-80": _AMPERE,
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": _Chip("NVIDIA B200", 10, 148, 233_472, 132_644_864, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of a kind. `shape` is of chips; one number for GPUs."""

    text: str
    hardware: Hardware
    shape: tuple[int, ...]

    @property
    def is_gpu(self) -> bool:
        """Whether these are GPUs."""
        return self.hardware.name in GPUS

    @property
    def num_devices(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.hardware.devices_per_chip


def parse_topology(text: str) -> Topology:
    """The topology of a text such as `v5e:4x4`, `v5p:2x2x2` or `gpu:h100x8`.

    Raises:
      ValueError: names the flag, the text and what is known.
    """
    if gpu := re.fullmatch(r"gpu:([a-z0-9-]+?)x([1-9]\d*)", text):
        name, count = gpu.groups()
        if name in GPUS:
            return Topology(text, GPUS[name], (int(count),))
    if tpu := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", text):
        name, shape = tpu[1], tuple(map(int, tpu[2].split("x")))
        if name in TPUS and len(shape) == (wanted := TPUS[name].dimensions):
            return Topology(text, TPUS[name], shape)
        if name in TPUS:
            raise ValueError(
                f"--topology={text}: {name} has {wanted} dimensions, "
                f"e.g. {name}:{'x'.join('4' * wanted)}"
            )
    raise ValueError(
        f"--topology={text} is not known. TPUs are {', '.join(TPUS)}, e.g. v5e:4x4 or "
        f"v5p:2x2x2; GPUs are {', '.join(GPUS)}, e.g. gpu:h100x8"
    )


_TIMES = (
    "--xla_gpu_collect_cost_model_stats=true",
    "--xla_gpu_enable_triton_gemm=false",
)


def environment(topology: Topology, *, times: bool = False) -> dict[str, str]:
    """Variables to set before JAX is imported.

    Args:
      times: whether a GPU's compiler shall note how long instructions take. It has no
        GPU to try tiles of its own matrix products on, and would take the time of bad
        ones; so they are left to cuBLAS.

    JAX itself runs on the CPU. For GPUs without their compiler it makes as many devices
    there, which are only to be counted; with it, kernels shall not be tried on a GPU.
    libtpu shall not look for a TPU, nor for who else has loaded it.
    """
    if topology.is_gpu and has_gpu_compiler():
        return {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": " ".join(["--xla_gpu_autotune_level=0", *_TIMES * times]),
        }
    if topology.is_gpu:
        flag = f"--xla_force_host_platform_device_count={topology.num_devices}"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
    }


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    names = "jax_cuda12_plugin", "jax_cuda13_plugin"
    return any(importlib.util.find_spec(name) for name in names)


def open_devices(topology: Topology) -> Sequence["jax.Device"]:
    """Devices to lower and compile for; GPUs without a compiler are CPUs, to count.

    Raises:
      ValueError: no TPU compiler, or a compiler that does not know the topology.
    """
    import jax

    if topology.is_gpu and has_gpu_compiler():
        shape = f"1x1x{topology.num_devices}"  # all of one process, as of arithmetic
        target = gpu_target(topology.hardware)
        return _described(
            topology.text, "GPU", platform="cuda", topology=shape, target_config=target
        )
    if topology.is_gpu:
        devices = jax.devices("cpu")
        if len(devices) < topology.num_devices:
            raise ValueError(
                f"--topology={topology.text}: JAX was imported with {len(devices)} devices"
            )
        return devices[: topology.num_devices]
    if not has_tpu_compiler():
        raise ValueError(
            f"--topology={topology.text} needs the TPU compiler, which is a package of "
            f'640 MB: pip install "jax[tpu]=={jax.__version__}" (no TPU is needed)'
        )
    return _compile_only(topology.text)


def devices_of_one_process(devices: Sequence["jax.Device"]) -> Sequence["jax.Device"]:
    """The devices of process 0 as a topology of their own, if it has not all of them.

    The compiler takes no part of a topology, but a process of a run does: it samples
    on its own devices alone.
    """
    mine = [device for device in devices if device.process_index == 0]
    if len(mine) == len(devices):
        return devices
    kinds = {hardware.kind: hardware for hardware in TPUS.values()}
    hardware = kinds[mine[0].device_kind]
    coordinates = [device.coords for device in mine]
    shape = [max(x) - min(x) + 1 for x in zip(*coordinates)][: hardware.dimensions]
    return _compile_only(f"{hardware.name}:{'x'.join(map(str, shape))}")


def gpu_target(hardware: Hardware) -> str:
    """A GPU as XLA's GPU compiler takes it: a `GpuTargetConfigProto` as text."""
    chip = _CHIPS[hardware.name]
    features = "ACCELERATED_FEATURES" if chip.capability >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {chip.shared - 1024}
  shared_memory_per_core: {chip.shared}
  threads_per_core_limit: 2048
  core_count: {chip.cores}
  fpus_per_core: {64 if chip.capability == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(hardware.hbm_per_sec)}
  l2_cache_size: {chip.l2}
  clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {hardware.hbm_bytes}
  cuda_compute_capability {{ major: {chip.capability} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{chip.description}"
"""


@functools.cache
def _compile_only(text: str) -> Sequence["jax.Device"]:
    # A v4 chip is one device on a real machine, but two here unless this is said.
    megacore = text.startswith("v4:")
    options = {"chip_config_name": "megacore"} if megacore else {}
    return _described(text, "TPU", platform="tpu", topology_name=text, **options)


def _described(text: str, compiler: str, **options) -> Sequence["jax.Device"]:
    """Devices that need not be there, of a topology with these options.

    Raises:
      ValueError: names the flag, its text and what the compiler says.
    """
    import jax
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**options).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = f"--topology={text}: the {compiler} compiler says {error}"
        raise ValueError(said) from error
