r"""What a config needs on accelerators that are not there: `python -m pr1_jax.plan`.

    python -m pr1_jax.plan --config=configs/rl_alternating.py:qwen3_4b \
        --topology=v5e:4x4
    python -m pr1_jax.plan … --schedule      # how long the programs take, and where
    python -m pr1_jax.plan … --search        # the fastest setting that fits

The TPU compiler compiles the real update, prefill and decode step on any machine; no
weights, data or TPU are needed, but `pip install "jax[tpu]"`. For GPUs (`gpu:h100x8`)
XLA's compiler does the same with `pip install "jax[cuda12]"`, and without it memory is
arithmetic. The exit code is 0 where the config fits, 1 where it does
not, 2 for a mistake.
"""

import json
import os
import sys

from absl import flags
from ml_collections import config_flags

from pr1_jax.plan import hardware
from pr1_jax.system import cli
from pr1_jax.workdir import old_fields

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, `path.py` or `path.py:VARIANT`.", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v5e:4x4, v5p:2x2x2, … or gpu:h100x8."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_PROMPT = flags.DEFINE_integer(
    "prompt_tokens", None, "Mean length of prompts; default half of the longest."
)
_RESPONSE = flags.DEFINE_integer(
    "response_tokens", None, "Mean length of responses; default half of the longest."
)
_LARGEST = flags.DEFINE_bool(
    "largest", True, "Also look for the largest batches, which compiles more."
)
_SCHEDULE = flags.DEFINE_bool(
    "schedule",
    False,
    "Instead of memory, the compiler's estimate of each program's time.",
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Instead, look for the fastest mesh, micro-batch, remat policy, chunk and rows.",
)
_SEARCH_CACHE = flags.DEFINE_string(
    "search_cache",
    "",
    "File that keeps what --search compiled; default in the user's cache folder.",
)
_CONFIRM = flags.DEFINE_bool(
    "confirm", True, "Let --search compile the fastest setting in full at its end."
)


def main(argv: list[str]) -> None:
    """Prints the plan."""
    del argv
    cli.require([_TOPOLOGY])
    try:
        topology = hardware.parse_topology(_TOPOLOGY.value)
    except ValueError as error:
        cli.stop(error)
    times = _SCHEDULE.value or _SEARCH.value
    for name, value in hardware.environment(topology, times=times).items():
        if name == "XLA_FLAGS":  # of a flag that is given twice the last counts
            os.environ[name] = f"{os.environ.get(name, '')} {value}"
        os.environ.setdefault(name, value)
    # After the environment, which JAX reads when it is first imported.
    import rich.console

    from pr1_jax.plan import planning, programs, report, timing

    say = lambda text: print(f"{topology.text}: {text} …", file=sys.stderr, flush=True)
    means = {"prompt_tokens": _PROMPT.value, "response_tokens": _RESPONSE.value}
    exit_code = 0
    try:
        devices = hardware.open_devices(topology)
        if _SEARCH.value:
            data, shown, exit_code = _search(topology, devices, means, say)
        elif _SCHEDULE.value:
            timings = timing.measure(
                programs.build(_CONFIG.value, devices), topology, **means, say=say
            )
            data, shown = timings.data(), report.show_timings(timings)
        else:
            plan = planning.make(
                *(_CONFIG.value, topology, devices),
                **means,
                find_largest=_LARGEST.value,
                say=say,
            )
            data, shown, exit_code = plan.data(), report.show(plan), int(not plan.fits)
    except (ValueError, OSError) as error:
        cli.stop(error)
    if _JSON.value:
        print(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        width = None if sys.stdout.isatty() else 120
        rich.console.Console(width=width).print(shown)
    sys.exit(exit_code)


def _search(topology, devices, means, say) -> tuple:
    """What `--search` prints, as data and as tables, and the exit code."""
    from pr1_jax.plan import found as found_
    from pr1_jax.plan import prices, search

    cache = prices.Cache(_SEARCH_CACHE.value or prices.default_cache())
    given = {"cache": cache, **means, "say": say}
    space = prices.Prices(_CONFIG.value, topology, devices, **given)
    found = search.Found()
    try:
        search.search(space, confirm=_CONFIRM.value, found=found)
    except KeyboardInterrupt:
        say(f"interrupted; {cache.path} keeps what was compiled")
    exit_code = 130 if not found.complete else int(found.best is None)
    return found_.data(found, space), found_.show(found, space), exit_code


if __name__ == "__main__":
    cli.run(main, config=_CONFIG, hint=old_fields.hint)
