"""The fields by which a run is on the task `search`, as its module names them."""

import ast
import re

import ml_collections

from pr1_jax.data import search

FIELDS = {
    name: text if name.startswith("data.") else ast.literal_eval(text.strip('"'))
    for name, text in re.findall(r"--config\.(\S+)=(\S+)", search.__doc__)
}


def put(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with these fields."""
    config.update_from_flattened_dict(FIELDS)
    return config
