"""The cold-start stage: traces from a teacher, as data for SFT (docs/method.md, section 6).

A model answers problems. What is correct, passes the format check and has a block is
brought into canonical form and written to `traces.jsonl`, one trace a problem, which
`data.sft` reads. All attempts are kept in `samples/coldstart.jsonl`; the stage goes on
where it stopped.

A teacher that does not know the tags as tokens decodes in the `ordinary` mode, and
spells them, as its prompt does. In the mode `plans` it does so, too, and writes plans for
traces that there are (`pr1_jax/stages/plans.py`).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from pr1_jax import tags
from pr1_jax.answers.verdicts import CORRECT
from pr1_jax.data import prompts, streams
from pr1_jax.data.records import Record
from pr1_jax.stages import plans, samples
from pr1_jax.stages.attempts import KEPT, NO_CANONICAL_FORM, UNFINISHED, first_good
from pr1_jax.stages.checks import PLANS
from pr1_jax.stages.experiment import ORDINARY, Experiment
from pr1_jax.stages.run import Run
from pr1_jax.system import files

_BATCH = 256  # problems read at once


def open_stream(
    experiment: Experiment, requests: Collection[str] | None = None
) -> streams.Stream[prompts.Problem]:
    """The stage's problems in order; those with too long a prompt are left out.

    Args:
      requests: what is asked instead of the problems of `data.coldstart`, and without
        our instruction.
    """
    c = experiment.config
    template, name = experiment.own.template, c.data.coldstart
    if requests is None:
        source = experiment.source(name, "train", seed=c.data.seed + 2)
    else:
        source = [{"question": request, "answer": ""} for request in requests]
        template = "own" if template.name in ("chat", "own") else "plain"
    return streams.problem_stream(
        source,
        experiment.tokenizer,
        template=template,
        max_prompt_tokens=c.rollout.max_prompt_tokens,
        allow_tags=c.coldstart.mode not in (ORDINARY, PLANS),
        batch_size=_BATCH,
        seed=c.data.seed,
        shuffle=False,
        epochs=1,
    )


def run_stage(experiment: Experiment, run: Run, stage: int) -> None:
    """Asks the teacher, and writes the traces."""
    del stage
    c = experiment.config.coldstart
    asked = _open_traces(experiment, run) if c.mode == PLANS else None
    problems = _problems(open_stream(experiment, asked), limit=c.problems)
    path = run.workdir / "samples" / "coldstart.jsonl"
    settings = {"mode": ORDINARY if c.mode == PLANS else c.mode}
    settings |= {"samples": c.samples, "purpose": "coldstart"}
    grammar = experiment.settings.grammar
    with run.display("coldstart", len(problems)) as progress:
        for done, records in samples.sample(
            experiment, run.params, path, problems, **settings
        ):
            if not records:
                continue
            if asked is None:
                how = {"needs_block": c.needs_block, "grammar": grammar}
                traces, reasons = select(records, **how)
            else:
                traces, reasons = plans.select(records, asked, grammar)
            if jax.process_index() == 0:
                files.write_json_lines(run.workdir / "traces.jsonl", traces)
            metrics = {f"coldstart/{r}": n / len(records) for r, n in reasons.items()}
            metrics["coldstart/traces"] = float(len(traces))
            progress.update(done, metrics)
    run.log("coldstart", len(problems), metrics)
    run.say(
        f"{len(traces)} traces of {len(problems)} problems: {run.workdir}/traces.jsonl"
    )
    for reason, count in reasons.most_common():
        run.say(f"  {reason:18} {count:6}  {100 * count / len(records):5.1f} %")


def _open_traces(experiment: Experiment, run: Run) -> dict[str, Record]:
    """Traces of `data.coldstart` by what the teacher is asked; says which are left out."""
    c = experiment.config.data
    source = experiment.source(c.coldstart, "train", seed=c.seed + 2, traces=True)
    asked, dropped = plans.requests(source)
    for reason, count in dropped.most_common():
        run.say(f"traces without use: {count} {reason.replace('_', ' ')}")
    if not asked:
        raise ValueError(
            f"data.coldstart={c.coldstart} has no trace in blocks without plans "
            "(coldstart.mode='plans')"
        )
    return asked


def select(
    records: Sequence[Mapping[str, Any]],
    *,
    needs_block: bool,
    grammar: tags.Grammar = tags.PLAIN,
) -> tuple[list[dict[str, str]], Counter[str]]:
    """The first good attempt at each question, and how all attempts fared.

    Args:
      records: attempts, as `samples.sample` gives them.
      needs_block: whether a trace without a block is left out.
      grammar: of traces, whose paths get the labels that they lack.

    Returns:
      Records of `question`, `response` in canonical form and `answer`; and the number
      of attempts by reason: `kept`, `spare` (of a question that has a trace already),
      or why it is of no use.
    """

    def judge(record):
        reason, response = _judge(record, needs_block, grammar)
        question, answer = record["question"], record["answer"]
        return reason, {"question": question, "response": response, "answer": answer}

    return first_good(records, judge)


def _judge(
    record: Mapping[str, Any], needs_block: bool, grammar: tags.Grammar
) -> tuple[str, str]:
    """Why an attempt is of no use, or `kept` and its canonical form."""
    text = record["response"]
    if not record["finished"]:
        return UNFINISHED, ""
    if record["verdict"] != CORRECT:
        return record["verdict"], ""
    if tags.check_format(text, grammar.unlabelled):
        return "format_fault", ""
    if needs_block and tags.PARALLEL not in text:
        return "no_block", ""
    try:
        return KEPT, tags.canonical(text, grammar)
    except ValueError:
        return NO_CANONICAL_FORM, ""


def _problems(
    stream: streams.Stream[prompts.Problem], *, limit: int
) -> list[prompts.Problem]:
    """The first problems, each once."""
    problems: dict[str, prompts.Problem] = {}
    for batch in stream:
        for problem in batch:
            problems.setdefault(problem.question, problem)
        if len(problems) >= limit:
            break
    return list(problems.values())[:limit]
