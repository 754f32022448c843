"""Many responses to many problems, kept on disk and resumed.

Responses are written a chunk of problems at a time; what a file holds already is not
sampled again.
"""

import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pr1_jax.data import prompts
from pr1_jax.stages import rollout
from pr1_jax.stages.experiment import Experiment
from pr1_jax.system import files, processes


def sample(
    experiment: Experiment,
    params: Any,
    path: pathlib.Path,
    problems: Sequence[prompts.Problem],
    *,
    mode: str,
    samples: int,
    purpose: str = "eval",
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Samples what `path` lacks, a chunk of problems at a time.

    Draws depend on the purpose and on the response's number alone, so that modes differ
    by the mode and not by luck.

    Args:
      path: a .jsonl file of the records; process 0 writes it.
      mode: of decoding, one of `checks.MODES`.
      samples: responses to each problem.
      purpose: of the random key.

    Yields:
      The number of problems done, and the records of all their responses so far,
      problem-major: `Response.record`, `problem`, `sample`, and `seconds` (wall-clock
      of the chunk, a response); first what the file held.
    """
    size = max(1, math.ceil(4 * experiment.config.rollout.rows / samples))
    starts = range(0, len(problems), size)
    records = _resume(path, [samples * len(problems[i : i + size]) for i in starts])
    yield len(records) // samples, records
    if len(records) == samples * len(problems):
        return
    sampler = experiment.sampler(samples, mode)
    sampler.warm_up(params)
    for start in starts[math.ceil(len(records) / samples / size) :]:
        asked = problems[start : start + size]
        began = time.perf_counter()
        responses, _ = rollout.sample_and_score(
            experiment,
            sampler,
            params,
            processes.share(asked),
            samples,
            experiment.key(purpose),
            first=start * samples,
        )
        everyones = processes.gather([r.record() for r in responses], samples)
        seconds = (time.perf_counter() - began) / len(everyones)
        new = [
            {
                "problem": start + i // samples,
                "sample": i % samples,
                **record,
                "seconds": seconds,
            }
            for i, record in enumerate(everyones)
        ]
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(b"".join(map(files.json_line, new)))
        records = records + new
        yield start + len(asked), records


def _resume(path: pathlib.Path, chunks: Sequence[int]) -> list[dict[str, Any]]:
    """Records of the whole chunks in a file; cuts off what follows them."""
    held = files.read_json_lines(path)
    ends = [0, *np.cumsum(chunks).tolist()]
    whole = held[: max(end for end in ends if end <= len(held))]
    if path.exists() and jax.process_index() == 0:
        files.write_json_lines(path, whole)
    return whole
