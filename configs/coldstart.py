"""Cold-start data from a teacher: its correct, well-formed answers as traces for SFT.

    python -m pr1_jax.main --config=configs/coldstart.py

Without a size, a teacher is trained first. To take another, leave only "coldstart" in
`stages` and give `checkpoint.init`, the workdir of a run, or `model.path`, a Hugging Face
folder. Another run then reads the traces with `--config.data.sft=runs/coldstart/traces.jsonl`.

Two CPU cores: minutes. Of a teacher's attempts at a problem the first that is correct, with
a block, becomes a trace. With `--config.rollout.planned=True` and `--config.data.template=chat`
or `instruction` the teacher is asked for plans, and traces have them.
"""

import ml_collections

from pr1_jax import defaults, sizes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """docs/method.md, section 6: the published data are a teacher's answers to GSM8K."""
    c = defaults.get_config(arg)
    c.name = "coldstart"
    c.stages = ("sft", "coldstart")
    if sizes.size_of(arg) in sizes.REAL:
        c.stages = ("coldstart",)
    if sizes.size_of(arg) == "qwen3_4b":
        c.data.coldstart = "tfds:gsm8k"
        c.data.template = "chat"
        c.coldstart.mode = "ordinary"
        c.coldstart.problems = 7473
    return c
