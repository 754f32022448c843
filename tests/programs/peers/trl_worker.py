"""Times Hugging Face TRL and transformers (torch) on CPU: sampling, an update, a step.

`python trl_worker.py --weights FOLDER --work sampling|update|step --repeats N
--out FILE.json`, in an environment of requirements-trl.txt. The model is
`Qwen3ForCausalLM` in float32 with SDPA attention; sampling is its `generate`, the
update and the step are those of `GRPOTrainer`.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

# Read when the libraries are imported: no hub and no usage report from a timed run,
# and a compilation is from scratch, as it is with JAX.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

PROMPT_IDS = 4000  # prompts are drawn below this id


@dataclass(frozen=True)
class Run:
    """ends: clock at the end of each unit of work; setup_sec: not to be counted."""

    ends: list[float]
    checks: dict
    setup_sec: float = 0.0


class StepClock(TrainerCallback):
    """Notes the end of each step; from one to the next, fetching the batch counts."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--work", choices=("sampling", "update", "step"), required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32, help="sequences of a unit")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--micro_batch", type=int, default=32, help="sequences")
    # A dynamic cache is copied to a longer one at each token, but attention then needs
    # no mask and reads filled slots only; a static one is written in place and read
    # whole under a mask, and what it is for, a compiled decode step, is not for CPUs.
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    # Of the trained forward and backward pass; a minute or more once, then faster.
    # `generate` is never compiled on a CPU, and the trainer forbids it everywhere.
    yes_or_no = argparse.BooleanOptionalAction
    parser.add_argument("--compile", action=yes_or_no, default=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def since_process_start() -> float:
    """Seconds since the kernel started this process: imports are in it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start


def load(folder: Path) -> Qwen3ForCausalLM:
    """The model; it names no end token, so that `generate` looks for none."""
    model = Qwen3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def sampling(model: Qwen3ForCausalLM, args: argparse.Namespace) -> Run:
    """Temperature 1 without limits; no log-probs, as `GRPOTrainer` asks for none."""
    shape = (args.prompts, args.prompt_tokens)
    ids = np.random.default_rng(0).integers(0, PROMPT_IDS, size=shape)
    prompts = torch.from_numpy(ids)
    config = GenerationConfig(
        max_new_tokens=args.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        cache_implementation=None if args.cache == "dynamic" else args.cache,
    )
    model.eval()
    ends, outputs = [], []
    for _ in range(2 + args.repeats):
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=config,
            )
        ends.append(time.perf_counter())
        outputs = [*outputs[-1:], tokens[:, args.prompt_tokens :]]
    checks = {
        "tokens_shape": list(outputs[-1].shape),
        "tokens_below_vocab": bool((outputs[-1] < model.config.vocab_size).all()),
        "same_as_repeat_before": float((outputs[0] == outputs[1]).double().mean()),
        "cache": args.cache,
    }
    return Run(ends, checks)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words "t0" to "t<vocab_size - 1>" are the ids.

    Its end and padding are an id past the vocabulary. It is never drawn, so no
    response ends early, and no step pays for forbidding it.
    """
    words = {f"t{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words | {"<end>": vocab_size}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def share_of_odd(completion_ids: list[list[int]], **_) -> list[float]:
    return [float(np.mean(np.array(ids) % 2)) for ids in completion_ids]


def trainer(
    model: Qwen3ForCausalLM, args: argparse.Namespace, clock: StepClock, folder: str
) -> GRPOTrainer:
    """The trainer in float32, with the clipped objective and nothing beside it.

    Of its defaults it keeps beta 0, clipping at 0.2, fused AdamW, rate 1e-6, no decay,
    gradients clipped to norm 1.
    """
    steps, groups = 2 + args.repeats, args.prompts // args.group_size
    shape = (steps * groups, args.prompt_tokens)
    ids = np.random.default_rng(0).integers(0, PROMPT_IDS, size=shape)
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # else each layer's forward pass runs twice
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.prompts // args.micro_batch,
        num_generations=args.group_size,
        max_completion_length=args.new_tokens,
        max_steps=steps,
        shuffle_dataset=False,
        loss_type="grpo",  # as "dapo", the default, where responses are equally long
        lr_scheduler_type="constant",
        torch_compile=args.compile,
        cache_implementation=None if args.cache == "dynamic" else args.cache,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    texts = [" ".join(f"t{token}" for token in row) for row in ids]
    return GRPOTrainer(
        model,
        share_of_odd,
        config,
        Dataset.from_dict({"prompt": texts}),
        processing_class=word_tokenizer(model.config.vocab_size),
        callbacks=[clock],
    )


def update(model: Qwen3ForCausalLM, args: argparse.Namespace) -> Run:
    """The trainer's loss, backward pass, clipping and optimizer, on a given batch."""
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens + args.new_tokens)
    ids = torch.from_numpy(rng.integers(0, PROMPT_IDS, size=shape))
    prompt, completion = ids.split([args.prompt_tokens, args.new_tokens], dim=1)
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(model, args, StepClock(), folder)
    model.train()
    prepared, optimizer = grpo.accelerator.prepare(model, grpo.create_optimizer())
    start = time.perf_counter()
    with torch.no_grad():
        old_logps, _, _ = grpo._get_per_token_logps_and_entropies(
            model, ids, torch.ones_like(ids), args.new_tokens
        )
    setup_sec = time.perf_counter() - start
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": torch.from_numpy(rng.normal(size=args.prompts)).float(),
        "old_per_token_logps": old_logps,
    }
    micro_batches = [
        {name: value[first : first + args.micro_batch] for name, value in batch.items()}
        for first in range(0, args.prompts, args.micro_batch)
    ]
    grpo.current_gradient_accumulation_steps = len(micro_batches)  # as `train` sets it
    ends, losses, norms = [], [], []
    for _ in range(2 + args.repeats):
        total = 0.0
        for micro_batch in micro_batches:
            loss = grpo.compute_loss(prepared, micro_batch)
            grpo.accelerator.backward(loss)
            total += loss.detach()
        norm = grpo.accelerator.clip_grad_norm_(
            model.parameters(), grpo.args.max_grad_norm
        )
        optimizer.step()
        model.zero_grad()
        ends.append(time.perf_counter())
        losses.append(float(total))
        norms.append(float(norm))
    checks = {
        "old_logps_mean": float(old_logps.mean()),
        "loss": losses,
        "grad_norm": norms,
        "micro_batch": args.micro_batch,
        "compile": args.compile,
    }
    return Run(ends, checks, setup_sec)


def step(model: Qwen3ForCausalLM, args: argparse.Namespace) -> Run:
    """`GRPOTrainer.train`: generation, rewards, advantages and one update a step."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        grpo = trainer(model, args, clock, folder)
        loss = grpo.train().training_loss
    names = ("reward", "reward_std", "completions/min_length", "entropy")
    checks = {
        "mean_loss": loss,
        "updates": grpo.state.global_step,
        **{name: grpo.state.log_history[-1][name] for name in names},  # means
        "micro_batch": args.micro_batch,
        "cache": args.cache,
        "compile": args.compile,
    }
    return Run(clock.ends, checks)


def largest_change(model: Qwen3ForCausalLM, folder: Path) -> float:
    before: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        before |= load_file(path)
    now = model.state_dict()
    return max(float((now[name] - old).abs().max()) for name, old in before.items())


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = load(args.weights)
    load_sec, loaded = since_process_start(), time.perf_counter()
    works = {"sampling": sampling, "update": update, "step": step}
    run = works[args.work](model, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    change, threads = largest_change(model, args.weights), torch.get_num_threads()
    trained = args.prompt_tokens if args.work == "update" else 0
    packages = ("trl", "transformers", "torch", "accelerate", "tokenizers", "numpy")
    result = {
        "peer": "trl",
        "version": {name: metadata.version(name) for name in packages},
        "work": args.work,
        "tokens": args.prompts * (args.new_tokens + trained),
        "load_sec": load_sec,
        "first_sec": run.ends[0] - loaded - run.setup_sec,
        "second_sec": run.ends[1] - run.ends[0],
        "seconds": np.diff(run.ends[1:]).tolist(),
        "peak_rss_bytes": peak,
        "checks": run.checks | {"max_parameter_change": change, "threads": threads},
    }
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
