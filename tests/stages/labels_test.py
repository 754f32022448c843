"""Labels of paths in every stage: out of the loss, in traces, asked for by the format check."""

import numpy as np
import pytest

from configs import rl_alternating
from pr1_jax import tags
from pr1_jax.answers.verdicts import CORRECT
from pr1_jax.data import traces
from pr1_jax.data.prompts import Problem
from pr1_jax.stages import coldstart, experiment, rollout, sft

LABELS = " 7", " 8"
BLOCK = "<Parallel><Path>{} A 1>6 no</Path><Path>{} B 2>7 yes 2</Path></Parallel>\n"
BLOCK += "<Summary> 2</Summary>\nFinal Answer: 2"
BARE, LABELLED = BLOCK.format("", ""), BLOCK.format(*LABELS)


@pytest.fixture(scope="module")
def made():
    config = rl_alternating.get_config("smoke")
    config.rollout.path_labels = LABELS
    return experiment.build(config)


def test_sft_is_on_everything_but_labels(made):
    batch = sft.pack(made, next(sft.open_stream(made)))
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    blocks, labels = 0, made.tokenizer.label_ids(LABELS)
    for row, mask in zip(tokens, batch.loss_mask.reshape(tokens.shape), strict=True):
        starts = np.flatnonzero(row == made.tokenizer.tag_ids[tags.PATH])
        expected = np.zeros_like(mask)
        expected[row.tolist().index(made.tokenizer.newline_id) + 1 :] = True  # prompt
        expected[row.tolist().index(made.tokenizer.eos_id) + 1 :] = False
        for start, label in zip(starts, labels):
            assert tuple(row[start + 1 :][: len(label)]) == label
            expected[start + 1 :][: len(label)] = False
        np.testing.assert_array_equal(mask, expected)
        blocks += len(starts) == 2
    assert blocks > len(tokens) / 4  # half of the traces have a block


def test_traces_of_a_teacher_are_written_with_labels():
    grammar = tags.Grammar(LABELS)
    for text in (BARE, LABELLED):
        attempt = {"question": "q", "response": text, "answer": "2"}
        attempt |= {"finished": True, "verdict": CORRECT}
        kept, _ = coldstart.select([attempt], needs_block=True, grammar=grammar)
        assert kept[0]["response"] == LABELLED


@pytest.mark.parametrize("text, ok", [(BARE, False), (LABELLED, True)])
def test_responses_must_have_their_labels(made, text, ok):
    problem = Problem("q", "2", np.array([5], np.int32))
    t = traces.from_text([5], text, made.tokenizer, variant="structured")
    how = {"timeout_sec": 5.0, "grammar": made.settings.grammar}
    assert rollout.score(problem, t, made.tokenizer, **how).format_ok == ok
