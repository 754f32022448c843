"""Eight fake CPU devices for all tests, and a tokenizer for some."""

import pytest

from tests.helpers import compiling

compiling.configure(devices=8)


# What takes longest comes first, so that no process has much to do when others are done.
_LONGEST = ("curriculum", "sampler", "notebooks", "soak", "multiprocess", "rl", "bench")


def pytest_collection_modifyitems(items):
    place = {f"{name}_test.py": i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def by_bytes():
    """A tokenizer whose tokens are bytes and tags."""
    from tests.programs.fuzz import files  # which imports JAX

    return files.byte_tokenizer()
