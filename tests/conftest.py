"""Eight fake CPU devices for all tests, and a tokenizer for some.

The flags are read by JAX when it is first imported.
"""

import os

import pytest

_FLAG = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of what tests take: programs are small, and few optimizations
# are made. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` makes them all.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()


# What takes longest comes first, so that no process has much to do when others are done.
_LONGEST = ("curriculum", "sampler", "notebooks", "soak", "multiprocess", "rl", "bench")


def pytest_collection_modifyitems(items):
    place = {f"{name}_test.py": i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def by_bytes():
    """A tokenizer whose tokens are bytes and tags."""
    from fuzz import files  # which imports JAX

    return files.byte_tokenizer()
