"""Times Hugging Face TRL and transformers (torch) on CPU: sampling, an update, a step.

In an environment of requirements-trl.txt; called as `worker.py` says. The model is
`Qwen3ForCausalLM` in float32 with SDPA attention; sampling is its `generate`, the
update and the step are those of `GRPOTrainer`.
"""

import argparse
import os
import tempfile
import time
from typing import Any

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

from tests.programs.peers import worker
from tests.programs.peers.worker import GROUP_SIZE, Run


class StepClock(TrainerCallback):
    """Notes the end of each step; from one to the next, fetching the batch counts."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def load(args: argparse.Namespace) -> tuple[Qwen3ForCausalLM]:
    """The model; it names no end token, so that `generate` looks for none."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Qwen3ForCausalLM.from_pretrained(
        args.weights, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return (model,)


def sampling(model: Qwen3ForCausalLM, args: argparse.Namespace) -> Run:
    """Temperature 1 without limits; no log-probs, as `GRPOTrainer` asks for none.

    The default cache is copied to a longer one at each token, but attention then needs
    no mask and reads filled slots only; a static one is written in place and read
    whole under a mask, and what it is for, a compiled decode step, is not for CPUs.
    """
    prompts = torch.from_numpy(worker.prompts(args.prompts, args))
    config = GenerationConfig(
        max_new_tokens=args.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.eval()

    def draw(unit: int) -> torch.Tensor:
        del unit
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=config,
            )
        return tokens[:, args.prompt_tokens :]

    return worker.sample(draw, model.config.vocab_size, args)


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
    return [*map(worker.share_of_odd, completion_ids)]


def trainer(
    model: Qwen3ForCausalLM, args: argparse.Namespace, clock: StepClock, folder: str
) -> GRPOTrainer:
    """The trainer in float32, with the clipped objective and nothing beside it.

    Of its defaults it keeps beta 0, clipping at 0.2, fused AdamW, rate 1e-6, no decay,
    gradients clipped to norm 1.
    """
    ids = worker.prompts(args.units * args.prompts // GROUP_SIZE, args)
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # else each layer's forward pass runs twice
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.prompts // args.micro_batch,
        num_generations=GROUP_SIZE,
        max_completion_length=args.new_tokens,
        max_steps=args.units,
        shuffle_dataset=False,
        loss_type="grpo",  # as "dapo", the default, where responses are equally long
        lr_scheduler_type="constant",
        torch_compile=args.compile,
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
    ids, advantages = map(torch.from_numpy, worker.batch(args))
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
        "advantages": advantages.float(),
        "old_per_token_logps": old_logps,
    }
    micro_batches = [
        {name: value[first : first + args.micro_batch] for name, value in batch.items()}
        for first in range(0, args.prompts, args.micro_batch)
    ]
    grpo.current_gradient_accumulation_steps = len(micro_batches)  # as `train` sets it
    ends, losses, norms = [], [], []
    for _ in range(args.units):
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
        "compile": args.compile,
    }
    return Run(clock.ends, checks)


def finish(
    run: Run, model: Qwen3ForCausalLM, args: argparse.Namespace
) -> dict[str, Any]:
    before: dict[str, torch.Tensor] = {}
    for path in args.weights.glob("*.safetensors"):
        before |= load_file(path)
    now = model.state_dict()
    change = worker.largest_change(before.values(), [now[name] for name in before])
    return {"max_parameter_change": change, "threads": torch.get_num_threads()}


def main() -> None:
    flags = worker.parser(__doc__)
    # Of the trained forward and backward pass; a minute or more once, then faster.
    # `generate` is never compiled on a CPU, and the trainer forbids it everywhere.
    flags.add_argument("--no-compile", dest="compile", action="store_false")
    packages = ("trl", "transformers", "torch", "accelerate", "tokenizers", "numpy")
    worker.main("trl", packages, flags, load, (sampling, update, step), finish)


if __name__ == "__main__":
    main()
