"""Templates of prompts that are files of the user."""

import copy

import pytest

from pr1_jax import tags
from pr1_jax.data import prompts, templates

QUESTION = " 1+1? \n"


def read(tmp_path, text, instruction="", labels=()):
    """The template of a file with this text, and perhaps an instruction that is one."""
    (tmp_path / "mine.jinja").write_text(text)
    told = tmp_path / "told.txt"
    told.write_text(instruction)
    given = str(tmp_path / "mine.jinja"), str(told) if instruction else ""
    return prompts.read_template(*given, labels=labels)


def text_of(template, tokenizer, question=QUESTION, **settings):
    ids = prompts.prompt_tokens(question, tokenizer, template=template, **settings)
    return tokenizer.decode(ids)


def test_a_file_can_say_what_the_built_in_templates_say(by_bytes, tmp_path):
    files = {
        "plain": "{{ question }}\n",
        "instruction": "{{ instruction }}\n\nProblem: {{ question | trim }}\n\n"
        "Solution:\n\n",  # of the newlines at its end one is the file's
    }
    for name, text in files.items():
        ours = prompts.prompt_tokens(QUESTION, by_bytes, template=name)
        mine = read(tmp_path, text)
        assert prompts.prompt_tokens(QUESTION, by_bytes, template=mine).tolist() == (
            ours.tolist()
        )


def test_an_instruction_may_be_a_file(by_bytes, tmp_path, monkeypatch):
    told = "Think in two ways.\n"
    mine = read(tmp_path, "{{ instruction }}|{{ question }}", told)
    assert text_of(mine, by_bytes, "q") == "Think in two ways.|q"
    ours = prompts.read_template("instruction", str(tmp_path / "told.txt"))
    asked = "Think in two ways.\n\nProblem: 1+1?\n\nSolution:\n"
    assert text_of(ours, by_bytes) == asked
    chat = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    monkeypatch.setattr(by_bytes.hf_tokenizer, "chat_template", chat)
    ours = prompts.read_template("chat", str(tmp_path / "told.txt"))
    assert text_of(ours, by_bytes, "q") == "system:Think in two ways.;user:q;"


def test_what_a_file_may_name(by_bytes, tmp_path):
    text = """\
{% for label in labels %}{{ tags.path }}{{ label }}{{ tags.end_path }}{% endfor %}
{% for turn in messages %}{{ turn.role }}={{ turn.content }};{% endfor %}
{% if planned %}{{ tags.plan }}{% endif %}{{ eos_token }}
"""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    mine = read(tmp_path, text, labels=(" 1", " 2"))
    expected = "<Path> 1</Path><Path> 2</Path>user=a;"
    assert text_of(mine, by_bytes, messages=turns) == expected  # EOS is not shown
    planned = copy.deepcopy(by_bytes)
    planned.use_plans()
    assert text_of(mine, planned, messages=turns) == expected + tags.PLAN
    names = {t.strip("<>").lower().replace("/", "end_") for t in tags.TAGS}
    assert {*prompts.variables("q", by_bytes, mine)["tags"]} == names


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\n{{ nothing }}", "mine.jinja, line 2: 'nothing' is undefined (its variab"),
        ("{{ tags.pat }}", "mine.jinja, line 1: 'dict object' has no attribute 'pat'"),
        ("\n\n{% if %}", "mine.jinja, line 3: Expected an expression, got"),
        ("{{ 1 /\n 0 }}", "mine.jinja, line 1: division by zero"),
        (
            "{{ question.__class__ }}",
            "line 1: access to attribute '__class__' of 'str'",
        ),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append' of 'list'"),
        ("{% include '/etc/passwd' %}", "line 1: no loader for this environment"),
        ("{{ [1, 2] | random }}", "line 1: No filter named 'random'"),
        ("{{ raise_exception('no\nway') }}", "line 1: no way"),
        ("{{ 'a' * 10 ** 10 }}", "it needs more memory than 1 GiB"),
        ("{{ 'a' * 10 ** 7 }}", "it wrote more than 1,0"),
    ],
)
def test_what_fails_names_file_line_and_variable(by_bytes, tmp_path, text, said):
    mine = read(tmp_path, text)
    with pytest.raises(ValueError) as error:
        text_of(mine, by_bytes)
    message = str(error.value)
    assert message.startswith(f"data.template={tmp_path}/mine.jinja: ")
    assert said in message and message.isprintable()
    assert text_of(read(tmp_path, "{{ question }}"), by_bytes, "q") == "q"


def test_a_file_that_takes_too_long(by_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "LIMIT_SEC", 0.3)
    loops = (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="mine.jinja: it took more than 0.3 s of proc"):
        text_of(read(tmp_path, loops), by_bytes)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" \n")
    for template, instruction, said in (
        ("no.jinja", "", "data.template=.*no.jinja: No such file or directory"),
        ("bytes.jinja", "", "data.template=.*bytes.jinja is not UTF-8 text"),
        ("chat", "no.txt", "data.instruction=.*no.txt: No such file or directory"),
        ("chat", "empty.txt", "data.instruction=.*empty.txt is empty"),
    ):
        if template.endswith(".jinja"):
            template = str(tmp_path / template)
        instruction = instruction and str(tmp_path / instruction)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            prompts.read_template(template, instruction)
