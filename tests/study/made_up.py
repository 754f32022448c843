"""A made-up study: every cell as theory has it, or as a test would like it."""

import numpy as np

from pr1_jax.study import border, cells, optimum, outcomes, results

PROBLEMS, POINTS = 20, 30


def as_theory_says(cell):
    """Parallel ratio and accuracy of an RL cell, and how much of the work is divided."""
    if cell.planned:
        share, numbers = optimum.best_planned(cell.deadline, tokens=96)
        return float(min(numbers) > 1), share, 1.0
    lone = optimum.lone(cell.deadline, cell.paths)
    alike = optimum.alike(cell.deadline, cell.paths)
    divided = optimum.divided(cell.deadline, cell.paths)
    reward = cell.name.split("_")[0]
    share = {"alternating20": 0.2, "alternating50": 0.5, "parallel": 1.0}.get(reward, 0)
    _, ratio = border.predicted(alike, lone, share)
    if cell.name.endswith("then_accuracy"):
        ratio = border.predicted(alike, lone, 0)[1]
        if cell.labels and reward in ("parallel", "alternating50"):
            ratio = 1.0
    if cell.name.startswith(("sequential", "no_cold")):
        ratio = 0.0
    divides = cell.labels and ratio > 0.5
    block = divided if divides else alike
    return ratio, ratio * block + (1 - ratio) * lone, 1.0 if divides else 0.5


def findings(*, seeds=cells.MANY, gap=0.05, dense_more=2.0, rise=0.3, divides=15):
    """A study; paths come to divide the work at point `divides` of a course."""
    rng = np.random.default_rng(0)
    problems, courses, steps = {}, {}, {}
    for name, cell in cells.CELLS.items():
        ratio, accuracy, division = 0.5, 0.9, 0.5
        if cell.kind == "rl":
            ratio, accuracy, division = as_theory_says(cell)
        elif cell.kind == "evaluate":
            ratio, accuracy, division = as_theory_says(cells.CELLS[cell.start])
        figures = {
            "parallel_ratio": ratio,
            "accuracy": accuracy,
            "work_division": division,
            "identical_paths": 0.0 if division == 1 else 0.5,
            "before_parallel_ratio": 0.5,
            "before_accuracy": 0.5,
            "total_tokens": 44.0,
            "sequential_steps": 29.0,
        }
        if cell.planned:
            figures |= {"num_paths": 3.0, "before_num_paths": 3.0, "searches": 2.0}
        if cell.planned and cell.kind == "rl":
            _, numbers = optimum.best_planned(cell.deadline, tokens=96)
            figures |= {"num_paths": max(numbers), "searches": min(numbers)}
        ids = range(min(cell.seeds, seeds))
        luck = lambda size: rng.normal(0, 0.004, size)
        for metric, mean in figures.items():
            size = PROBLEMS if metric in outcomes.SHARES else 1
            problems.setdefault(name, {})[metric] = {
                seed: np.clip(mean + luck(size), 0, max(mean, 1)) for seed in ids
            }
        if cell.kind != "rl":
            continue
        steps[name] = cell.cost["rl.steps"]
        rising = lambda t: 1 / (1 + np.exp((t - np.arange(POINTS)) / 1.2))
        ends = {
            "accuracy": (0.5, figures["accuracy"]),
            "parallel_ratio": (0.5, figures["parallel_ratio"]),
            "work_division": (0.5, figures["work_division"]),
            "identical_paths": (0.5, figures["identical_paths"]),
            outcomes.POSITION: (0.2, 0.2 + rise),
            outcomes.GAP: (gap, gap),
        }
        courses[name] = {}
        for figure, (first, last) in ends.items():
            middle = 3 if figure == "accuracy" else divides
            noise = 0.01 * gap if figure == outcomes.GAP else 0.004
            courses[name][figure] = {
                seed: first
                + (last - first) * rising(middle + seed % 3)
                + rng.normal(0, noise, POINTS)
                for seed in ids
            }
    compared = {"tokens": 256, "exact_bytes": 1e6, "dense_bytes": dense_more * 1e6}
    compared |= {"exact_sec": 1.0, "dense_sec": dense_more, "max_difference": 1e-6}
    return results.Findings(problems, courses, steps, dense=[compared])
