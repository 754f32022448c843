"""The process that renders templates of prompts for `templates.py`.

It is run as a script, with its memory in bytes as the argument, so that it imports
neither the package nor the training program. Each line of the input is a JSON object
with `template`, `names`, `limit_sec` and `max_chars`, and with `messages` for a chat
template or `file`, its name, for one that is a file; each of the output one with `text`
or `error`.
"""

import functools
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any


@functools.lru_cache(maxsize=8)
def _compiled(template: str, file: str) -> Any:
    """A template that is a file: sandboxed, and strict with names that it has not."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    known = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    del known.filters["random"], known.globals["lipsum"]  # a run repeats itself
    known.globals["raise_exception"] = raise_exception
    code = known.compile(template, file, file)
    return jinja2.Template.from_code(known, code, known.globals)


def _in_words(error: Exception, file: str) -> str:
    """An error with the line of the template that it comes from."""
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{file}, line {error.lineno}: {error.message}"
    said = str(error).strip() or type(error).__name__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == file:
            return f"{file}, line {frame.lineno}: {said}"
    return f"{file}: {said}"


def _render_file(request: dict[str, Any]) -> str:
    file, names = request["file"], request["names"]
    try:
        return _compiled(request["template"], file).render(names)
    except MemoryError:
        raise
    except Exception as error:
        known = ", ".join(sorted(names))
        text = f"{_in_words(error, file)} (its variables are {known})"
        raise ValueError(text) from error


def _render_chat(request: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [
        {name: value for name, value in message.items() if value is not None}
        for message in request["messages"]
    ]
    (text,), _ = render_jinja_template(
        [chat],
        chat_template=request["template"],
        add_generation_prompt=True,
        **request["names"],
    )
    return text


def _render(request: dict[str, Any]) -> dict[str, str]:
    if "file" in request:
        import jinja2  # noqa: F401 (its time does not count)

        render = _render_file
    else:
        import transformers.utils.chat_template_utils  # noqa: F401

        render = _render_chat
    # Processor time, so that it does not depend on what else the machine does. It
    # kills this process, even inside C code.
    signal.setitimer(signal.ITIMER_PROF, request["limit_sec"])
    text = render(request)
    if len(text) > request["max_chars"]:
        return {"error": f"it wrote more than {request['max_chars']:,} characters"}
    return {"text": text}


def main() -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not mix with the replies
    limit, (_, most) = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_AS)
    memory = limit if most < 0 else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        try:
            reply = _render(json.loads(line))
        except MemoryError:
            reply = {"error": f"it needs more memory than {memory / 2**30:g} GiB"}
        except Exception as error:  # noqa: BLE001 (a template raises anything)
            reply = {"error": str(error).strip()[:1000] or type(error).__name__}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
