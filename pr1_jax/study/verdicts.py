"""The claims, each as a rule that was fixed before the study was run.

A claim has parts; a part is a quantity that the claim says is positive. By their 95 %
intervals (`intervals`) a claim

* holds, if all of its quantities are above zero;
* does not hold at this scale, if one of them is below zero;
* cannot be told, else: also with less than `SEEDS` seeds, or where a cell is lacking.

A rule needs numbers. Blocks are "kept" above half of the responses, and "lost" below half
of what SFT left. An accuracy is better, or worse, by at least 5 points, and as good
within 5: without a margin a claim would hold by differences too small to matter. Where the optimum of
the task (`optimum`) or the arithmetic of the rewards (`border`) predicts a figure, that
is what is claimed. Nothing here was chosen by results of the study.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pr1_jax.study import border, cells, intervals, optimum, outcomes, planned, results
from pr1_jax.study.cells import BETWEEN, FAIL, FOUR_PATHS, PAY, named
from pr1_jax.study.intervals import Interval
from pr1_jax.study.parts import (
    MARGIN,
    OURS,
    Claim,
    Part,
    above,
    below,
    kept,
    lost,
    more,
    not_lost,
    optimal,
    plateau,
    total,
)
from pr1_jax.study.results import Findings

HOLDS, FAILS, OPEN = "holds", "does not hold at this scale", "cannot be told"
SEEDS = cells.MANY  # less are not enough for a verdict; 0: no luck is involved
_GUESS = 1 / optimum.NUMBERS  # what guessing adds at most, where nothing was found
_GAP = 1e-3  # nats a token


# --- Measures of courses and of masks --------------------------------------------------


def _rise(course: np.ndarray) -> float:
    """From the first to the last quarter, less the margin."""
    quarter = max(1, len(course) // 4)
    means = [x[np.isfinite(x)] for x in (course[:quarter], course[-quarter:])]
    known = all(map(len, means))
    return means[1].mean() - means[0].mean() - MARGIN if known else np.nan


def _course(figure: str, cell: str, measure: Callable) -> Callable:
    return lambda findings: findings.by_seed(figure, cell, measure)


def _dense(measure: Callable[[dict], float]) -> Callable:
    longest = lambda findings: max(findings.dense, key=lambda f: f["tokens"])
    return lambda findings: (
        intervals.exact(measure(longest(findings))) if findings.dense else None
    )


# --- Claims ---------------------------------------------------------------------------


def _phase() -> Iterator[Claim]:
    """Where blocks are kept, by deadline, labels and reward."""
    claim = lambda name, text, *parts: Claim(name, "phase", text, OURS, parts)
    pays = lambda d: optimum.alike(d, 2) > optimum.lone(d)
    plain = lambda reward, deadline: named(reward, deadline, "plain")
    for labels, words in (("plain", "Without labels"), ("labels", "With labels")):
        cell = {d: named("accuracy", d, labels) for d in cells.DEADLINES}
        yield claim(
            f"kept_where_they_pay_{labels}",
            f"{words}, accuracy alone keeps blocks where two searches from random rows "
            "see more of the list than one.",
            *(kept(cell[d]) for d in cell if pays(d)),
        )
        yield claim(
            f"lost_where_they_do_not_{labels}",
            f"{words}, accuracy alone loses blocks elsewhere, also where divided work "
            "would pay.",
            *(lost(cell[d]) for d in cell if not pays(d)),
        )
        of_labels = labels == "labels"
        best = {d: optimum.best(d, 2, labels=of_labels) for d in cell}
        yield claim(
            f"optimum_{labels}",
            f"{words}, accuracy alone comes within 5 points of the best that is possible"
            f"{', but where only divided work pays' * of_labels}.",
            *(
                optimal(cell[d], best[d])
                for d in cell
                if not (of_labels and d in BETWEEN)
            ),
        )
    half, always, (early, late) = "alternating50", "parallel_only", BETWEEN
    yield claim(
        "bonus_moves_the_border",
        "At later deadlines a bonus for blocks leaves more of them than accuracy alone.",
        more("parallel_ratio", plain(half, early), plain("accuracy", early), 0.25),
        more("parallel_ratio", plain(always, FAIL), plain("accuracy", FAIL), 0.25),
    )
    yield claim(
        "normalised_advantages_set_the_border",
        "Where blocks are lost by mean rewards, and kept by advantages that are "
        "normalised in groups, they are kept.",
        *map(kept, (plain(half, early), plain(always, late), plain(always, FAIL))),
    )
    _, some = border.predicted(optimum.alike(FAIL, 2), optimum.lone(FAIL), 0.5)
    yield claim(
        "half_a_bonus_keeps_some",
        f"At {FAIL} steps a bonus in half of the RL steps keeps some blocks "
        f"({100 * some:.0f} % by normalised advantages), and not most.",
        above("parallel_ratio", plain(half, FAIL), 0.05),
        below("parallel_ratio", plain(half, FAIL), 0.5),
    )
    yield claim(
        "mean_rewards_lose_them",
        "The same bonus keeps fewer where advantages are not divided by the spread of "
        "their group.",
        more("parallel_ratio", plain(half, FAIL), cells.MEAN_REWARDS),
    )
    yield claim(
        "latency_does_not_keep_blocks",
        f"At {FAIL} steps a reward for short critical paths does not keep blocks: a lone "
        "search stops when it finds, and a block waits for its longest path.",
        lost(plain("latency", FAIL)),
    )


def _division() -> Iterator[Claim]:
    """What labels do to the work of paths."""
    claim = lambda name, text, *parts: Claim(name, "division", text, OURS, parts)
    two = {"labels": named("accuracy", PAY, "labels"), "even": f"accuracy_{PAY}_even"}
    two["plain"] = named("accuracy", PAY, "plain", then=True)  # after twice the steps
    four = {labels: f"accuracy4_{FOUR_PATHS}_{labels}" for labels in cells.LABELS}
    best_two, best_four = optimum.alike(PAY, 2), optimum.alike(FOUR_PATHS, 4)
    yield claim(
        "labels_divide_two",
        "Two labelled paths come to divide the work under accuracy alone, and see more "
        "than two without labels after twice the steps.",
        more("work_division", two["labels"], two["plain"], 0.2),
        more("accuracy", two["labels"], two["plain"], 0.1),
    )
    yield claim(
        "labels_divide_four",
        "Four labelled paths come to divide the work, and see more than four without "
        "labels ever could.",
        more("work_division", four["labels"], four["plain"], 0.1),
        above("accuracy", four["labels"], best_four + 0.1),
    )
    yield claim(
        "plain_is_bounded",
        "Paths without labels do not exceed the optimum of independent draws, and a guess.",
        below("accuracy", two["plain"], best_two + _GUESS),
        below("accuracy", four["plain"], best_four + _GUESS),
    )
    yield claim(
        "identical_paths",
        "More than four tenths of the blocks without labels have identical paths, and "
        "less than 2 in a hundred with labels.",
        above("identical_paths", two["plain"], 0.4),
        below("identical_paths", two["labels"], 0.02),
    )
    yield claim(
        "labels_alone_divide_two",
        f"Labelled paths come to divide the work within {cells.LONG_RL['rl.steps']} steps "
        "also where no trace has a habit of it.",
        above("work_division", two["even"], 0.8),
    )
    yield claim(
        "plateau",
        "Without that habit they first stand at the optimum of independent draws, and "
        "divide the work later.",
        plateau(two["even"]),
        above("work_division", two["even"], 0.8),
    )


def _tables() -> Iterator[Claim]:
    """The paper's tables 3 and 4 and its figure 3, without labels, as published."""

    def claim(name: str, text: str, paper: str, *parts: Part, at: int = PAY) -> Claim:
        pays = "blocks pay" if at == PAY else "they do not"
        text = f"{text} ({at} steps, where {pays}.)"
        return Claim(f"{name}_{at}", "tables", text, paper, parts)

    for at in (PAY, FAIL):
        accuracy, alternating, always = (
            named(reward, at, "plain")
            for reward in ("accuracy", "alternating20", "parallel_only")
        )
        yield claim(
            "blocks_die_out",
            "With the accuracy reward alone blocks die out.",
            "95.6 % of responses with a block after SFT, 13.6 % after RL (S1)",
            lost(accuracy),
            at=at,
        )
        yield claim(
            "parallel_only_forces_blocks",
            "The parallel-only reward forces blocks, at a cost in accuracy.",
            "80.3 % with a block against 13.6 %; MATH 81.7 against 84.5 for alternating",
            more("parallel_ratio", always, accuracy, 0.1),
            more("accuracy", alternating, always),
            at=at,
        )
        yield claim(
            "alternating_keeps_both",
            "The alternating reward does not lose blocks, and is as accurate as accuracy "
            "alone.",
            "63.0 % with a block; average 46.8 against 47.1",
            not_lost(alternating),
            more("accuracy", alternating, accuracy, -MARGIN),
            at=at,
        )
        yield claim(
            "better_than_sequential",
            "Parallel thinking is more accurate than sequential GRPO.",
            "average 46.8 (S2) against 45.1",
            more("accuracy", alternating, f"sequential_{at}"),
            at=at,
        )
    with_, without = named("alternating20", PAY, "plain"), f"no_cold_start_{PAY}"
    yield claim(
        "cold_start_is_needed",
        "Without a cold start RL does not find blocks.",
        "said of the base model; no figure that could be compared",
        total(
            "half of the parallel ratio with a cold start, less that without",
            0.0,
            (0.5, "parallel_ratio", with_),
            (-1.0, "parallel_ratio", without),
        ),
    )
    yield claim(
        "easy_rl_helps_causal",
        "RL on easy problems first helps the causal variant.",
        "average 48.9 against 46.6",
        more("accuracy", f"causal_with_easy_{PAY}", f"causal_without_easy_{PAY}"),
    )
    without = named("accuracy", PAY, "plain")
    yield claim(
        "easy_rl_hurts_structured",
        "RL on easy problems first hurts the structured variant.",
        "average 38.5 against 47.1",
        more("accuracy", without, f"structured_with_easy_{PAY}"),
    )
    text = "relative position, last quarter of the steps less the first, less 5 points"
    yield claim(
        "blocks_move_back",
        "Over training blocks move towards the end of responses.",
        "rises steadily (figure 3)",
        Part(text, _course(outcomes.POSITION, f"late_{PAY}", _rise)),
    )


def _scaffold() -> Iterator[Claim]:
    """Forced exploration first, then accuracy, against accuracy for as many steps."""

    def claim(name: str, text: str, *parts: Part, paper: str = OURS) -> Claim:
        return Claim(name, "scaffold", text, paper, parts)

    then = lambda first, at, labels: named(first, at, labels, then=True)
    at, half, always = BETWEEN[0], "alternating50", "parallel_only"
    for first, words in (
        (always, "Rewarding only blocks"),
        (half, "A bonus for blocks in half of the steps"),
        ("latency", "A reward for short critical paths"),
    ):
        yield claim(
            f"{first}_first",
            f"{words} first, then accuracy, ends more accurate than accuracy alone, where "
            "only divided work pays.",
            more("accuracy", then(first, at, "labels"), then("accuracy", at, "labels")),
        )
    yield claim(
        "first_reaches_optimum",
        "Rewarding only blocks first leads within 5 points of the best that is possible.",
        *(optimal(then(always, d, "labels"), optimum.best(d, 2)) for d in BETWEEN),
    )
    yield claim(
        "blocks_stay",
        "Blocks whose work is divided stay when the reward is accuracy alone.",
        *(kept(then(always, d, "labels")) for d in BETWEEN),
    )
    yield claim(
        "accuracy_alone_stays",
        "Accuracy alone does not get beyond a lone search and a guess, also in twice the "
        "steps.",
        below("accuracy", then("accuracy", at, "labels"), optimum.lone(at) + _GUESS),
    )
    yield claim(
        "labels_are_needed",
        "Without labels forced exploration gains nothing.",
        more(
            "accuracy",
            then("accuracy", at, "plain"),
            then(always, at, "plain"),
            -MARGIN,
        ),
    )
    where = f" ({FAIL} steps, where blocks do not pay.)"
    ours, alone = (then(reward, FAIL, "plain") for reward in (half, "accuracy"))
    yield claim(
        "scaffold_is_better",
        "Alternating first, then accuracy, ends more accurate than accuracy alone."
        + where,
        more("accuracy", ours, alone),
        paper="AIME25 25.6 against 17.7",
    )
    yield claim(
        "scaffold_is_taken_down",
        "Once the reward is accuracy alone, blocks become fewer." + where,
        more("parallel_ratio", named(half, FAIL, "plain"), ours),
        paper="the parallel ratio falls after step 200 (figure 4)",
    )


def _shortcuts() -> Iterator[Claim]:
    """What the published code does otherwise."""
    paper = "not its claim, but what its published code does"
    claim = lambda name, text, *parts: Claim(name, "shortcuts", text, paper, parts)
    exact, less = named("alternating20", PAY, "plain"), "dense by exact, less 1.1"
    gap = lambda course: course.mean() - _GAP
    yield claim(
        "forced_tokens_cost",
        "Training on tokens that the runtime wrote costs accuracy.",
        more("accuracy", exact, "forced"),
    )
    yield claim(
        "causal_sampling_is_another_policy",
        "Sampling plain-causally after a block is not the policy that is trained.",
        Part(
            f"mean log-prob gap, less {_GAP} nats a token",
            _course(outcomes.GAP, "causal_sampling", gap),
            "nats",
        ),
    )
    yield claim(
        "causal_sampling_costs",
        "Training on what was sampled so costs accuracy, sampled so at the end as well.",
        more("accuracy", exact, "causal_sampling_published"),
    )
    text = "0.0001 less the largest difference of outputs and gradients"
    ratio = lambda f, what: f[f"dense_{what}"] / f[f"exact_{what}"] - 1.1
    yield claim(
        "dense_masks_cost_memory",
        "A dense mask computes the same as the exact rule, at more memory and time.",
        Part(text, _dense(lambda f: 1e-4 - f["max_difference"]), ""),
        Part(f"memory, {less}", _dense(lambda f: ratio(f, "bytes")), "times"),
        Part(f"time, {less}", _dense(lambda f: ratio(f, "sec")), "times"),
    )


CLAIMS = (
    *_phase(),
    *_division(),
    *_tables(),
    *_scaffold(),
    *_shortcuts(),
    *planned.claims(),
)


def verdict(measured: Sequence[Interval | None]) -> str:
    """What the intervals of a claim's quantities say of it."""
    enough = lambda x: x is not None and (x.seeds == 0 or x.seeds >= SEEDS)
    if any(enough(x) and x.high < 0 for x in measured):
        return FAILS
    if all(enough(x) and x.low > 0 for x in measured):
        return HOLDS
    return OPEN


def judge(
    findings: Findings, experiments: Sequence[str] = cells.EXPERIMENTS
) -> list[dict[str, Any]]:
    """The claims of experiments with what was measured and their verdicts, as JSON."""
    out = []
    for claim in (claim for claim in CLAIMS if claim.experiment in experiments):
        measured = [part.measure(findings) for part in claim.parts]
        out.append(
            {
                "name": claim.name,
                "experiment": claim.experiment,
                "claim": claim.text,
                "paper": claim.paper,
                "parts": [
                    {
                        "text": part.text,
                        "unit": part.unit,
                        "measured": x and results.as_json(x),
                    }
                    for part, x in zip(claim.parts, measured)
                ],
                "verdict": verdict(measured),
            }
        )
    return out
