"""What a search found: for JSON, and as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.text

from pr1_jax.plan.prices import Prices, describe
from pr1_jax.plan.search import KINDS, SAMPLING, UPDATE, Candidate, Found, Setting
from pr1_jax.system.accelerators import GIB
from pr1_jax.system.tables import Table

_SHOWN = 12  # of what was refused; all of it is in the JSON


def overrides(setting: Setting, given: Setting, own: Setting) -> list[str]:
    """What to write behind a command for a setting, where it differs from a config's.

    Args:
      given: the config's fields. own: the same with numbers in place of -1.
    """
    mesh = [name for name in given if name.startswith("mesh.")]
    same = own if all(setting[name] == own[name] for name in mesh) else given
    changed = {name: x for name, x in setting.items() if same[name] != x}
    return [f"--config.{name}={value}" for name, value in changed.items()]


def data(found: Found, prices: Prices) -> dict[str, Any]:
    """All of it for JSON. Sizes are bytes of one device, times seconds of an RL step."""
    experiment = prices.experiment
    return {
        "config": experiment.config.name,
        "topology": prices.topology.text,
        "complete": found.complete,
        "confirmed": found.confirmed,
        "fastest": found.best and _candidate(found.best, prices),
        "own": found.own and _candidate(found.own, prices),
        "candidates": [_candidate(x, prices) for x in found.candidates],
        "refused": [
            {"setting": dict(setting), "why": why} for setting, why in found.refused
        ],
        "left": [{"setting": dict(setting), "why": why} for setting, why in found.left],
        "compiled_programs": prices.compiled,
        "assumptions": prices.assumptions,
    }


def _candidate(candidate: Candidate, prices: Prices) -> dict[str, Any]:
    return {
        "setting": dict(candidate.setting),
        "overrides": overrides(candidate.setting, prices.given, prices.own),
        "why_not": candidate.why,
        "seconds": candidate.seconds,
        "step_seconds": None if candidate.why else candidate.total,
        "memory": candidate.memory,
    }


def show(found: Found, prices: Prices) -> rich.console.Group:
    """The fastest and the runners-up, what was refused, and what to copy."""
    topology = prices.topology
    title = (
        f"{prices.experiment.config.name} on {topology.text}, {topology.hardware.name}"
    )
    parts = [rich.text.Text(title + "\n", style="bold")]
    if found.candidates:
        parts.append(candidates_table(found).terminal())
    parts.append(verdict(found, prices))
    if found.left:
        rows = [{"mesh": _mesh(x), "why not": why} for x, why in found.left]
        parts.append(Table("Meshes that were left", rows).terminal())
    if found.refused:
        rows = [{"setting": _text(x), "why not": why} for x, why in found.refused]
        more = max(len(rows) - _SHOWN, 0)
        note = f"and {more} more (--json)" if more else ""
        table = Table("What cannot be taken", rows[:_SHOWN], note=note)
        parts.append(table.terminal())
    notes = "".join(f"* {line}\n" for line in prices.assumptions)
    return rich.console.Group(*parts, rich.text.Text(notes, style="dim"))


def candidates_table(found: Found) -> Table:
    """Seconds of an RL step of the best settings, and the memory that they need."""
    rows = []
    for x in found.candidates:
        setting = x.setting
        remat = setting["model.remat_policy"] if setting["model.remat"] else "none"
        row = {
            "data × fsdp × tensor": _mesh(setting),
            "micro-batch": setting["rl.micro_batch_size"],
            "remat": remat,
            "chunk": setting["model.logits_chunk"] or "none",
            "rows": setting["rollout.rows"],
        }
        row |= {f"{name} sec": value for name, value in x.seconds.items()}
        row |= {"step sec": x.total, "GiB": max(x.memory.values()) / GIB}
        rows.append(row | {"": "as the config is" if x is found.own else ""})
    return Table("An RL step, the fastest setting of each mesh", rows)


def verdict(found: Found, prices: Prices) -> rich.text.Text:
    """The fastest, how much faster it is, and the overrides for it."""
    lines, best, own = [], found.best, found.own
    if not found.complete:
        lines.append("interrupted; the same command goes on from what was compiled")
    if own and own.why:
        lines.append(f"as the config is: {own.why}")
    if best:
        changes = overrides(best.setting, prices.given, prices.own)
        faster = f", {own.total / best.total:.2f} times as fast as the config is"
        faster = faster if own and not own.why else ""
        checked = "; compiled in full, it fits" if found.confirmed else ""
        lines.append(f"fastest: {best.total:,.4g} s a step{faster}{checked}")
        lines.append(" ".join(changes) or "nothing to change: it is the config's own")
    elif found.complete:
        lines.append("NOTHING FITS: see below; take more devices, or shorter responses")
    style = "green" if best else "red"
    return rich.text.Text("\n".join(lines) + "\n", style=style)


def _mesh(setting: Mapping[str, Any]) -> str:
    return " × ".join(
        str(setting[f"mesh.{axis}"]) for axis in ("data", "fsdp", "tensor")
    )


def _text(setting: Setting) -> str:
    kinds: Sequence[str] = [
        kind
        for kind, name in zip(
            KINDS, ("rl.micro_batch_size", "rollout.rows"), strict=True
        )
        if name in setting
    ]
    return describe(SAMPLING if kinds == [SAMPLING] else UPDATE, setting)
