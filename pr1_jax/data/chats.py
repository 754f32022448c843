"""Chats as data: lists of messages, of which one side was written by an assistant.

A chat comes as `[{"role": "user", "content": "…"}, …]` or, as ShareGPT wrote them,
`[{"from": "human", "value": "…"}, …]`. A content may be a list of parts that are all
text. Both may be written as JSON in a column of text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_ROLES = {  # their names, in small letters, by what they are called here
    USER: ("human", "prompter"),
    ASSISTANT: ("gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "ai", "model"),
    SYSTEM: (),
}
_ROLES = {name: role for role, names in _ROLES.items() for name in (role, *names)}

Message = dict[str, str]  # role, content, and other texts


def read(value: Any) -> list[Message]:
    """The messages of a chat, in the roles of chat templates; none if it is no chat.

    What is neither role nor content and no text is left out.
    """
    messages = [_message(item) for item in _items(value)]
    return messages if all(messages) else []


def fault(value: Any) -> str:
    """Which message makes a list of messages no chat; "" if the value is no such list."""
    items = _items(value)
    if not any(isinstance(x, Mapping) and {"role", "from"} & {*x} for x in items):
        return ""
    wrong = [number for number, item in enumerate(items, 1) if not _message(item)]
    return f"message {wrong[0]} has no role with a content of text" if wrong else ""


def _items(value: Any) -> list[Any]:
    """The items of a list, or of one that is written as JSON; else none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return list(value) if isinstance(value, list | tuple | np.ndarray) else []


def _message(item: Any) -> Message:
    """One message; empty if it is none."""
    if not isinstance(item, Mapping):
        return {}
    rest = dict(item)
    role, sender = rest.pop("role", None), rest.pop("from", None)
    content, value = rest.pop("content", None), rest.pop("value", None)
    role = sender if role is None else role  # a table of both kinds has both columns
    content = _text(value if content is None else content)
    if not isinstance(role, str) or content is None:
        return {}
    others = {name: x for name, x in rest.items() if isinstance(x, str)}
    return {"role": _ROLES.get(role.lower(), role), "content": content} | others


def _text(content: Any) -> str | None:
    """A content as text: it may be a list of `{"type": "text", "text": "…"}`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | np.ndarray) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return None
    return "".join(texts) if texts else None


def solution(messages: Sequence[Message]) -> str:
    """The last turn of the assistant; "" if it has none, or a blank one."""
    return _last(messages, ASSISTANT)


def before_solution(messages: Sequence[Message]) -> list[Message]:
    """What precedes the last turn of the assistant; all if it has none."""
    ends = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT]
    return list(messages[: ends[-1] if ends else None])


def without_solution(messages: Sequence[Message]) -> list[Message]:
    """The messages without the turns of the assistant at their end.

    Nor with what a system says behind these, to which nobody answered.
    """
    end = len(messages)
    for i in reversed(range(len(messages))):
        if messages[i]["role"] not in (ASSISTANT, SYSTEM):
            break
        end = i if messages[i]["role"] == ASSISTANT else end
    return list(messages[:end])


def question(messages: Sequence[Message]) -> str:
    """The last turn of the user; "" if it has none, or a blank one."""
    return _last(messages, USER)


def _last(messages: Sequence[Message], role: str) -> str:
    said = [m["content"] for m in messages if m["role"] == role]
    return said[-1] if said and said[-1].strip() else ""
