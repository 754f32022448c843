"""The C++ kernels as a library: compiled once, known to XLA by name.

They are compiled by the machine's C++ compiler when they are first needed, and kept in
the user's cache folder, by what they depend on. Where there is no compiler, on other
platforms and for other types than float32, XLA computes the same (`why_not`).
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
from absl import logging

from pr1_jax.system import files, processor

_FOLDER = pathlib.Path(__file__).parent
_SOURCES = (
    *("cpu_kernels.cc", "cpu_attend.cc"),
    *("cpu_training.cc", "cpu_attention.cc", "cpu_logps.cc"),
)
_HEADERS = ("cpu_kernels.h", "cpu_training.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
_TARGETS = {
    "pr1_jax_attend": "AttendHandler",
    "pr1_jax_project": "ProjectHandler",
    "pr1_jax_project_heads": "ProjectHeadsHandler",
    "pr1_jax_finish_layer": "FinishLayerHandler",
    "pr1_jax_uniform": "UniformHandler",
    "pr1_jax_draw": "DrawHandler",
    # of updates
    "pr1_jax_linear": "LinearHandler",
    "pr1_jax_linear_back": "LinearBackHandler",
    "pr1_jax_mlp": "MlpHandler",
    "pr1_jax_mlp_back": "MlpBackHandler",
    "pr1_jax_split": "SplitHandler",
    "pr1_jax_split_back": "SplitBackHandler",
    "pr1_jax_attention": "AttentionHandler",
    "pr1_jax_attention_back": "AttentionBackHandler",
    "pr1_jax_logps": "LogpsHandler",
    "pr1_jax_logps_back": "LogpsBackHandler",
}


def why_not(dtype: str) -> str:
    """What keeps the kernels from being used on this machine; "" if nothing does.

    Compiles them, if they are not yet.

    Args:
      dtype: of activations.
    """
    if jax.default_backend() != "cpu":
        return f"the device is a {jax.default_backend()}"
    if dtype != "float32":
        return f"model.dtype={dtype} is not float32"
    try:
        library()
    except OSError as error:
        return str(error)
    return ""


# --- Compiling ----------------------------------------------------------------------


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise OSError("no C++ compiler was found (g++, clang++ or $CXX)")


def build() -> pathlib.Path:
    """The compiled kernels of this machine; compiles them if they are not there.

    Raises:
      OSError: there is no compiler, or it fails; with what it said.
    """
    compiler = _compiler()
    sources = [(_FOLDER / name).read_bytes() for name in _HEADERS + _SOURCES]
    depends = (*sources, *_FLAGS, compiler, platform.machine(), *processor.describe())
    depends += (importlib.metadata.version("jaxlib"),)
    key = hashlib.sha256("\0".join(map(str, depends)).encode()).hexdigest()[:16]
    folder = files.cache_folder()
    path = folder / f"cpu_kernels-{key}.so"
    if path.exists():
        return path
    names = ", ".join(_SOURCES)
    logging.info("compiling %s with %s (once)", names, compiler)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        made = pathlib.Path(inside) / path.name
        include = ("-isystem", jax.ffi.include_dir())
        # All as one, since what they have in common takes longest.
        *first, last = _SOURCES
        others = [word for name in first for word in ("-include", name)]
        command = [compiler, *_FLAGS, *include, *others, last, "-o", str(made)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=_FOLDER
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            said = [line for line in lines if "error" in line] or lines[-1:]
            reason = said[0] if said else f"exit code {done.returncode}"
            raise OSError(f"{compiler} cannot compile {names}: {reason}")
        made.replace(path)  # whole, or not at all
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernels, known to XLA by the names of `_TARGETS`."""
    loaded = ctypes.CDLL(str(build()))
    for name, symbol in _TARGETS.items():
        handler = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return loaded


def call(name: str, shapes, *args, **attributes):
    """Results, float32, of a kernel; with its name in `_TARGETS`, without the prefix."""
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(f"pr1_jax_{name}", out)(*args, **attributes)


def or_empty(x: jax.Array | None) -> jax.Array:
    """What the kernels take for None."""
    return jnp.zeros(0, jnp.float32) if x is None else x


if __name__ == "__main__":  # compiled before they are needed
    print(why_not("float32") or build())
