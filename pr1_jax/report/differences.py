"""A config as what differs: from the base it was made from, and between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from pr1_jax import defaults, sizes
from pr1_jax.system import files
from pr1_jax.workdir import folder, old_fields

ABSENT = "(not there)"  # a field that one of two configs does not have


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_text(v) for v in value) + ")"
    return repr(value) if isinstance(value, str) else f"{value}"


def between(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Name and one text a config, of each field in which they are not all equal.

    Fields that older versions wrote have the names that they have today.
    """
    flat = [
        {
            name: _text(value)
            for name, value in old_fields.today(folder.flat(config)).items()
        }
        for config in configs
    ]
    names = sorted({name for config in flat for name in config})
    rows = [(name, *(config.get(name, ABSENT) for config in flat)) for name in names]
    return [row for row in rows if len({*row[1:]}) > 1]


def from_base(config: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """The default config nearest to this one: its name, and what differs from it.

    Returns:
      A name such as `configs/common.py:smoke`, and (field, value, value in the base).
    """
    bases = []
    for size in sizes.SIZES:
        base = defaults.get_config(size, variant=config.get("variant", "structured"))
        differing = between([config, files.plain(base.to_dict())])
        # A field that this version alone has says nothing about the run.
        differing = [row for row in differing if row[1] != ABSENT]
        bases.append((f"configs/common.py{':' + size if size else ''}", differing))
    return min(bases, key=lambda base: len(base[1]))
