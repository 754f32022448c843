"""Converts traces of other systems into traces that `data.sft` reads (docs/data.md).

    python -m pr1_jax.data.convert_traces FROM --shape=threadweaver --out=traces.jsonl

FROM is what `data.sft` takes: a .jsonl or .parquet file, hf:OWNER/NAME, …; `--shape` is
threadweaver, multiverse or npr. What cannot be converted is left out, and counted by its
reason. The exit code is 0, or 2 for a mistake.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from pr1_jax import tags
from pr1_jax.data import published_traces, sources
from pr1_jax.data.rows import Dropped, clipped
from pr1_jax.system import cli, files

KEPT, NO_BLOCK = "kept", "no_block"


def convert_records(
    parts: Sequence[sources.Source],
    change: Callable[[str], str],
    *,
    needs_block: bool = True,
) -> tuple[list[dict[str, Any]], Counter[str], dict[str, str]]:
    """The traces of records, converted.

    Args:
      parts: sources of the same records, with the parts of a response one after the
        other; their questions and answers are those of the first.
      change: converts a response, or raises `Dropped`.
      needs_block: whether a trace without a block is left out.

    Returns:
      Records of `question`, `response` and `answer`; the number of records by what
      became of them: `kept`, `no_block` or why one cannot be read or converted; and of
      each such reason the first text that says more.
    """
    traces: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for index in range(len(parts[0])):
        try:
            records = [part[index] for part in parts]
            response = change("\n\n".join(record["response"] for record in records))
            if needs_block and tags.PARALLEL not in response:
                raise Dropped(NO_BLOCK, f"expected a block: {response[:60]!r}")
        except Dropped as drop:
            reasons[drop.reason] += 1
            first.setdefault(drop.reason, f"record {index + 1}: {drop}")
            continue
        reasons[KEPT] += 1
        record = records[0]
        asked = json.loads(record.get("messages", "null")) or record["question"]
        answer = {"answer": record["answer"]} if record["answer"] else {}
        traces.append({"question": asked, "response": response, **answer})
    return traces, reasons, first


def main(argv: list[str]) -> None:
    """Converts the data and says how many traces were left out, and why."""
    cli.require([_SHAPE, _OUT])
    if len(argv) < 2:
        cli.stop("the data to convert are missing: a file, or hf:OWNER/NAME")
    if not _OUT.value.endswith(".jsonl"):
        cli.stop(f"--out={_OUT.value}: expected the name of a .jsonl file")
    if os.path.exists(_OUT.value):
        cli.stop(f"--out={_OUT.value} exists: name another file, or remove it")
    how = {"planned": _PLANNED.value, "flatten": _FLATTEN.value}
    change = lambda text: published_traces.convert(text, _SHAPE.value, **how)
    columns = {"question": _QUESTION.value, "answer": _ANSWER.value}
    try:
        parts = [
            sources.open_source(
                argv[1],
                "train",
                seed=0,
                columns={**columns, "response": names.strip()},
                traces=True,
            )
            for names in _RESPONSE.value.split("+")
        ]
        needs = {"needs_block": _NEEDS_BLOCK.value}
        traces, reasons, first = convert_records(parts, change, **needs)
        if not traces:
            worst = reasons.most_common(1)[0][0]
            said = f"{worst.replace('_', ' ')}, {first[worst]}"
            raise ValueError(f"{argv[1]}: no trace can be converted: {said}")
        files.write_json_lines(_OUT.value, traces)
    except (ValueError, OSError) as error:
        cli.stop(error)
    number = reasons.total()
    print(f"{len(traces)} traces of {number} records: {_OUT.value}")
    for reason, count in reasons.most_common():
        print(f"  {reason:24} {count:6}  {100 * count / number:5.1f} %")
        if reason in first:
            print(f"    {' '.join(clipped(first[reason]).split())}")


if __name__ == "__main__":
    _SHAPE = flags.DEFINE_enum(
        "shape", None, [*published_traces.SHAPES], "Whose traces they are."
    )
    _OUT = flags.DEFINE_string("out", None, "File to write, .jsonl; must not exist.")
    _PLANNED = flags.DEFINE_bool(
        "planned", True, "Blocks have plans (rollout.planned); else plans are left out."
    )
    _FLATTEN = flags.DEFINE_bool(
        "flatten",
        False,
        "Keep a block inside a path, and one of a single path, as ordinary text; else "
        "such a trace is left out.",
    )
    _NEEDS_BLOCK = flags.DEFINE_bool(
        "needs_block", True, "Leave out traces without a block."
    )
    _QUESTION = flags.DEFINE_string("question", "", "Column; default as of data.sft.")
    _RESPONSE = flags.DEFINE_string(
        "response", "", "Column, or several that follow each other: THINKING+ANSWER."
    )
    _ANSWER = flags.DEFINE_string("answer", "", "Column; default as of data.sft.")
    cli.run(main, most_arguments=1)
