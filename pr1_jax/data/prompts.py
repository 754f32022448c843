"""Prompts: a problem and the tokens that put it to the model (docs/rewards.md)."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pr1_jax import tags
from pr1_jax.data import chats, templates
from pr1_jax.data.tokenizer import Tokenizer

TEMPLATES = ("plain", "instruction", "chat", "own")
FILE_END = ".jinja"  # of a template that is a file
_BLOCK = (  # what stands in a block, after its tag
    "write two or more <Path>…</Path> in it, each an independent attempt at the step "
    "that does not rely on the others, "
)
_PLANNED_BLOCK = (
    "write two or more <Plan>…</Plan> in it, each one sentence that says what a path of "
    "its own is to do, then for each plan, in their order, a <Path>…</Path> that carries "
    "it out and does not rely on the other paths, "
)
INSTRUCTION = (
    "Solve the problem step by step. Where a step is hard or worth checking, think in "
    f"parallel: open a block with <Parallel>, {_BLOCK}close "
    "the block with </Parallel>, and join the paths in <Summary>…</Summary>: what each "
    "of them found, and with which result you go on. Use as many blocks as help, or "
    "none. End with one line of the form Final Answer: …"
)
PLANNED_INSTRUCTION = INSTRUCTION.replace(_BLOCK, _PLANNED_BLOCK)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem and its tokenised prompt."""

    question: str
    answer: str
    prompt: np.ndarray  # int32 token ids


@dataclasses.dataclass(frozen=True)
class Template:
    """How problems are put to the model.

    Attributes:
      name: one of `TEMPLATES`, or the path of a file.
      text: of that file, in Jinja's language.
      instruction: what the model is told, in place of ours; "" = ours.
      labels: of paths, which a file may name.
    """

    name: str
    text: str = ""
    instruction: str = ""
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def read_template(
    name: str, instruction: str = "", *, labels: Sequence[str] = ()
) -> Template:
    """The template of these fields of the config.

    Args:
      name: `data.template`. instruction: `data.instruction`, a file; "" = ours.
      labels: of paths.

    Raises:
      FileNotFoundError, ValueError: a file is not there or not text; names the field.
    """
    is_file = name.endswith(FILE_END)
    return Template(
        name,
        text=_text("data.template", name) if is_file else "",
        instruction=_text("data.instruction", instruction).strip(),
        labels=tuple(labels),
    )


def _text(field: str, path: str) -> str:
    """The text of a file that a field names; "" if it names none."""
    if not path:
        return ""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise FileNotFoundError(f"{field}={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}={path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{field}={path} is empty")
    return text


def check_name(name: str) -> None:
    """Raises ValueError unless a name is one of `TEMPLATES`, or a file's."""
    if name not in TEMPLATES and not name.endswith(FILE_END):
        raise ValueError(
            f"data.template={name!r} is not one of {TEMPLATES}, and no file *{FILE_END}"
        )


def variables(
    question: str,
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[dict[str, str]] | None = None,
) -> dict[str, object]:
    """What a template that is a file may name (docs/rewards.md lists them)."""
    ends = {
        tag: tag.strip("<>").lower().replace("/", "end_") for tag in tokenizer.tag_ids
    }
    return {
        **tokenizer.hf_tokenizer.special_tokens_map,
        "question": question,
        "instruction": _instruction(tokenizer, template),
        "messages": chats.without_solution(messages or []),
        "labels": list(template.labels),
        "planned": tags.PLAN in tokenizer.tag_ids,
        "tags": {name: tag for tag, name in ends.items()},
    }


def _instruction(tokenizer: Tokenizer, template: Template) -> str:
    planned = tags.PLAN in tokenizer.tag_ids
    return template.instruction or (PLANNED_INSTRUCTION if planned else INSTRUCTION)


def prompt_tokens(
    question: str,
    tokenizer: Tokenizer,
    *,
    template: str | Template,
    messages: Sequence[dict[str, str]] | None = None,
    allow_tags: bool = True,
) -> np.ndarray:
    """Token ids of a prompt, int32; BOS is before them as `Tokenizer.with_bos` says.

    Args:
      tokenizer: one that knows plans (`Tokenizer.use_plans`) has the instruction that
        asks for them.
      template: `plain`, the question as it is; `instruction`, with our instruction to
        think in parallel before it; `chat`, by the tokenizer's chat template, with the
        instruction as the system message; `own`, the prompt that the data brings, by
        the chat template and without our instruction; or a `Template`, which may be
        a file's.
      messages: a chat of the data, for `own`, without its solution: turns of the
        assistant at its end are left out; None = the question alone.
      allow_tags: whether tags that the prompt mentions become their tokens; structure
        begins with the response in any case (docs/method.md, section 2).
    """
    if isinstance(template, str):
        template = Template(template)
    name = template.name
    if not template.text:
        check_name(name)
    asked = {"role": "user", "content": question}
    instruction = _instruction(tokenizer, template)
    if template.text:
        named = variables(question, tokenizer, template, messages)
        try:
            question = templates.render_file(
                template.text, os.path.basename(name), named
            )
        except ValueError as error:
            raise ValueError(f"data.template={name}: {error}") from error
    elif name == "instruction":
        question = f"{instruction}\n\nProblem: {question.strip()}\n\nSolution:\n"
    elif name == "chat":
        told = {"role": "system", "content": instruction}
        question = tokenizer.chat_prompt([told, asked])
    elif name == "own":
        turns = chats.without_solution(messages or [])
        question = tokenizer.chat_prompt(turns or [asked])
    ids = tokenizer.encode(question, allow_tags=allow_tags)
    is_chat = name in ("chat", "own")
    return np.array(tokenizer.with_bos(ids, is_chat=is_chat), np.int32)
