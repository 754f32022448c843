"""How the programs of tests are compiled, which is most of what tests take.

Programs are small and run for moments: few optimizations are made, and loops are emitted
the older way, which compiles in two thirds of the time. The flags are read when JAX is
first imported. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` and
`XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` compile as users do.
"""

import importlib.util
import mmap
import os
import pathlib

DEVICES = "--xla_force_host_platform_device_count"
EMITTERS = "--xla_cpu_use_fusion_emitters"


def configure(devices: int) -> None:
    """Sets the flags in this process's environment, and so of those that it starts."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = os.environ.get("XLA_FLAGS", "").split()
    for flag, value in ((DEVICES, devices), (EMITTERS, "false")):
        if not any(f.startswith(flag) for f in flags) and _is_known(flag):
            flags.append(f"{flag}={value}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _is_known(flag: str) -> bool:
    """Whether this version of XLA knows a flag: one that it does not know is fatal."""
    folder = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
    library = max(folder.rglob("*.so"), key=lambda path: path.stat().st_size)
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        # As a string of its own: among reserved names it also stands when it is gone.
        return content.find(flag.removeprefix("--").encode() + b"\0") >= 0


def on_one_device() -> dict[str, str]:
    """The environment of a command that finds the devices that there are."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    left = " ".join(flag for flag in flags if not flag.startswith(DEVICES))
    return os.environ | {"XLA_FLAGS": left}
