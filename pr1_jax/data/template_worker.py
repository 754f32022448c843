"""The process that renders chat templates for `templates.py`.

It is run as a script, with its memory in bytes as the argument, so that it imports
neither the package nor the training program. Each line of the input is a JSON object
with `template`, `messages`, `names`, `limit_sec` and `max_chars`, each of the output one
with `text` or `error`.
"""

import json
import os
import resource
import signal
import sys
from typing import Any


def _render(request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [
        {name: value for name, value in message.items() if value is not None}
        for message in request["messages"]
    ]
    # Processor time, so that it does not depend on what else the machine does. It
    # kills this process, even inside C code.
    signal.setitimer(signal.ITIMER_PROF, request["limit_sec"])
    (text,), _ = render_jinja_template(
        [chat],
        chat_template=request["template"],
        add_generation_prompt=True,
        **request["names"],
    )
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
