"""The rotary positions that a config.json states, read and written.

They stand in `rope_scaling` with `rope_theta` beside it, or since `transformers` 5 both
in `rope_parameters`. As there, `rope_scaling` replaces the other where both are given,
`type` is an older name of `rope_type`, and `original_max_position_embeddings` beside
these objects goes before the one inside.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pr1_jax.model.config import ModelConfig
from pr1_jax.model.rope import Linear, Llama3, Scaling, Yarn, paper_attention_factor

_TYPES = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
_BASE = 10_000.0  # where none is stated
_FIRST_LENGTH = "original_max_position_embeddings"

# Far beyond any in use, and float32 holds every product of them.
_is_number = lambda x, least: type(x) in (int, float) and least <= x <= 1e6
_POSITIVE = "a number from 0.000001 to 1,000,000", lambda x: _is_number(x, 1e-6)
# Field -> what its value is to be, and whether it is that.
_FIELDS = {
    "factor": ("a number from 1 to 1,000,000", lambda x: _is_number(x, 1)),
    _FIRST_LENGTH: (
        "a whole number from 1",
        lambda x: type(x) is int and 0 < x < 2**31,
    ),
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "attention_factor": _POSITIVE,
    "mscale": _POSITIVE,
    "mscale_all_dim": _POSITIVE,
    "truncate": ("true or false", lambda x: type(x) is bool),
}
_ZERO_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read(file: Path, raw: Mapping[str, Any]) -> tuple[float, Scaling | None]:
    """Base and scaling of the rotary positions of a config.json.

    Args:
      file: named in errors. raw: what it holds; its fields outside the rotary settings
        have been checked.

    Raises:
      ValueError: a type that the model does not compute, or a field that is missing or
        of the wrong kind; names the field and its value.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(name) or {}
    try:
        kind = _type_of(given)
        base = given.get("rope_theta", raw.get("rope_theta", _BASE))
        if type(base) not in (int, float) or not 0 < base < 1e30:
            raise ValueError(f"rope_theta={base!r:.200} is not a positive number")
        if kind == "default":
            return float(base), None
        if base <= 1:
            raise ValueError(f"rope_theta={base} of {kind} is not greater than 1")
        return float(base), _scaling(_TYPES[kind], _values(given, raw))
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from error


def written(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read` turns into a model's rotary positions."""
    base = {"rope_theta": config.rope_base}
    if config.rope_scaling is None:
        return base
    fields = dataclasses.asdict(config.rope_scaling)
    stated = {name: value for name, value in fields.items() if value is not None}
    # Not as `rope_parameters`: transformers 4 does not know them.
    return base | {"rope_scaling": stated}


def _type_of(given: Mapping[str, Any]) -> str:
    """The type that the rotary settings name; ValueError if it is not computed here."""
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{nested[0]}={given[nested[0]]!r:.200} is of one kind of layer; supported "
            "is one setting for all layers"
        )
    share = given.get("partial_rotary_factor", 1)
    if share != 1:
        raise ValueError(f"partial_rotary_factor={share!r:.200}, supported is 1")
    field = "rope_type" if "rope_type" in given else "type"
    kind, known = given.get(field, "default"), ("default", *_TYPES)
    if kind in known:
        return kind
    way_out = "take a model with one of these"
    if kind == "dynamic":
        way_out = (
            "while no text is longer than max_position_embeddings, default computes "
            "the same and can stand here"
        )
    raise ValueError(f"{field}={kind!r:.200} is none of {', '.join(known)}; {way_out}")


def _values(given: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a scaling that are stated, and what stands for one that is not."""
    values = {name: given[name] for name in _FIELDS if name in given}
    absent = {name: (None, 0) for name in _ZERO_IS_ABSENT}
    absent["attention_factor"] = (None,)
    values = {n: x for n, x in values.items() if x not in absent.get(n, ())}
    if _FIRST_LENGTH in raw:
        values[_FIRST_LENGTH] = raw[_FIRST_LENGTH]
    elif "max_position_embeddings" in raw:
        values.setdefault(_FIRST_LENGTH, raw["max_position_embeddings"])
    return values


def _scaling(kind: type[Scaling], values: Mapping[str, Any]) -> Scaling:
    """A scaling of such values, each checked; those of other types are passed over."""
    fields = dataclasses.fields(kind)
    used = {field.name for field in fields}
    used |= {"mscale", "mscale_all_dim"} if kind is Yarn else set()
    checked = {}
    for name, (what, holds) in _FIELDS.items():
        if name not in used or name not in values:
            continue
        value = values[name]
        if not holds(value):
            raise ValueError(f"{name}={value!r:.200} is not {what}")
        checked[name] = value if name in (_FIRST_LENGTH, "truncate") else float(value)
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in checked:
            raise ValueError(f"lacks {field.name}, {_FIELDS[field.name][0]}")
    scales = [checked.pop(name, None) for name in ("mscale", "mscale_all_dim")]
    if all(scales):
        one, other = (paper_attention_factor(checked["factor"], x) for x in scales)
        checked.setdefault("attention_factor", one / other)
    scaling = kind(**checked)
    _check_order(scaling)
    return scaling


def _check_order(scaling: Scaling) -> None:
    """Raises ValueError unless the limit of high frequencies is the higher one."""
    if isinstance(scaling, Llama3):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if np.float32(high) <= np.float32(low):
            raise ValueError(
                f"high_freq_factor={high} is not greater than low_freq_factor={low}"
            )
    if isinstance(scaling, Yarn) and scaling.beta_fast < scaling.beta_slow:
        raise ValueError(
            f"beta_fast={scaling.beta_fast} is less than beta_slow={scaling.beta_slow}"
        )
