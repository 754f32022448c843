"""A made-up run for the tests of the report: at step 140 it collapses."""

import pathlib

import numpy as np

from configs import rl_alternating
from pr1_jax.system import files
from pr1_jax.workdir import metrics
from pr1_jax.workdir.alarms import LOGP_GAPS, Alarms, Limits

COLLAPSE = 140
LABELS = (" 1", " 2")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!--\u2028 &amp; "


def write(workdir: pathlib.Path, *, steps: int = 160, responses=range(1, 161)) -> None:
    """Writes a workdir as training does; `responses`: steps that have rollouts."""
    config = rl_alternating.get_config("smoke")
    config.reward.window, config.reward.tiered_steps, config.rl.steps = 10, 2, steps
    config.rollout.path_labels = LABELS
    files.write_json(workdir / "config.json", config.to_dict())
    noise = np.random.default_rng(0)
    alarms = Alarms(Limits(LOGP_GAPS[config.variant], **config.alarms))
    accuracies = {"eval_0_base": 0.05, "eval_1_sft": 0.55, "eval_2_rl": 0.4}
    evaluations = {name: evaluation(x) for name, x in accuracies.items()}
    with metrics.MetricWriter(workdir) as writer:
        writer.write("eval_0_base", 0, evaluations["eval_0_base"])
        for step in range(1, 31):
            writer.write("sft", step, {"loss/sft": 2 / step + noise.normal(0, 0.02)})
        writer.write("eval_1_sft", 0, evaluations["eval_1_sft"])
        for step in range(1, steps + 1):
            found = figures(step, noise)
            found |= alarms.check("rl", step, found)
            writer.write("rl", step, found)
        writer.write("eval_2_rl", 0, evaluations["eval_2_rl"])
    summary = {"evaluations": evaluations, "finished": True}
    files.write_json(workdir / "summary.json", summary)
    write_responses(workdir, "eval_0_base", [response() for _ in range(4)])
    for step in responses:
        records = [response(), sequential(), wrong()]
        if step >= COLLAPSE:
            records = [empty(), empty(), empty()]
        write_responses(workdir, f"rl_{step:06d}", records)


def figures(step: int, noise: np.random.Generator) -> dict[str, float]:
    """Metrics of an RL step."""
    near = lambda mean, spread: float(mean + noise.normal(0, spread))
    lost = step >= COLLAPSE
    tiered = (step - 1) % 10 >= 8
    of_blocks = {"rollout/work_division": 0.8, "rollout/identical_paths": 0.1}
    return ({} if lost else of_blocks) | {
        "reward/mean": -1.0 if lost else near(0.6 if tiered else 0.4, 0.03),
        "reward/weight_accuracy": float(not tiered),
        "reward/weight_tiered": float(tiered),
        "data/kept": 30.0,
        "data/dropped_too_long": 30.0,
        "rollout/accuracy": 0.0 if lost else near(0.7, 0.02),
        "rollout/parallel_ratio": 0.0 if lost else near(0.6, 0.02),
        "rollout/total_tokens": 1.0 if lost else near(120, 3),
        "rollout/sequential_steps": 1.0 if lost else near(80, 2),
        "rollout/degenerate_groups": 1.0 if lost else near(0.2, 0.03),
        "rollout/logp_gap_max": near(1e-5, 1e-6),
        "rollout/logp_gap_mean": 1e-6,
        "policy/entropy": 0.001 if lost else near(0.5, 0.01),
        "optim/grad_norm": 0.001 if lost else near(0.4, 0.03),
        "optim/skipped": float(step == 77),
        "perf/tokens_per_sec": near(2500, 50),
        "perf/step_sec": near(3, 0.1),
    }


def evaluation(accuracy: float) -> dict[str, float]:
    """Figures of an evaluation."""
    return {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": accuracy - 0.03,
        "eval/accuracy_high": accuracy + 0.03,
        "eval/parallel_ratio": 0.6,
        "eval/identical_paths": 0.125,
        "eval/work_division": 0.75,
        "eval/total_tokens": 120.0,
        "eval/sequential_steps": 80.0,
        "eval/sequential_steps_banned": 70.0,
        "eval/self_parallelism": 1.5,
    }


def write_responses(workdir: pathlib.Path, name: str, records: list[dict]) -> None:
    """Writes a rollout file."""
    files.write_json_lines(workdir / "rollouts" / f"{name}.jsonl", records)


def record(text: str, *, verdict: str, num_blocks: int, **fields) -> dict:
    """A rollout record without a trace."""
    return {
        "question": "Which two add to 26? 16 6 9 17",
        "response": text,
        "answer": "8",
        "verdict": verdict,
        "reason": "the answer is the reference"
        if verdict == "correct"
        else "no answer",
        "num_blocks": num_blocks,
        "format_ok": True,
        "finished": True,
        "total_tokens": len(text.split()),
        "sequential_steps": len(text.split()),
        "reward": 1.2 if verdict == "correct" else -1.0,
        **fields,
    }


def empty() -> dict:
    """What a collapsed policy says."""
    trace = traced([[(["<eos>"], 0)]])
    return record("", verdict="incorrect", num_blocks=0, total_tokens=1, trace=trace)


def wrong() -> dict:
    """An old record: no trace, and text that would like to be code."""
    return record(HOSTILE + "\ud800", verdict="undecided", num_blocks=0)


def sequential() -> dict:
    """A response without a block, no trace."""
    return record("16+9 no, Final Answer: 7", verdict="incorrect", num_blocks=0)


def response(paths: int = 2, tokens: int = 6, blocks: int = 1) -> dict:
    """A response with blocks, traced."""
    parts = []
    for _ in range(blocks):
        inside = []
        for path in range(1, paths + 1):
            words = [f"{path}+{i} " for i in range(tokens - 2 - (path - 1) % 3)]
            inside.append((["<Path>", *words, "</Path>"], path))
        parts += [
            [(["so ", "\n", "<Parallel>"], 0)],
            inside,
            [(["</Parallel>", "\n", "<Summary>", "17", "+9", "</Summary>"], 0)],
        ]
    parts.append([(["Final ", "Answer: ", "8", "<eos>"], 0)])
    trace = traced(parts)
    text = "".join(trace["pieces"]).removesuffix("<eos>")
    steps = max(trace["positions"]) - 9
    facts = {"total_tokens": len(trace["pieces"]), "sequential_steps": steps}
    return record(text, verdict="correct", num_blocks=blocks, trace=trace, **facts)


def labelled() -> list[dict]:
    """A response whose paths have labels and do the same, with a trace and without."""
    paths = [
        (["<Path>", label, " left", " 1+6", " no", "</Path>"], i)
        for i, label in enumerate(LABELS, start=1)
    ]
    trace = traced([[(["<Parallel>"], 0)], paths, [(["</Parallel>"], 0)]])
    trace["forced"] = [
        int(piece[0] == "<" or piece in LABELS) for piece in trace["pieces"]
    ]
    text = "".join(trace["pieces"])
    record_ = record(text, verdict="correct", num_blocks=1)
    return [record_ | {"trace": trace}, record_]


def planned() -> list[dict]:
    """A response whose block has a plan for each of its paths, traced and not."""
    plans = [(["so ", "<Parallel>"], 0)]
    plans += [(["<Plan>", f" row {row}", "</Plan>"], 0) for row in "CAB"]
    paths = [
        (["<Path>", f" {i}", f" {row}", " 16>20", " no", "</Path>"], i)
        for i, row in enumerate("CAB", start=1)
    ]
    closing = [(["</Parallel>", "\n", "<Summary>", " none", "</Summary>"], 0)]
    trace = traced([*([part] for part in plans), paths, closing])
    labels = [f" {i}" for i in range(1, 4)]
    trace["forced"] = [
        int(x in ("<Path>", "</Parallel>", *labels)) for x in trace["pieces"]
    ]
    text = "".join(trace["pieces"])
    record_ = record(text, verdict="correct", num_blocks=1)
    return [record_ | {"trace": trace}, record_]


def traced(parts: list[list[tuple[list[str], int]]], prompt: int = 10) -> dict:
    """A trace of stretches of (pieces, path); those of one part start together."""
    columns = ("pieces", "logps", "forced", "positions", "block", "path")
    out: dict[str, list] = {name: [] for name in columns}
    position, block = prompt, 0
    for part in parts:
        block += part[0][1] > 0
        for pieces, path in part:
            count = len(pieces)
            out["pieces"] += pieces
            out["forced"] += [int(piece.startswith("<")) for piece in pieces]
            out["logps"] += [-0.3 * (i % 5) for i in range(count)]
            out["positions"] += range(position, position + count)
            out["block"] += [block if path else 0] * count
            out["path"] += [path] * count
        position += max(len(pieces) for pieces, _ in part)
    return {"prompt_tokens": prompt, **out}
