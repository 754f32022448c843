"""The C++ kernels are compiled once, and not needed."""

import jax
import pytest

from pr1_jax.kernels.cpu import library
from pr1_jax.model.backend import choose
from pr1_jax.model.config import ModelConfig
from pr1_jax.model.params import init_params, unbox
from pr1_jax.model.xla import Xla
from pr1_jax.sampler.sampler import Sampler
from pr1_jax.sampler.schedule import Batching
from pr1_jax.sampler.settings import Settings
from tests.helpers.tiny import VOCAB, needs_kernels

SIZES = ("num_layers", "num_heads", "num_kv_heads")
CONFIG = ModelConfig(24, width=8, head_dim=8, mlp_width=8, **dict.fromkeys(SIZES, 1))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def test_without_a_compiler_xla_decodes(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    backend = choose(CONFIG)
    assert backend == Xla(CONFIG)
    settings = Settings(max_prompt_tokens=4, max_response_tokens=6)
    params = unbox(init_params(CONFIG, jax.random.key(0)))
    sampler = Sampler(backend, VOCAB, settings, Batching(rows=2))
    (response,), _ = sampler.sample(params, [[3, 4]], 1, jax.random.key(0))
    assert 1 <= len(response.tokens) <= 6
    with pytest.raises(ValueError, match="kernels=cpu: no C.* was found"):
        choose(CONFIG, "cpu")


@pytest.mark.parametrize(
    "said, shown",
    [
        ("fatal: out of luck", "fatal: out of luck"),
        (
            "In function f:\\nx.cc:1: error: first\\nx.cc:2: error: second\\n  ~~~^~~",
            "x.cc:1: error: first",
        ),
    ],
)
def test_a_compiler_that_fails_is_named_and_leaves_nothing(
    fresh, monkeypatch, said, shown
):
    """Of several errors the first is shown."""
    broken = fresh / "broken-g++"
    broken.write_text(f"#!/bin/sh\nprintf '{said}\\n' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    why = library.why_not("float32")
    assert "broken-g++ cannot compile" in why and why.endswith(f": {shown}")
    assert list((fresh / "cache" / "pr1_jax").iterdir()) == []


def test_a_compiler_that_is_there_compiles_them():
    """Else all tests of the kernels would be skipped, and none fail."""
    try:
        compiler = library._compiler()
    except OSError as error:
        pytest.skip(str(error))
    assert library.why_not("float32") == "", compiler


@needs_kernels
def test_compiled_once(fresh):
    path = library.build()
    made = path.stat().st_mtime_ns
    assert library.build() == path and path.stat().st_mtime_ns == made
    assert [x.name for x in path.parent.iterdir()] == [path.name]
