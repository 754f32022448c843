"""Accelerators by name: peaks and memory of a device."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device, as JAX counts them.

    TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, key specifications of a
    chip. `ici_per_sec` is half of the bidirectional figure there (v4: of six links of
    50 GB/s each way). A TPU7x chip is two devices, with half of everything each.
    `hbm_bytes` is what the TPU compiler says it may use: its message for a program
    that is too large.

    GPUs: the data sheets of the SXM modules, dense bfloat16, one way of NVLink; memory
    is 95 % of what `nvidia-smi` lists, since contexts and libraries want some.

    Attributes:
      flops_per_sec: peak, bfloat16.
      hbm_bytes: that programs can use. hbm_per_sec: bytes/s of reading it.
      ici_per_sec: bytes/s to and from other devices, each way, over all links.
      dimensions: of the topology; 0 for GPUs.
      devices_per_chip: of JAX's devices.
      kind: what JAX calls it.
      clock_hz: of its matrix units, the rate that `flops_per_sec` follows from; 0 where
        it is not known.
    """

    name: str
    flops_per_sec: float
    hbm_bytes: int
    hbm_per_sec: float
    ici_per_sec: float
    dimensions: int = 0
    devices_per_chip: int = 1
    kind: str = ""
    clock_hz: float = 0.0


def _tpu(
    name, kind, tflops, gib, gb_per_sec, ici_gb_per_sec, dimensions, mhz, per_chip=1
):
    size = int(gib * GIB)
    rates = 1e9 * gb_per_sec, 1e9 * ici_gb_per_sec
    clock = 1e6 * mhz
    return Hardware(
        name, 1e12 * tflops, size, *rates, dimensions, per_chip, kind, clock
    )


def _gpu(name, kind, tflops, mib, gb_per_sec, link_gb_per_sec):
    size = int(0.95 * mib * 2**20)
    rates = 1e9 * gb_per_sec, 1e9 * link_gb_per_sec
    return Hardware(name, 1e12 * tflops, size, *rates, kind=kind)


TPUS = {
    hardware.name: hardware
    for hardware in (
        _tpu("v4", "TPU v4", 275, 30.75, 1200, 300, 3, 1050),
        _tpu("v5e", "TPU v5 lite", 197, 15.75, 819, 200, 2, 1500),
        _tpu("v5p", "TPU v5", 459, 95.74, 2765, 600, 3, 1750),
        _tpu("v6e", "TPU v6 lite", 918, 31.25, 1638, 400, 2, 1750),
        _tpu("tpu7x", "TPU7x", 2307 / 2, 94.75, 7380 / 2, 600 / 2, 3, 0, per_chip=2),
    )
}
GPUS = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 312, 40960, 1555, 300),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", 312, 81920, 2039, 300),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 989, 81559, 3350, 450),
        _gpu("h200", "NVIDIA H200", 989, 143771, 4800, 450),
        _gpu("b200", "NVIDIA B200", 2250, 183359, 7700, 900),
    )
}


def of_kind(kind: str) -> Hardware | None:
    """The accelerator that JAX calls by this `device_kind`; None where it is not known."""
    for hardware in (*TPUS.values(), *GPUS.values()):
        if hardware.kind == kind:
            return hardware
    return None
