"""How a model that was trained here is to be asked: `pr1_jax.json` in its folder.

    {"template": "plain", "bos": "auto", "sampling": {"variant": "structured", "num_paths": 2, …}}

An export writes it, so that nobody asks in another template than was trained. Other
programs pass over the file, and a folder without it loads as well.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from pr1_jax.data import prompts
from pr1_jax.data.tokenizer import BOS
from pr1_jax.system import files

FILE = "pr1_jax.json"


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a model was trained with.

    Attributes:
      template: of prompts, one of `prompts.TEMPLATES`.
      bos: of prompts, one of `tokenizer.BOS`.
      sampling: fields of `sampler.settings.Settings` by name: variant, budgets in
        tokens, deadline, labels of paths, temperature and so on.
    """

    template: str
    bos: str
    sampling: Mapping[str, Any]

    def write(self, folder: str | os.PathLike) -> None:
        """Writes the file into a folder."""
        files.write_json(Path(folder) / FILE, dataclasses.asdict(self))


def read(folder: str | os.PathLike) -> Usage | None:
    """What the file in a folder says; None where there is no file.

    Raises:
      ValueError: the file holds something else; names it and the field.
    """
    file = Path(folder) / FILE
    if not file.exists():
        return None
    raw = files.read_object(file)
    template, sampling = raw.get("template"), raw.get("sampling")
    if template not in prompts.TEMPLATES:
        raise ValueError(
            f"{file}: template={template!r:.200} is not one of {prompts.TEMPLATES}"
        )
    bos = raw.get("bos", "no")  # older versions wrote none, and added none
    if bos not in BOS:
        raise ValueError(f"{file}: bos={bos!r:.200} is not one of {BOS}")
    if not isinstance(sampling, dict):
        raise ValueError(f"{file}: sampling={sampling!r:.200} is not an object")  # noqa: TRY004
    return Usage(template, bos, sampling)


def warn_of_other_use(
    folder: str | os.PathLike, template: str, labels: Sequence[str]
) -> None:
    """Logs a warning if a folder's model was trained otherwise.

    Args:
      template: of prompts. labels: of paths, `rollout.path_labels`.
    """
    trained = read(folder)
    if trained is None:
        return
    known = trained.sampling.get("path_labels", [])
    known = tuple(known) if isinstance(known, list) else known
    both = (
        ("data.template", template, trained.template),
        ("rollout.path_labels", tuple(labels), known),
    )
    for name, mine, theirs in both:
        if mine != theirs:
            text = "%s=%s, but the model in %s was trained with --config.%s=%s"
            logging.warning(text, name, mine, folder, name, theirs)
