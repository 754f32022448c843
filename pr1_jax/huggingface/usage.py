"""How a model that was trained here is to be asked: `pr1_jax.json` in its folder.

    {"template": "plain", "bos": "auto", "sampling": {"variant": "structured", "num_paths": 2, …}}

An export writes it, so that nobody asks in another template than was trained. A template
that is a file lies beside it, and an instruction of the user is in it. Other programs
pass over both, and a folder without them loads as well.
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

FILE, TEMPLATE_FILE = "pr1_jax.json", "pr1_jax_template.jinja"


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a model was trained with.

    Attributes:
      template: of prompts.
      bos: of prompts, one of `tokenizer.BOS`.
      sampling: fields of `sampler.settings.Settings` by name: variant, budgets in
        tokens, deadline, labels of paths, temperature and so on.
    """

    template: prompts.Template
    bos: str
    sampling: Mapping[str, Any]

    def write(self, folder: str | os.PathLike) -> None:
        """Writes the files into a folder."""
        said = {"template": self.template.name}
        if self.template.text:
            said["template"] = TEMPLATE_FILE
            (Path(folder) / TEMPLATE_FILE).write_text(self.template.text, "utf-8")
        if self.template.instruction:
            said["instruction"] = self.template.instruction
        said |= {"bos": self.bos, "sampling": self.sampling}
        files.write_json(Path(folder) / FILE, said)


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
    if template not in (*prompts.TEMPLATES, TEMPLATE_FILE):
        raise ValueError(
            f"{file}: template={template!r:.200} is not one of {prompts.TEMPLATES}, nor "
            f"{TEMPLATE_FILE}"
        )
    instruction = raw.get("instruction", "")
    if not isinstance(instruction, str):
        raise ValueError(f"{file}: instruction={instruction!r:.200} is not text")  # noqa: TRY004
    bos = raw.get("bos", "no")  # older versions wrote none, and added none
    if bos not in BOS:
        raise ValueError(f"{file}: bos={bos!r:.200} is not one of {BOS}")
    if not isinstance(sampling, dict):
        raise ValueError(f"{file}: sampling={sampling!r:.200} is not an object")  # noqa: TRY004
    if template == TEMPLATE_FILE:
        template = str(Path(folder) / TEMPLATE_FILE)
    try:
        made = prompts.read_template(template)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file}: {error}") from error
    labels = sampling.get("path_labels")
    labels = tuple(labels) if isinstance(labels, list) else ()
    made = dataclasses.replace(made, instruction=instruction, labels=labels)
    return Usage(made, bos, sampling)


def warn_of_other_use(
    folder: str | os.PathLike, template: prompts.Template, labels: Sequence[str]
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
    ours, used = template, trained.template
    both = [("rollout.path_labels", tuple(labels), known)]
    if (ours.text or ours.name) != (used.text or used.name):
        both.insert(0, ("data.template", ours, used))
    if ours.instruction != used.instruction:
        text = "data.instruction=%s, but the model in %s was trained with %r"
        named = ours.instruction and repr(ours.instruction[:60])
        logging.warning(text, named, folder, used.instruction[:60] or "ours")
    for name, mine, theirs in both:
        if mine != theirs:
            text = "%s=%s, but the model in %s was trained with --config.%s=%s"
            logging.warning(text, name, mine, folder, name, theirs)
