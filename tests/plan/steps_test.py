"""Which decode steps the plan prices."""

import jax
import pytest

from configs import rl_planned
from pr1_jax.plan import costs, programs, timing


@pytest.mark.parametrize("planned", [True, False])
def test_steps_of_planned_blocks_are_of_each_number_of_paths(planned):
    config = rl_planned.get_config("smoke")
    config.rollout.planned, config.kernels = planned, "xla"
    config.data.task = f"partner:paths=4,planned={int(planned)}"
    made = programs.build(config, jax.devices()[:1])
    _, _, *steps = timing.works(made, costs.Lengths(20, 60, 76))
    names = [work.name.partition(" rows in ")[2] for work in steps]
    numbers = (2, 3, 4) if planned else (4,)
    assert names == ["main streams", *(f"blocks of {n}" for n in numbers)]
    flops = [work.flops for work in steps]
    assert flops == sorted(flops) and len({*flops}) == len(flops)
