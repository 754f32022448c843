"""Asks a model questions, and shows its paths side by side while they are sampled.

    python -m pr1_jax.chat runs/quickstart
    python -m pr1_jax.chat mine --question="How many primes are below 30?"
    python -m pr1_jax.chat exported --json < questions.txt

The model is the workdir of a run, a folder that `pr1_jax.export` wrote, or any Qwen3,
Qwen2 or Llama folder. In a terminal one asks and watches; in a pipe each line of the
input is a question, and the answers are plain text, or JSON lines with --json. It is
asked as it was trained; flags change that. It decodes on one device.
"""

import sys

from absl import flags

from pr1_jax.system import cli

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The model, in place of the argument."
)
_NUMBER = flags.DEFINE_integer(
    "checkpoint_number", None, "Of a run's checkpoints, as its folder; the newest."
)
_QUESTION = flags.DEFINE_string("question", None, "Asks this and ends.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Of the draws, 0 = greedy; as trained.", lower_bound=0
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Draws among the likeliest tokens with this share of probability; as trained.",
    lower_bound=0,
    upper_bound=1,
)
_TOP_K = flags.DEFINE_integer(
    "top_k",
    None,
    "Draws among so many of the likeliest tokens, 0 = all; as trained.",
    lower_bound=0,
)
_NUM_PATHS = flags.DEFINE_integer(
    "num_paths", None, "Paths of a block; as trained.", lower_bound=2, upper_bound=8
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Longest response, in tokens; as trained.", lower_bound=1
)
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps",
    None,
    "Deadline: longest response in sequential steps, 0 = none; as trained.",
    lower_bound=0,
)
_NO_LABELS = flags.DEFINE_bool(
    "no_labels",
    False,
    "Leaves away the labels of paths that the model was trained with.",
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the draws.", lower_bound=0, upper_bound=2**31 - 1
)
_NO_PARALLEL = flags.DEFINE_bool(
    "no_parallel", False, "Bans <Parallel>: ordinary decoding."
)
_VARIANT = flags.DEFINE_enum(
    "variant",
    None,
    ["structured", "causal"],
    "Of attention; as trained, or structured.",
)
_TEMPLATE = flags.DEFINE_enum(
    "template", None, ["plain", "instruction", "chat"], "Of prompts; as trained."
)
_KERNELS = flags.DEFINE_enum(
    "kernels", "auto", ["auto", "xla", "tpu", "cpu"], "What computes the model."
)
_JSON = flags.DEFINE_bool("json", False, "Writes a JSON object a line.")
_PACE = flags.DEFINE_float(
    "pace",
    None,
    "Steps a second that are shown in a terminal, at most; 0 = no limit. Default: "
    "30 for the embedded model, which is too fast to watch, else 0.",
    lower_bound=0,
)


def main(argv: list[str]) -> None:
    """Reads the flags; what is wrong is one line and exit code 2."""
    if not argv[1:] and not _CHECKPOINT.value:
        cli.stop("which model? Name a folder: python -m pr1_jax.chat runs/quickstart")
    if argv[1:] and _CHECKPOINT.value:
        cli.stop(f"--checkpoint={_CHECKPOINT.value} and {argv[1]}: name one of them")
    (path,) = argv[1:] or [_CHECKPOINT.value]
    from pr1_jax.chat import command  # JAX is slow to import
    from pr1_jax.chat.opening import load

    def notify(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    question = _QUESTION.value
    drawn = command.can_draw() and not _JSON.value
    try:
        chat = load(
            path,
            number=_NUMBER.value,
            template=_TEMPLATE.value,
            parallel=not _NO_PARALLEL.value,
            labels=not _NO_LABELS.value,
            seed=_SEED.value,
            steps_per_chunk=1 if drawn else 32,
            kernels=_KERNELS.value,
            notify=notify,
            variant=_VARIANT.value,
            num_paths=_NUM_PATHS.value,
            max_response_tokens=_MAX_TOKENS.value,
            max_sequential_steps=_MAX_STEPS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
        )
        try:
            first = chat.prompt(chat.example() if question is None else question)
        except ValueError as error:
            if question is None:
                raise
            raise ValueError(f"--question={question[:60]}: {error}") from error
        notify(chat.about)
        chat.warm_up(len(first))
    except (ValueError, OSError) as error:
        cli.stop(error)
    except KeyboardInterrupt:
        sys.exit(130)
    pace = _PACE.value
    if pace is None:
        pace = 30.0 if chat.task is not None else 0.0
    sys.exit(command.run(chat, question, drawn=drawn, as_json=_JSON.value, pace=pace))


if __name__ == "__main__":
    cli.run(main, most_arguments=1)
