"""Records that no prompt can be made of: refused with a message, or dropped."""

import json

import pytest

from pr1_jax.data import prompts, streams, templates
from pr1_jax.data.sources import open_source


def open_rows(tmp_path, *rows, name="a.jsonl", **kwargs):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (tmp_path / name).write_text(text)
    return open_source(str(tmp_path / name), "train", seed=0, **kwargs)


def refused(tmp_path, *rows):
    with pytest.raises(ValueError) as error:
        open_rows(tmp_path, *rows, strict=True)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000 and str(tmp_path) in text
    return text


@pytest.mark.parametrize("field", ["question", "answer"])
def test_half_a_character_is_refused_with_its_place(tmp_path, field):
    row = {"question": "q", "answer": "1"} | {field: "x"}
    broken = json.dumps(row).replace('"x"', r'"\ud83d"')
    text = refused(tmp_path, {"question": "q", "answer": "1"}, broken)
    assert f"a.jsonl:2: the {field} holds '\\ud83d', half a character" in text


def test_half_a_character_in_a_message_is_refused(tmp_path):
    row = r'{"question": [{"role": "user", "content": "\udc00"}], "answer": "1"}'
    assert "half a character: save the data as UTF-8 anew" in refused(tmp_path, row)


def test_what_is_no_text_of_a_message_is_left_out(tmp_path):
    message = {"role": "user", "content": "q", "name": "n", "tools": [1], "at": None}
    (row,) = open_rows(tmp_path, {"question": [message], "answer": "1"})
    assert json.loads(row["messages"]) == [
        {"role": "user", "content": "q", "name": "n"}
    ]


def test_messages_about_many_columns_stay_short(tmp_path):
    text = refused(tmp_path, {f"a\nlong name {i}": i for i in range(1000)})
    assert "no column 'question'" in text


def test_folders_that_are_named_as_files_are_passed_over(tmp_path):
    (tmp_path / "data" / "b.jsonl").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text('{"question": "q", "answer": "1"}')
    assert len(open_source(str(tmp_path / "data"), "train", seed=0)) == 1
    with pytest.raises(ValueError, match="has no .jsonl"):
        open_source(str(tmp_path / "data" / "b.jsonl"), "train", seed=0)


def test_empty_prompts_are_dropped_and_counted(by_bytes):
    source = [{"question": q, "answer": "1"} for q in ("", "q", "")]
    stream = streams.problem_stream(
        source,
        by_bytes,
        template="plain",
        max_prompt_tokens=9,
        batch_size=1,
        seed=0,
        epochs=1,
    )
    assert [problem.question for (problem,) in stream] == ["q"]
    assert stream.counts == {"kept": 1, "prompt_empty": 2}


def test_an_empty_held_out_prompt_is_refused(by_bytes):
    source = [{"question": "", "answer": "1"}]
    with pytest.raises(ValueError, match="held-out problem 0 has an empty prompt"):
        streams.held_out(
            source, by_bytes, template="plain", max_prompt_tokens=9, limit=3
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no \x1b[2J role\nat all') }}",
        "{{ messages[0] + 1 }}",
        "{% if %}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(by_bytes, monkeypatch, template):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="does not take messages of .*'user'") as error:
        prompts.prompt_tokens("q", by_bytes, template="own")
    assert str(error.value).isprintable()


def test_chat_templates_have_limits_of_time_memory_and_length(by_bytes, monkeypatch):
    """Each is said with the way out, and the next template is rendered as ever."""
    monkeypatch.setattr(templates, "LIMIT_SEC", 0.5)
    loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}"
    cases = {
        loops + "{% endfor %}": "took more than 0.5 s of processor time",
        "{{ 'a' * 2**30 }}": "needs more memory than 1 GiB",
        "{{ 'a' * messages[0].content | length * 2**30 }}": "more memory than 1 GiB",
        "{{ 'a' * 10**6 * 2 }}": "wrote more than 1,000,",
    }
    for template, why in cases.items():
        monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", template)
        with pytest.raises(
            ValueError, match=f"{why}.* mend its chat_template.* data.te"
        ):
            prompts.prompt_tokens("q", by_bytes, template="own")
    fine = "{% for m in messages %}{{ m.content * 100000 }}{% endfor %}"
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", fine)
    assert by_bytes.chat_prompt([{"role": "user", "content": "é"}]) == "é" * 100000


def test_another_process_renders_after_one_that_was_killed(by_bytes, monkeypatch):
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", "{{ messages }}")
    asked = [{"role": "user", "content": "\ud800 a"}]
    first = by_bytes.chat_prompt(asked)
    templates._worker.process.kill()
    assert by_bytes.chat_prompt(asked) == first
