"""What is run: every cell of the study, by name.

A cell is one run of `pr1_jax.main` a seed: a config of `configs/`, what it changes of it,
and the cell whose last parameters it starts from. All runs of RL are drawn a little towards where they
start, as the default config is (`rl.kl_coef`). All cells of a seed share the seed of
data and draws, so that they train on the same problems in the same order, and all are
evaluated on the same held-out problems, at their own deadline.

The task is `partner` (`pr1_jax.data.partner`), whose optimum is known (`optimum`). Half
of the cold-start traces have a block, so that both habits are known and the reward
decides between them. Cells are named by reward, deadline and labels: `accuracy_43_plain`
has a deadline of 43 sequential steps and paths without labels, as published.

Where there is a C++ compiler its kernels are used (`kernels`); without one runs take
longer and round otherwise, so that they draw other responses.

`FEW` seeds draw a curve, `MANY` are needed for a verdict (`verdicts`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

SIZES = ("embedded", "smoke")
FEW, MANY = 3, 6  # seeds

# What runs cost (at the size `embedded`; `smoke` has its own).
SFT = {"sft.steps": 1000, "sft.batch_size": 64, "sft.lr": 3e-3}
RL = {"rl.steps": 40, "rl.prompts_per_step": 32, "rl.group_size": 8, "rl.lr": 3e-4}
RL |= {"rl.lr_schedule": "constant"}
EASY_RL = RL | {"rl.steps": 8}  # published: 35 steps before 300
AFTER_EASY_RL = RL | {"rl.steps": 32}  # so that all of a comparison have as many steps
LONG_RL = RL | {"rl.steps": 120}  # of four paths, and of two without a habit to divide

# At the first a lone search sees most; at the second and third two paths do, even from
# random rows; at the fourth and fifth only paths that divide the list (`optimum`). At the
# last a lone search sees as much as these.
DEADLINES = (24, 40, 43, 53, 57, 66)
PAY, FAIL = 43, 66  # blocks pay at one, and do not at the other
BETWEEN = (53, 57)  # only divided work pays
FOUR_PATHS = 28  # the deadline of blocks with four paths
# Of planned blocks. At the first a lone search sees most, at the second four paths, at the
# third two, and at the last two see as much as a lone search (`optimum.best_planned`).
PLANNED = (28, 40, 50, 66)
MEAN_REWARDS = "mean_rewards"
LABELS = ("labels", "plain")

# What all runs change of their config. Reserves are what answers of the task need, so that
# a block may use its deadline as `optimum` says.
COMMON = {
    "data.task": "partner",
    "data.eval": "embedded:hard",
    "eval.problems": 1024,
    "rollout.max_prompt_tokens": 28,
    "rollout.max_response_tokens": 96,
    "eval.samples": 1,
    "eval.banned": False,
    "rl.clip_high": 0.28,  # published: 0.2 with the accuracy reward; so rewards alone differ
    "rollout.min_path_tokens": 10,
    "rollout.summary_reserve": 2,
    "rollout.answer_reserve": 3,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "report.traces": 0,
}
# Of a run: to begin and to evaluate; by step and its deadline.
_RL_MINUTES = 0.4, 5.5e-4
_SEARCH_TOKENS = {2: 31, 4: 16}  # of a path that sees its share of the list
_TAG_TOKENS = 2


class Reward(NamedTuple):
    """What RL is rewarded for; `share` of its steps pay a bonus for blocks."""

    title: str
    config: str
    share: float = 0.0
    changes: Mapping[str, object] = {}


# The published window is 10 steps of 300, the last 2 of which pay a bonus. A miniature
# learns in tens of steps, in which such a window hardly opens, so it is 5 or 2 steps long.
_WINDOWS = {share: {"reward.window": round(1 / share)} for share in (0.2, 0.5)}
REWARDS = {
    "accuracy": Reward("accuracy", "rl_accuracy"),
    **{
        f"alternating{100 * share:.0f}": Reward(
            f"alternating, {100 * share:.0f} %",
            "rl_alternating",
            share,
            window | {"reward.tiered_steps": 1},
        )
        for share, window in _WINDOWS.items()
    },
    "parallel_only": Reward("parallel only", "rl_parallel_only", 1.0),
    # Half of the longest critical path saved is paid as much as the bonus for a block.
    "latency": Reward(
        "accuracy and latency", "rl_accuracy", changes={"reward.latency_coef": 0.4}
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run a seed.

    Attributes:
      title: in tables and figures.
      kind: `sft`, `rl` or `evaluate`.
      config: name of a file in `configs/`.
      start: the cell whose last parameters it starts from; "" = random ones.
      changes: of config fields. cost: further ones of the size `embedded`.
      deadline: in sequential steps; 0 = none.
      labels: whether paths have labels. paths: of a block, at most where it is planned.
      planned: whether the model plans a block's paths.
      seeds: that it is run at, the first of those asked for.
      minutes: about, on a CPU core, at the size `embedded`.
    """

    name: str
    title: str
    kind: str
    config: str
    start: str = ""
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, object] = dataclasses.field(default_factory=dict)
    deadline: int = 0
    labels: bool = False
    paths: int = 2
    planned: bool = False
    seeds: int = MANY
    minutes: float = 0.4


def named(reward: str, deadline: int, labels: str, *, then: bool = False) -> str:
    """The name of an RL cell; `then` of the accuracy stage that goes on from it."""
    return f"{reward}_{deadline}_{labels}" + ("_then_accuracy" if then else "")


def _sft(
    name: str, title: str, task: str = "", config: str = "sft_structured", **more
) -> Cell:
    changes = {"data.task": f"partner:{task}"} if task else {}
    more |= {"changes": changes, "cost": SFT, "minutes": 4.8}
    return Cell(name, title, "sft", config, **more)


def _rl(name: str, reward: str, title: str = "", changes=(), **more) -> Cell:
    """A cell with one of `REWARDS`, named in its title with deadline and labels."""
    of, labels = REWARDS[reward], more.get("labels", False)
    title = f"{title or of.title}, {more['deadline']} steps{', labels' * labels}"
    given = {"cost": RL, "config": of.config, "changes": of.changes | dict(changes)}
    given |= more
    begin, step = _RL_MINUTES
    minutes = begin + step * given["cost"]["rl.steps"] * given["deadline"]
    return Cell(name, title, "rl", minutes=minutes, **given)


_NO_HABIT = "own_row_share=0.0"  # of paths, to begin with the row of their own number

# What verdicts hang on, beside accuracy alone, which is everywhere.
_DECIDING = {
    *((BETWEEN[0], "labels", reward) for reward in ("alternating50", "latency")),
    *((deadline, "labels", "parallel_only") for deadline in BETWEEN),
    *((BETWEEN[0], "plain", reward) for reward in ("alternating50", "parallel_only")),
    (BETWEEN[1], "plain", "parallel_only"),
    *((PAY, "plain", reward) for reward in ("alternating20", "parallel_only")),
    *((FAIL, "plain", reward) for reward in REWARDS),
}
# Rewards of the scaffold's first stage by deadline and labels.
_ALWAYS = ("accuracy", "parallel_only")
SCAFFOLDS = {
    (BETWEEN[0], "labels"): ("accuracy", "alternating50", "parallel_only", "latency"),
    (BETWEEN[1], "labels"): _ALWAYS,
    (BETWEEN[0], "plain"): _ALWAYS,
    (FAIL, "plain"): ("accuracy", "alternating50"),
    (PAY, "plain"): ("accuracy",),
}


def _phase() -> Iterator[Cell]:
    """Rewards by deadlines, and accuracy alone from where some of them ended."""
    for deadline in DEADLINES:
        for labels in LABELS:
            given = {"deadline": deadline, "labels": labels == "labels"}
            for reward in REWARDS:
                key = deadline, labels, reward
                decides = key in _DECIDING or reward == "accuracy"
                of = {"start": f"sft_{labels}", "seeds": MANY if decides else FEW}
                yield _rl(named(reward, deadline, labels), reward, **of, **given)
            for first in SCAFFOLDS.get((deadline, labels), ()):
                yield _rl(
                    named(first, deadline, labels, then=True),
                    "accuracy",
                    f"{REWARDS[first].title}, then accuracy",
                    start=named(first, deadline, labels),
                    **given,
                )


def _mean_rewards() -> Iterator[Cell]:
    """A bonus whose advantages are not divided by the spread of their group."""
    of = REWARDS["alternating50"]
    changes = of.changes | {"rl.normalize_std": False}
    given = {"start": "sft_plain", "changes": changes, "deadline": FAIL}
    title = f"{of.title}, not normalised"
    yield _rl(MEAN_REWARDS, "alternating50", title, **given)


def _division() -> Iterator[Cell]:
    """Paths whose traces have no habit, and four paths."""
    even = {"labels": True, "start": "sft_even", "deadline": PAY, "cost": LONG_RL}
    yield _sft("sft_even", "after SFT without a habit", _NO_HABIT, labels=True)
    yield _rl(f"accuracy_{PAY}_even", "accuracy", "accuracy, no habit", **even)
    for labels in LABELS:
        given = {"labels": labels == "labels", "paths": 4}
        title = f"after SFT, four paths{', labels' * given['labels']}"
        yield _sft(f"sft4_{labels}", title, "paths=4", **given)
        given |= {"deadline": FOUR_PATHS, "cost": LONG_RL}
        given |= {"changes": {"data.task": "partner:paths=4"}}  # lists of four rows
        name, title = f"accuracy4_{FOUR_PATHS}_{labels}", "accuracy, four paths"
        yield _rl(name, "accuracy", title, start=f"sft4_{labels}", **given)


def planned_name(reward: str, deadline: int) -> str:
    """The name of a cell with planned blocks."""
    return f"{reward}_planned_{deadline}"


def labelled_name(deadline: int) -> str:
    """The name of a cell with blocks of four labelled paths without plans."""
    return f"accuracy4_{deadline}_labels"


def _planned() -> Iterator[Cell]:
    """Blocks whose paths the model plans, and blocks of four labelled paths beside them.

    Without plans four paths take longer to divide the list: as in `division` they have
    three times the steps of RL. That of the first deadline is a cell there.
    """
    rows, plans = "paths=4", "paths=4,planned=1"
    task_of = lambda task: {"data.task": f"partner:{task}"}
    of = {"config": "rl_planned", "labels": True, "paths": 4, "planned": True}
    yield _sft("sft4_planned", "after SFT, planned", plans, **of)
    plain = {"labels": True, "paths": 4, "start": "sft4_labels", "cost": LONG_RL}
    of |= {"start": "sft4_planned"}
    for deadline in PLANNED:
        at = {"deadline": deadline}
        for reward in ("accuracy", "latency"):
            name = planned_name(reward, deadline)
            title = f"{REWARDS[reward].title}, planned"
            yield _rl(name, reward, title, task_of(plans), **of, **at)
        if deadline != FOUR_PATHS:
            name, title = labelled_name(deadline), "accuracy, four paths"
            at["seeds"] = MANY if deadline < FAIL else FEW  # of which verdicts are
            yield _rl(name, "accuracy", title, task_of(rows), **plain, **at)


_NO_BLOCKS = "block_share=0.0"
_EASY = {"config": "rl_easy", "cost": EASY_RL}


def _of_tables(deadline: int) -> Iterator[Cell]:
    """What tables 3 and 4 and figure 3 have beside the cells of the phase diagram.

    Without a cold start RL begins from a model that knows no tags, but searches: a random
    one answers nothing, so that there would be no reward to learn from.
    """

    def cell(
        name: str, title: str, start: str, reward: str = "accuracy", **more
    ) -> Cell:
        seeds = MANY if deadline == PAY or name == "sequential" else FEW
        given = {"start": start, "deadline": deadline, "seeds": seeds}
        return _rl(f"{name}_{deadline}", reward, title, **given | more)

    no_blocks, easy = (
        {"data.task": f"partner:{_NO_BLOCKS}"},
        {"data.rl": "embedded:easy"},
    )
    yield cell(
        "sequential",
        "sequential GRPO",
        "sft_sequential",
        config="grpo_sequential",
        changes=no_blocks,
    )
    yield cell("no_cold_start", "no cold start", "sft_sequential", "alternating20")
    for variant, start in (("causal", "sft_causal"), ("structured", "sft_plain")):
        given, only = {"variant": variant}, f"{variant}_easy"
        if variant == "causal":  # else it is a cell of the phase diagram
            name, title = "causal_without_easy", "causal, no easy RL"
            yield cell(name, title, start, changes=given)
        title = f"{variant}, easy RL only"
        yield cell(only, title, start, changes=given | easy, **_EASY)
        name, title = f"{variant}_with_easy", f"{variant}, easy RL first"
        start, more = f"{only}_{deadline}", {"cost": AFTER_EASY_RL}
        yield cell(name, title, start, changes=given, **more)
    # Where blocks start at the very beginning of responses there is nothing to rise from.
    title, traces = "late blocks, alternating, 20 %", {"report.traces": 256}
    yield cell("late", title, "sft_late", "alternating20", changes=traces)


def _shortcuts() -> Iterator[Cell]:
    """The published shortcuts, each against `alternating20` at the deadline `PAY`."""
    for name, title, changes in (
        ("forced", "forced tokens in the loss", {"rl.train_on_forced": True}),
        (
            "causal_sampling",
            "causal sampling",
            {"rollout.shortcut": "causal_after_block"},
        ),
    ):
        given = {"start": "sft_plain", "deadline": PAY}
        yield _rl(name, "alternating20", title, changes, **given)
    exact = named("alternating20", PAY, "plain")
    for name, title, start in (
        (
            "causal_sampling_published",
            "causal sampling, so to the end",
            "causal_sampling",
        ),
        ("alternating_published", "alternating, 20 %, sampled causally", exact),
    ):
        given = {
            "changes": {"eval.modes": ("causal",)},
            "deadline": PAY,
        }
        yield Cell(name, title, "evaluate", "evaluate", start, **given)


CELLS = {
    cell.name: cell
    for cell in (
        _sft("sft_plain", "after SFT"),
        _sft("sft_labels", "after SFT, labels", labels=True),
        *_phase(),
        *_mean_rewards(),
        *_division(),
        _sft(
            "sft_sequential", "after SFT without blocks", _NO_BLOCKS, "grpo_sequential"
        ),
        _sft("sft_causal", "causal, after SFT", config="sft_causal"),
        _sft("sft_late", "late blocks, after SFT", "late_share=0.5"),
        *_of_tables(PAY),
        *_of_tables(FAIL),
        *_shortcuts(),
        *_planned(),
    )
}


def table_members(deadline: int) -> tuple[str, ...]:
    """Cells of tables 3 and 4 at a deadline, in order."""
    rewards = (named(x, deadline, "plain") for x in REWARDS if x != "latency")
    return (*rewards, *(cell.name for cell in _of_tables(deadline)))


# What the tables and figures of an experiment show; what these start from is run too.
MEMBERS: dict[str, tuple[str, ...]] = {
    "phase": (
        *(f"sft_{labels}" for labels in LABELS),
        *(named(r, d, labels) for labels in LABELS for r in REWARDS for d in DEADLINES),
        MEAN_REWARDS,
    ),
    "division": (
        named("accuracy", PAY, "labels"),
        f"accuracy_{PAY}_even",
        *(named("accuracy", PAY, "plain", then=then) for then in (False, True)),
        *(f"accuracy4_{FOUR_PATHS}_{labels}" for labels in LABELS),
    ),
    "tables": (*table_members(PAY), *table_members(FAIL)),
    "scaffold": tuple(
        named(first, *key, then=then)
        for key, firsts in SCAFFOLDS.items()
        for first in firsts
        for then in (False, True)
    ),
    "shortcuts": (
        named("alternating20", PAY, "plain"),
        "alternating_published",
        *(cell.name for cell in _shortcuts() if cell.name != "alternating_published"),
    ),
    "planned": tuple(cell.name for cell in _planned()),
}
EXPERIMENTS = tuple(MEMBERS)


def with_starts(names: Sequence[str]) -> list[Cell]:
    """Cells of these names, with all that they start from before them."""
    chosen: dict[str, Cell] = {}

    def add(name: str) -> None:
        cell = CELLS[name]
        if name not in chosen:
            if cell.start:
                add(cell.start)
            chosen[name] = cell

    for name in names:
        add(name)
    return list(chosen.values())


def config_argument(cell: Cell, size: str) -> str:
    """What `--config` of `pr1_jax.main` is."""
    return f"configs/{cell.config}.py{'' if size == 'embedded' else ':' + size}"


def own_changes(cell: Cell, size: str) -> dict[str, object]:
    """What a cell changes beside `COMMON` and its seed, by dotted name."""
    labels = tuple(f" {i + 1}" for i in range(cell.paths * cell.labels))
    path_tokens = _SEARCH_TOKENS[cell.paths] + _TAG_TOKENS + cell.labels
    changed: dict[str, object] = {
        "rollout.max_sequential_steps": cell.deadline,
        "rollout.path_labels": labels,
        "rollout.num_paths": cell.paths,
        "rollout.max_path_tokens": path_tokens,
    }
    if cell.planned:  # one of two paths has up to three rows
        changed["rollout.max_path_tokens"] = 0
    if cell.kind == "evaluate":
        changed |= {"data.eval": "hard=embedded:hard@1"}
    else:
        changed |= {"stages": (cell.kind,)}
    return changed | cell.changes | (cell.cost if size == "embedded" else {})


def changes(cell: Cell, size: str, seed: int) -> dict[str, object]:
    """All fields that a run of the cell changes, by dotted name."""
    return {"seed": seed, "data.seed": seed} | COMMON | own_changes(cell, size)
