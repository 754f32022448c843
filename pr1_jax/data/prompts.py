"""Prompts: a problem and the tokens that put it to the model."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pr1_jax import tags
from pr1_jax.data import chats
from pr1_jax.data.tokenizer import Tokenizer

TEMPLATES = ("plain", "instruction", "chat", "own")
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


def prompt_tokens(
    question: str,
    tokenizer: Tokenizer,
    *,
    template: str,
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
        the chat template and without our instruction.
      messages: a chat of the data, for `own`, without its solution: turns of the
        assistant at its end are left out; None = the question alone.
      allow_tags: whether tags that the prompt mentions become their tokens; structure
        begins with the response in any case (docs/method.md, section 2).
    """
    if template not in TEMPLATES:
        raise ValueError(f"data.template={template!r} is not one of {TEMPLATES}")
    asked = {"role": "user", "content": question}
    planned = tags.PLAN in tokenizer.tag_ids
    instruction = PLANNED_INSTRUCTION if planned else INSTRUCTION
    if template == "instruction":
        question = f"{instruction}\n\nProblem: {question.strip()}\n\nSolution:\n"
    elif template == "chat":
        told = {"role": "system", "content": instruction}
        question = tokenizer.chat_prompt([told, asked])
    elif template == "own":
        turns = chats.without_solution(messages or [])
        question = tokenizer.chat_prompt(turns or [asked])
    ids = tokenizer.encode(question, allow_tags=allow_tags)
    is_chat = template in ("chat", "own")
    return np.array(tokenizer.with_bos(ids, is_chat=is_chat), np.int32)
