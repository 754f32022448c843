"""Which files of a folder hold its weights, where an older save left some behind.

`transformers` 5.24 takes model.safetensors where it is, and else the index
(`modeling_utils._get_resolved_checkpoint_files`); its `save_pretrained` deletes older
parts, and leaves their index.
"""

import json

import numpy as np
import pytest
import safetensors.numpy

from pr1_jax.huggingface.tensors import INDEX, SINGLE, find_tensors, read_tensor

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(folder, file, **values):
    arrays = {name: np.full(2, value, np.float32) for name, value in values.items()}
    safetensors.numpy.save_file(arrays, folder / file)


@pytest.fixture
def folder(tmp_path):
    """Two older parts, whose numbers are 1, and their index."""
    for part, name in zip(PARTS, "ab"):
        write(tmp_path, part, **{name: 1})
    index = {"metadata": {}, "weight_map": dict(zip("ab", PARTS))}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def values(folder):
    found = find_tensors(folder)
    return {name: read_tensor(file, name)[0] for name, (file, _) in found.items()}


def test_the_index_counts_where_it_is_alone(folder):
    assert values(folder) == {"a": 1, "b": 1}


@pytest.mark.parametrize("left", [PARTS, PARTS[:1], ()], ids=len)
def test_a_whole_file_goes_before_an_index(folder, left):
    write(folder, SINGLE, a=2, b=2)
    for part in set(PARTS) - {*left}:
        (folder / part).unlink()
    assert values(folder) == {"a": 2, "b": 2}


def test_a_whole_file_goes_before_a_broken_index(folder):
    write(folder, SINGLE, a=2)
    (folder / INDEX).write_text("{")
    assert values(folder) == {"a": 2}


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_parts_are_named(folder, missing):
    for part in PARTS[2 - missing :]:
        (folder / part).unlink()
    first = PARTS[2 - missing]
    message = (
        f"names 2 parts, and {missing} of them are not .* the first '{first}': copy"
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        find_tensors(folder)
    text = str(error.value)
    assert text.startswith(str(folder / INDEX)) and "\n" not in text
