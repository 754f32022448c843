"""The Hugging Face hub: which names are looked up there, and which files are taken.

Nothing is downloaded unless the config names it as OWNER/NAME, and then only data: JSON,
safetensors, tokenizer models and chat templates; no code, and no weights in a format
that can hold code.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import logging

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja")


def looks_local(name: str) -> bool:
    """Whether a name is a path, and so is never looked up on the hub.

    It is one if it is absolute, begins with a dot or `~`, is not OWNER/NAME, ends as a
    file of a tokenizer does, or if its first folder exists.
    """
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith((".json", ".model", ".safetensors"))
        or len(path.parts) != 2
        or os.path.exists(path.parts[0])
    )


def download(name: str, patterns: Sequence[str] = _PATTERNS) -> Path:
    """The local folder of a model of the hub, downloaded unless it is there already.

    Raises:
      ValueError: the hub does not give it; names it and says why, in one line.
    """
    import huggingface_hub  # slow to import, and seldom needed

    logging.info("loading %s of %s from the Hugging Face hub", patterns, name)
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=[*patterns])
    except Exception as error:  # many kinds, network ones among them
        reason = " ".join(str(error).split())[:200]
        text = f"{name} is no local folder, and the hub says: {reason}"
        raise ValueError(text) from error
    return Path(folder)
