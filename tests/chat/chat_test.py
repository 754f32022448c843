"""Tests of pr1_jax.chat: answers, checkpoints, wrong input, terminals and pipes."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pyte
import pytest
import rich.console

from configs import rl_alternating
from pr1_jax import tags
from pr1_jax.chat import command, view
from pr1_jax.chat.opening import load
from pr1_jax.chat.session import Chat, Opened
from pr1_jax.data import traces
from pr1_jax.data.prompts import Template
from pr1_jax.huggingface import usage
from pr1_jax.sampler.settings import Settings
from pr1_jax.system import files
from tests.helpers import growing
from tests.helpers.growing import LEFT, REST, RIGHT, THIRD

LIMITS = rl_alternating.get_config("smoke").rollout
POSITIONS = LIMITS.max_prompt_tokens + LIMITS.max_response_tokens
QUESTION = "Which number has a partner 4 larger? A 12 16 B 51 30 C 47 25 D 20 55"


def opened(tokenizer, **settings):
    settings = {"max_prompt_tokens": 300, "max_response_tokens": 600} | settings
    read_params = lambda: jnp.zeros(())
    template = Template("plain")
    return Opened(
        None, tokenizer, Settings(**settings), template, "made up", read_params
    )


def scripted(tokenizer, question, response, **kwargs):
    """A chat whose model writes `response`, a token at its position in its path."""
    prompt = tokenizer.encode(question)
    wanted = traces.from_text(prompt, response, tokenizer, variant="structured")
    paths = max(2, wanted.path.max())
    table = np.zeros((paths, wanted.positions.max() + 2), np.int32)
    table[np.maximum(wanted.path - 1, 0), wanted.positions] = wanted.tokens

    def decode_fn(params, lanes, state, num_lanes):
        del params, num_lanes
        token = jnp.asarray(table)[lanes.index % paths, lanes.position + 1]
        return 60.0 * jax.nn.one_hot(token, tokenizer.vocab_size), state.cache

    settings = opened(tokenizer, num_paths=int(paths), summary_reserve=60)
    return Chat(settings, decode_fn=decode_fn, **kwargs)


def watched(asked, question):
    """The record, and all that a watcher sees."""
    seen = []
    return asked.ask(question, watch=seen.append), seen


@pytest.fixture(scope="module")
def three(by_bytes):
    """The same with three paths, and much before them."""
    response = growing.text_of(LEFT, RIGHT, THIRD, before=f"{THIRD}\n\n{LEFT} ")
    asked = scripted(by_bytes, "2+2?", response, steps_per_chunk=1)
    return asked, *watched(asked, "2+2?")


@pytest.fixture(scope="module")
def wild(by_bytes):
    """A chat whose model likes tags, and may write them anywhere."""
    size = by_bytes.vocab_size
    liked = np.zeros(size)
    liked[list(by_bytes.tag_ids.values())] = 3.0

    def decode_fn(params, lanes, state, num_lanes):
        del params, lanes
        return jnp.broadcast_to(jnp.asarray(liked), (num_lanes, size)), state.cache

    made = opened(by_bytes, ban_illegal=False, num_paths=3, max_response_tokens=90)
    told = []
    return Chat(
        made, decode_fn=decode_fn, seed=5, steps_per_chunk=5, notify=told.append
    ), told


# --- Answers ------------------------------------------------------------------------


def test_a_watched_response_is_the_response(by_bytes, three):
    asked, record, seen = three
    plain = asked.ask("2+2?")
    assert record["seconds"] > 0
    assert plain | {"seconds": record["seconds"]} == record
    text = record["response"]
    assert LEFT in text and RIGHT in text and THIRD in text and text.endswith(REST)
    assert record["finished"] and record["format_ok"] and record["num_blocks"] == 1
    assert record["final_answer"] == "6"
    assert record["total_tokens"] > 1.2 * record["sequential_steps"]
    assert "".join(record["trace"]["pieces"]) == text + by_bytes.hf_tokenizer.eos_token
    assert json.loads(json.dumps(record)) == record
    # It is seen growing by a step each time.
    for part, wanted in zip(seen, growing.steps(by_bytes, "2+2?", text), strict=True):
        assert part.sequential_steps == wanted.sequential_steps
        assert part.finished == wanted.finished
        for name in ("tokens", "positions", "block", "path"):
            np.testing.assert_array_equal(getattr(part, name), getattr(wanted, name))


def test_questions_draw_anew_and_a_seed_repeats_them(wild):
    asked, told = wild
    command.command(asked, "/seed 5")
    first, second = (asked.ask("a")["response"] for _ in range(2))
    assert first != second
    command.command(asked, "/seed 5")
    assert [asked.ask("a")["response"] for _ in range(2)] == [first, second]
    assert len([text for text in told if "compiling, once" in text]) == 1


def test_blocks_can_be_banned(three):
    asked, record, _ = three
    assert record["num_blocks"] == 1
    asked.parallel = False
    assert asked.ask("2+2?")["num_blocks"] == 0
    asked.parallel = True


def test_commands(by_bytes):
    asked = Chat(opened(by_bytes))
    said = {
        "/ban": "banned",
        "/ban ": "allowed",
        "/paths 3": "paths is 3",
        "/temperature 0.5": "0.5",
        "/seed 7": "seed is 7",
        "/paths 9": "--num_paths=9 must be from 2 to 8",
        "/temperature -1": "--temperature=-1.0 must not",
        "/temperature nan": "--temperature=nan must not",
        "/seed -1": "--seed=-1 must be",
        "/paths": "needs one number",
        "/paths a": "needs one number",
        "/paths 3 4": "needs one number",
        "/nothing": "no such command",
        "/help": "/again",
        "/'": "no such command",
    }
    for line, words in said.items():
        assert words in command.command(asked, line), line
    assert asked.settings.num_paths == 3 and asked.settings.temperature == 0.5
    assert asked.parallel and asked.seed == 7


def test_labels_of_planned_paths_stay(by_bytes):
    labels = (" 1", " 2", " 3")
    given = {"planned": True, "num_paths": 3, "path_labels": labels}
    asked = Chat(dataclasses.replace(opened(by_bytes, **given), labels=labels))
    assert "2 to 3 planned paths with the labels 1, 2, 3" in asked.about
    told = command.command(asked, "/labels")
    assert "the model plans its paths" in told and asked.settings.path_labels == labels
    assert "\n" not in told
    told = command.command(asked, "/paths 4")
    assert told.endswith("labels for 3 paths; take fewer")


def test_sections_hold_every_token_once(by_bytes, wild):
    """Also where a model writes tags that mean nothing there."""
    asked, _ = wild
    blocks = stray = 0
    for _ in range(8):
        record, seen = watched(asked, "a")
        stray += not record["format_ok"]
        for part in seen:
            found = view.sections(part, by_bytes.tag_ids, by_bytes.eos_ids)
            held = [t for s in found for stream in s.streams for t in stream]
            rest = iter(part.tokens.tolist())
            assert all(token in rest for token in held)  # in this order
        kinds = [s.kind for s in found]
        assert kinds.count(view.BLOCK) == part.num_blocks
        # <Parallel>, </Parallel>, newline
        assert len(part.tokens) - len(held) == 3 * part.num_blocks
        blocks += part.num_blocks
    assert blocks > 8 and stray


# --- Checkpoints --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_chat(workdir):
    """A chat with the run, without blocks: there is less to compile."""
    return load(workdir, parallel=False)


def test_a_run_and_its_export_are_the_same_model(run_chat, exported):
    mine, theirs = run_chat, load(exported)
    for asked in (mine, theirs):
        assert asked.task is not None and asked.template.name == "plain"
        prompt = asked.prompt(f" {QUESTION} ")
        assert asked.tokenizer.decode(prompt) == QUESTION + "\n"
        assert asked.prompt(asked.example()).size > 10
    jax.tree.map(np.testing.assert_array_equal, mine.params, theirs.params)
    assert mine.model == theirs.model and mine.settings == theirs.settings


def test_a_folder_is_asked_as_it_says_or_by_a_guess(exported, tmp_path):
    file = shutil.copytree(exported, tmp_path / "copy") / usage.FILE
    said = json.loads(file.read_text())
    assert said.pop("bos") == "auto" and usage.read(file.parent).bos == "auto"
    said["template"] = "instruction"
    said["sampling"] |= {"num_paths": 3, "path_labels": (), "max_sequential_steps": 0}
    file.write_text(json.dumps(said))
    assert usage.read(file.parent).bos == "no"  # as older versions did
    asked = load(file.parent)
    assert asked.template.name == "instruction" and asked.settings.num_paths == 3
    limit = f"up to {LIMITS.max_response_tokens} tokens"
    said = f"template instruction, structured, 3 paths, {limit}: as {file} says"
    assert asked.about == said
    changed = load(file.parent, template="plain", num_paths=2, max_response_tokens=100)
    assert changed.template.name == "plain" and changed.settings.num_paths == 2
    assert changed.settings.max_prompt_tokens == POSITIONS - 100
    assert changed.about.endswith("but for what is given")
    file.unlink()
    asked = load(file.parent)
    assert asked.template.name == "plain" and "guessed" in asked.about
    settings = asked.settings
    assert settings.max_response_tokens + settings.max_prompt_tokens == POSITIONS


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("template", "poem", "template='poem' is not one of"),
        ("bos", "never", "bos='never' is not one of"),
        ("sampling", [], r"sampling=\[\] is not an object"),
        ("num_paths", "3", "num_paths='3' is not of type int"),
        ("num_paths", 99, "num_paths=99 must be from 2 to 8"),
        ("top_p", float("nan"), "top_p=nan must be"),
        ("path_labels", " 1", "path_labels=' 1' is not of type list"),
        ("path_labels", [" 1", 2], r"path_labels=\[' 1', 2\] must hold texts"),
        ("path_labels", [" 1", " one"], "path_labels: ' one' is no text of the tok"),
        ("max_sequential_steps", 2, "max_sequential_steps=2 leaves no room"),
    ],
)
def test_a_folder_that_says_nonsense_is_named(exported, tmp_path, field, value, words):
    file = shutil.copytree(exported, tmp_path / "copy") / usage.FILE
    said = json.loads(file.read_text())
    (said if field in said else said["sampling"])[field] = value
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"{file}: .*{words}"):
        load(file.parent)


def test_wrong_input_is_named_before_anything_is_read(workdir, exported, tmp_path):
    empty, bare, other = (tmp_path / name for name in ("empty", "bare", "other"))
    for folder in (empty, bare, other):
        folder.mkdir()
    config = rl_alternating.get_config("smoke")
    files.write_json(bare / "config.json", config.to_dict())
    (other / "config.json").write_text('{"model_type": "mamba"}')
    cases = [
        ((tmp_path / "no",), {}, r"--checkpoint=.*no: no such folder"),
        ((empty,), {}, r"--checkpoint=.*empty has no config.json: neither"),
        ((bare,), {}, r"--checkpoint=.*bare: no checkpoint in"),
        ((other,), {}, r"model_type='mamba' is not of"),
        ((workdir,), {"number": 9}, r"--checkpoint_number=9: .*\[4\]"),
        ((exported,), {"number": 9}, r"--checkpoint_number=9: .* is a Hugging Face"),
        (
            *((exported,), {"max_response_tokens": POSITIONS}),
            rf"--max_tokens={POSITIONS}: .* {POSITIONS} pos",
        ),
        ((workdir,), {"max_response_tokens": 0}, r"--max_tokens=0 must be"),
        ((workdir,), {"num_paths": 9}, r"--num_paths=9 must be from 2 to 8"),
        ((workdir,), {"top_p": 0.0}, r"--top_p=0.0 must be"),
        ((workdir,), {"temperature": float("nan")}, r"--temperature=nan must"),
    ]
    for arguments, settings, words in cases:
        with pytest.raises((ValueError, OSError), match=words) as caught:
            load(*arguments, **settings)
        assert "\n" not in str(caught.value)
    asked = load(workdir)
    for question, words in (
        ("", "the question is empty"),
        ("Why?", r"only knows questions like: Which number .*'W'"),
        (
            QUESTION + " 1" * 20,
            rf"has \d+ tokens in the template plain, .* have {LIMITS.max_prompt_tokens}",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            asked.ask(question)
    assert "params" not in vars(asked)  # not read yet
    with pytest.raises(ValueError, match="has no chat template"):
        load(workdir, template="chat").ask(QUESTION)


def test_a_model_that_never_saw_a_tag_gets_the_instruction(
    by_bytes, exported, tmp_path
):
    """Tags that the tokenizer lacks get rows of their own."""
    from pr1_jax.data.tokenizer import Tokenizer
    from pr1_jax.huggingface import weights
    from pr1_jax.model.config import ModelConfig
    from pr1_jax.model.params import init_params, unbox

    plain = Tokenizer(by_bytes.hf_tokenizer)
    backend = json.loads(plain.hf_tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [
        token for token in backend["added_tokens"] if token["content"] not in tags.TAGS
    ]
    shape = ModelConfig(
        vocab_size=257, num_layers=1, width=16, num_heads=2, num_kv_heads=1,
        head_dim=8, mlp_width=16,
    )  # fmt: skip
    params = unbox(init_params(shape, jax.random.key(0)))
    weights.save_params(tmp_path / "m", params, shape, plain, max_positions=4096)
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(backend))
    asked = load(tmp_path / "m", max_response_tokens=32)
    assert asked.template.name == "instruction" and asked.task is None
    text = asked.tokenizer.decode(asked.prompt("2+2?"))
    assert "think in parallel" in text and text.endswith("2+2?\n\nSolution:\n")
    assert asked.params["embedding"].shape == (263, 16)
    assert asked.model.vocab_size == 263


# --- The command --------------------------------------------------------------------


def test_in_a_pipe_answers_are_all_that_is_written(run_chat, monkeypatch, capsys):
    lines = f"{QUESTION}\n\nWhy?\n{QUESTION}\n"

    def answers(**settings):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        code = command.run(run_chat, None, drawn=False, pace=0, **settings)
        return code, capsys.readouterr()

    code, written = answers(as_json=True)
    assert code == 2  # for the line that is no question
    first, wrong, last = map(json.loads, written.out.splitlines())
    assert first["question"] == last["question"] == QUESTION
    assert {"response", "total_tokens", "sequential_steps", "num_blocks"} <= {*first}
    assert {"finished", "seconds", "logp", "trace"} <= {*first}
    assert {*wrong} == {"question", "error"}
    assert written.err.startswith("error: line 3: the model only knows")
    assert written.err.count("\n") == 1
    run_chat.asked = 0
    _, written = answers(as_json=False)
    texts = [record["response"].strip("\n") for record in (first, last)]
    assert written.out == "\n\n".join(texts) + "\n"


def test_a_response_does_not_steer_a_terminal_that_cannot_draw(monkeypatch, capsys):
    """As with TERM=dumb; a pipe gets the text as it is."""
    text = "\x1b]0;title\x07\x1b[2Jfive\r\x9b31m\u202e\tsix\n"
    stand_in = types.SimpleNamespace(ask=lambda question: {"response": text})
    assert command.answer_plainly(stand_in, ["?"], as_json=False) == 0
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command.answer_plainly(stand_in, ["?"], as_json=False) == 0
    shown = capsys.readouterr().out
    assert shown == "␛]0;title␇␛[2Jfive␍\ufffd31m\ufffd    six\n"


def test_a_wrong_question_is_one_line(workdir):
    question = QUESTION + " 1" * 20
    done = subprocess.run(
        [sys.executable, "-m", "pr1_jax.chat", workdir, f"--question={question}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: --question={question[:60]}: ")
    assert done.stderr.count("\n") == 1


def open_terminal(arguments, width=80, height=24):
    """Starts the command in a terminal of its own."""
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (height, width))
    process = subprocess.Popen(
        [sys.executable, "-c", _AS_LEADER, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"},
    )
    os.close(theirs)
    return process, mine


# Ctrl-C reaches those whose controlling terminal it is.
_AS_LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "pr1_jax.chat", *sys.argv[1:]])
"""


def test_ctrl_c_where_nothing_is_answered_says_how_to_leave(three, monkeypatch):
    typed = iter([KeyboardInterrupt, KeyboardInterrupt, EOFError])

    def type_next(prompt):
        raise next(typed)

    monkeypatch.setattr("builtins.input", type_next)
    console = rich.console.Console(file=io.StringIO())
    terminal = command.Terminal(three[0], console)
    assert terminal.converse() == 0
    assert console.file.getvalue().count("Ctrl-D leaves") == 2


def test_ctrl_c_stops_a_response_and_ctrl_d_leaves(workdir):
    arguments = f"--checkpoint={workdir}", "--pace=4", "--no_parallel"
    process, terminal = open_terminal(arguments)
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)

    def press_until(words, keys=b"", again=False):
        """Types keys, each few seconds again if need be, until the screen shows it."""
        end, shown = time.monotonic() + 120, ""
        typed = 0.0
        while not re.search(words, shown):
            now = time.monotonic()
            assert now < end, shown
            if keys and (not typed or again and now > typed + 3):
                os.write(terminal, keys)
                typed = now
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    stream.feed(os.read(terminal, 1 << 16))
                except OSError:  # the other end is closed
                    assert process.wait(30) == 0
                    return
            shown = "\n".join(line.rstrip() for line in screen.display).rstrip()

    try:
        press_until(r"Enter alone(.|\n)*\n>$")
        # Something of the response.
        press_until(r"\n> Which(.*\n){2}.*\w", f"{QUESTION}\n".encode())
        press_until(r"steps · .*stopped\n\n>", b"\x03")
        # A key that comes before the line editor waits for it may be lost.
        press_until("this is never shown", b"\x04", again=True)
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        os.close(terminal)
