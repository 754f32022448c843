"""The command that plans, and the compilers for devices that are not there."""

import functools
import json
import types

import pytest

from pr1_jax.plan import hardware, memory
from pr1_jax.system import accelerators
from tests.helpers import command

GIB = accelerators.GIB


run = functools.partial(command.run, "pr1_jax.plan")
SMOKE = "--config=configs/rl_alternating.py:smoke"


def test_command_prints_json():
    done = run(SMOKE, "--topology=gpu:h100x4", "--json", "--config.rl.kl_coef=0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["devices"] == 4
    assert memory.REFERENCE in found["memory"]["update"]["parts"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--topology=gpu:h100x8"], "--config is missing"),
        ([SMOKE], "--topology is missing"),
        ([SMOKE, "--topology=v3:2x2"], "--topology=v3:2x2 is not known"),
    ],
)
def test_mistake_is_one_line(args, text):
    done = run(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert text in done.stderr and len(done.stderr.splitlines()) == 1


def test_missing_compiler_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(hardware, "has_tpu_compiler", lambda: False)
    with pytest.raises(ValueError, match=r'pip install "jax\[tpu\]=='):
        hardware.open_devices(hardware.parse_topology("v5e:2x2"))


def test_gpus_are_compiled_for_where_there_is_a_compiler(monkeypatch):
    topology = hardware.parse_topology("gpu:h100x3")
    monkeypatch.setattr(hardware, "has_gpu_compiler", lambda: False)
    flag = "--xla_force_host_platform_device_count=3"
    assert hardware.environment(topology)["XLA_FLAGS"] == flag
    assert [d.platform for d in hardware.open_devices(topology)] == 3 * ["cpu"]
    monkeypatch.setattr(hardware, "has_gpu_compiler", lambda: True)
    asked = {}
    description = lambda **kwargs: (
        asked.update(kwargs) or types.SimpleNamespace(devices=["gpu"] * 3)
    )
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", description)
    assert hardware.open_devices(topology) == ["gpu"] * 3
    assert (asked["platform"], asked["topology"]) == ("cuda", "1x1x3")
    assert "count=3" not in hardware.environment(topology)["XLA_FLAGS"]


@pytest.mark.skipif(
    not hardware.has_gpu_compiler(), reason='needs pip install "jax[cuda12]"'
)
def test_compiles_for_gpus_that_are_not_there():
    done = run(SMOKE, "--topology=gpu:h100x4", "--json", "--nolargest")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiled"] and len(found["compile_sec"]) == 4
    assert any("not tried" in line for line in found["assumptions"])


@pytest.mark.skipif(
    not hardware.has_gpu_compiler(), reason='needs pip install "jax[cuda12]"'
)
def test_the_gpu_compiler_tells_the_time_of_programs():
    done = run(SMOKE, "--topology=gpu:h100x4", "--json", "--schedule")
    assert done.returncode == 0, done.stderr
    for program in json.loads(done.stdout)["programs"].values():
        assert sum(program["seconds_by_group"].values()) == pytest.approx(
            program["seconds"]
        )
        sources = {x["source"] for x in program["largest"]}
        assert "peak" in sources or "cycles" in sources
        assert not program["loops_of_unknown_length"]


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason='needs libtpu: pip install "jax[tpu]"'
)
def test_compiles_for_a_tpu_that_is_not_there():
    sizes = "--config.model.width=256", "--config.model.head_dim=128"
    done = run(SMOKE, "--topology=v5e:2x4", "--json", "--nolargest", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Updates of SFT and RL, prefill, decode.
    assert found["compiled"] and len(found["compile_sec"]) == 4
    assert found["limit_bytes"] == 15.75 * GIB
    for moment in found["memory"].values():
        assert moment["total"] == sum(moment["parts"].values())
        assert all(size >= 0 for size in moment["parts"].values())
    # Parameters, gradients and both moments at least, in float32.
    assert found["memory"]["update"]["total"] > 16 * found["parameters"]


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason='needs libtpu: pip install "jax[tpu]"'
)
def test_the_tpu_compiler_tells_the_time_of_programs():
    sizes = "--config.model.width=256", "--config.model.head_dim=128"
    done = run(SMOKE, "--topology=v5e:2x4", "--json", "--schedule", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["programs"]
    assert len(found) == 4
    for program in found.values():
        groups = program["seconds_by_group"]
        assert sum(groups.values()) == pytest.approx(program["seconds"])
        assert groups["attention"] > 0 and groups["projections"] > 0
        assert program["seconds"] > program["seconds_at_bandwidth"]
        assert not program["loops_of_unknown_length"]
