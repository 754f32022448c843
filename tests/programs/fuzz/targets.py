"""What is fuzzed: one function of bytes a target, with what must hold for any input.

A target returns if all is well and raises for a finding. `run.py` drives them with a
coverage-guided fuzzer and `fuzz_test.py` with hypothesis. None reaches a network.
"""

import functools

from pr1_jax.tags import Grammar
from tests.programs.fuzz import config, files, folders, texts
from tests.programs.fuzz.base import Target

PLANNED = Grammar(planned=True)

TARGETS = {
    "layout": lambda: Target(
        texts.check_layout, [b"\x01\x07\x00\x02\x07\x03\x02\x03\x01\x06\x04\x05"]
    ),
    "format": lambda: Target(
        texts.check_format, [b"\x00\x00\x02\x08\x03\x02\x03\x01\x04\x05"]
    ),
    "canonical": lambda: Target(
        texts.check_canonical, [b"\x00\x00\x07\x02\x08\x03\x06\x02\x03\x01\x04\x05"]
    ),
    "planned_layout": lambda: Target(
        functools.partial(texts.check_layout, grammar=PLANNED),
        [b"\x01\x07\x00\x08\x07\x09\x08\x09\x02\x07\x03\x02\x03\x01\x06\x04\x05"],
    ),
    "planned_format": lambda: Target(
        functools.partial(texts.check_format, grammar=PLANNED),
        [b"\x00\x00\x11\x12\x11\x08\x12\x02\x08\x03\x02\x03\x01\x04\x05"],
    ),
    "planned_canonical": lambda: Target(
        functools.partial(texts.check_canonical, grammar=PLANNED),
        [b"\x00\x00\x07\x11\x12\x06\x11\x08\x12\x02\x08\x03\x06\x02\x03\x01\x04\x05"],
    ),
    "answer_parser": lambda: Target(texts.check_answer_parser, texts.answer_seeds()),
    "answer_check": lambda: Target(texts.check_answer, texts.answer_seeds()),
    "jsonl": lambda: Target(
        functools.partial(files.check, "jsonl"), files.jsonl_seeds(), json=True
    ),
    "parquet": lambda: Target(
        functools.partial(files.check, "parquet"), files.parquet_seeds()
    ),
    "array_record": lambda: Target(
        files.check_array_record, files.array_record_seeds()
    ),
    "config": lambda: Target(config.check_config, config.config_seeds()),
    "model_config": lambda: Target(
        folders.check_model_config, folders.model_config_seeds(), json=True
    ),
    "weights": lambda: Target(folders.check_weights, folders.weights_seeds()),
    "weight_index": lambda: Target(
        folders.check_weight_index, folders.INDEX_SEEDS, json=True
    ),
    "tokenizer": lambda: Target(
        folders.check_tokenizer, folders.tokenizer_seeds(), json=True
    ),
    "eos_ids": lambda: Target(folders.check_eos_ids, folders.EOS_SEEDS, json=True),
    "spaces": lambda: Target(folders.check_spaces, [b"\x00\x00\x03\x0a\x02\x05"]),
    "chat_template": lambda: Target(
        folders.check_chat_template, folders.TEMPLATE_SEEDS
    ),
}
