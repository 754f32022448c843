"""What is run: every cell of the study, by name.

A cell is one run of `pr1_jax.main` a seed: a config of `configs/`, what it changes of it,
and the cell whose last parameters it starts from. All cells of a seed share the seed of
data and draws, so that they train on the same problems in the same order, and all are
evaluated on the same held-out problems.

The task was chosen before the study (sizes `embedded` and `smoke`): half of the cold-start
traces have a block and half search one after another (`data.task=search:block_share=0.5`), so that
both habits are known and the reward decides between them. Accuracy counts on hard
problems, which SFT has not seen. `TRIED` says what was dropped, and why.
"""

import dataclasses
from collections.abc import Mapping, Sequence

SIZES = ("embedded", "smoke", "smollm2")
SYNTHETIC = SIZES[:2]  # on problems that code makes, from random parameters
EXPERIMENTS = ("rewards", "curriculum", "position", "scaffold", "shortcuts")

TRIED = {
    "data.task=search:block_share=1.0, the default": (
        "Every response has a block after SFT and keeps it in RL, whatever the reward: "
        "the bonus for blocks then only scales rewards, which cannot be told apart."
    ),
    "data.task=search:block_share=0.95": (
        "With the accuracy reward RL dropped the blocks: traces without one never give "
        "up, those with one mostly do, so that the few without search better."
    ),
    "positions of blocks on the traces of the other experiments": (
        "Their blocks stand at the very start of a response: there is nothing to rise "
        "from. The position cell has SFT traces of its own, in which half of the blocks "
        "come after a search of one to three numbers (late_share=0.5)."
    ),
    "clip_high=0.2 with the accuracy reward, 0.28 with the alternating one": (
        "So it was published, but then the clip differs along with the reward: here all "
        "RL cells have 0.28."
    ),
    "no cold start from random parameters": (
        "A random model answers nothing, so that there is no reward to learn from. The "
        "paper starts from a pretrained model; here one that was trained on traces "
        "without blocks, which searches but knows no tags, stands for it."
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run a seed.

    Attributes:
      title: in tables and figures.
      kind: `sft`, `rl` or `evaluate`.
      config: name of a file in `configs/`.
      start: the cell whose last parameters it starts from; "" = its own first ones.
      changes: of config fields. embedded: further ones of that size.
      sizes: those that it is run at.
      minutes: about, on two quiet CPU cores, at size `embedded`.
    """

    name: str
    title: str
    kind: str
    config: str
    start: str = ""
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    embedded: Mapping[str, object] = dataclasses.field(default_factory=dict)
    sizes: tuple[str, ...] = SIZES
    minutes: float = 6.0


def _sft(name: str, title: str, config: str = "sft_structured", **kwargs) -> Cell:
    return Cell(name, title, "sft", config, minutes=4.0, **kwargs)


def _rl(name: str, title: str, config: str, start: str = "sft", **changes) -> Cell:
    return Cell(name, title, "rl", config, start, changes)


_EASY = {"data.rl": "embedded:easy", "rl.steps": 20}  # published: 35 steps of 335
_CAUSAL = {"variant": "causal"}
_FEW = {"eval.modes": ("causal",)}
_FEW |= {"data.eval": "easy=embedded:easy@1,hard=embedded:hard@1"}


def _easy(name: str, title: str, start: str, variant: str) -> Cell:
    changes = {"variant": variant}
    return Cell(
        name, title, "rl", "rl_easy", start, changes, embedded=_EASY, minutes=2.0
    )


def _as_published(name: str, title: str, start: str) -> Cell:
    return Cell(
        name, title, "evaluate", "evaluate", start, _FEW, sizes=SYNTHETIC, minutes=1.0
    )


CELLS = {
    cell.name: cell
    for cell in (
        _sft("sft", "after SFT"),
        _rl("accuracy", "accuracy only", "rl_accuracy"),
        _rl("alternating", "alternating", "rl_alternating"),
        _rl("parallel_only", "parallel only", "rl_parallel_only"),
        _sft(
            "sft_sequential",
            "SFT without blocks",
            "grpo_sequential",
            changes={"data.task": "search:block_share=0.0"},
            sizes=SYNTHETIC,
        ),
        _rl(
            "sequential",
            "sequential GRPO",
            "grpo_sequential",
            "sft_sequential",
            **{"data.task": "search:block_share=0.0"},
        ),
        _rl("no_cold_start", "no cold start", "rl_alternating", "sft_sequential"),
        _sft("sft_causal", "causal, after SFT", "sft_causal"),
        _rl(
            "causal_without_easy",
            "causal, no easy RL",
            "rl_accuracy",
            "sft_causal",
            **_CAUSAL,
        ),
        _easy("causal_easy", "causal, easy RL only", "sft_causal", "causal"),
        _rl(
            "causal_with_easy",
            "causal, easy RL first",
            "rl_accuracy",
            "causal_easy",
            **_CAUSAL,
        ),
        _easy("structured_easy", "structured, easy RL only", "sft", "structured"),
        _rl(
            "structured_with_easy",
            "structured, easy RL first",
            "rl_accuracy",
            "structured_easy",
        ),
        _sft(
            "sft_late",
            "late blocks, after SFT",
            changes={"data.task": "search:block_share=0.5,late_share=0.5"},
            sizes=SYNTHETIC,
        ),
        dataclasses.replace(
            _rl("late", "late blocks, alternating", "rl_alternating", "sft_late"),
            sizes=SYNTHETIC,
        ),
        _rl("scaffold", "scaffold", "rl_scaffold"),
        _rl(
            "forced",
            "forced tokens in the loss",
            "rl_alternating",
            **{"rl.train_on_forced": True},
        ),
        _rl(
            "causal_sampling",
            "causal sampling",
            "rl_alternating",
            **{"rollout.shortcut": "causal_after_block"},
        ),
        _as_published(
            "causal_sampling_published",
            "causal sampling, sampled so too",
            "causal_sampling",
        ),
        _as_published(
            "alternating_published", "alternating, sampled causally", "alternating"
        ),
    )
}

# What the tables and figures of an experiment show; what these start from is run too.
MEMBERS: dict[str, tuple[str, ...]] = {
    "rewards": ("sft", "accuracy", "alternating", "parallel_only", "sequential"),
    "curriculum": (
        "alternating",
        "no_cold_start",
        "sft_causal",
        "causal_without_easy",
        "causal_easy",
        "causal_with_easy",
        "accuracy",
        "structured_easy",
        "structured_with_easy",
    ),
    "position": ("alternating", "sft_late", "late"),
    "scaffold": ("scaffold", "accuracy", "sequential"),
    "shortcuts": (
        "alternating",
        "forced",
        "causal_sampling",
        "causal_sampling_published",
        "alternating_published",
    ),
}


def start_of(cell: Cell, size: str) -> str:
    """The cell that `cell` starts from at this size; a real model starts as it is."""
    return cell.start if cell.start and size in CELLS[cell.start].sizes else ""


def with_starts(names: Sequence[str], size: str) -> list[Cell]:
    """Cells of these names that this size has, with all that they start from before."""
    chosen: dict[str, Cell] = {}

    def add(name: str) -> None:
        cell = CELLS[name]
        if size in cell.sizes and name not in chosen:
            if start := start_of(cell, size):
                add(start)
            chosen[name] = cell

    for name in names:
        add(name)
    return list(chosen.values())


def config_argument(cell: Cell, size: str) -> str:
    """What `--config` of `pr1_jax.main` is."""
    variant = "" if size == "embedded" else f":{size}"
    return f"configs/{cell.config}.py{variant}"


def changes(cell: Cell, size: str, seed: int) -> dict[str, object]:
    """All fields that a run of the cell changes, by dotted name."""
    changed: dict[str, object] = {
        "seed": seed,
        "data.seed": seed,
        "eval.banned": False,
        "rl.clip_high": 0.28,
        "checkpoint.keep": 1,
        "checkpoint.keep_best": 0,
        # XLA everywhere: results must not depend on whether there is a C++ compiler.
        "kernels": "xla",
        "rl.shared_prompt_tokens": (),
    }
    if cell.kind != "evaluate":
        changed["stages"] = (cell.kind,)
    if size in SYNTHETIC:
        changed |= {"data.task": "search:block_share=0.5", "data.eval": "embedded:hard"}
    changed |= cell.changes
    return changed | (cell.embedded if size == "embedded" else {})
