"""Defaults of all experiments, on the embedded task; and the variants that all share.

Lengths are in tokens, rates are per update, shares are of 1.
"""

import ml_collections

REAL = ("smollm2", "qwen3_4b")  # variants with a pretrained model and real data


def benchmark(source: str, samples: int) -> ml_collections.ConfigDict:
    """A row of the table: where its problems are, and samples of each."""
    return ml_collections.ConfigDict({"source": source, "samples": samples})


def get_config(
    arg: str | None = None, *, variant: str = "structured"
) -> ml_collections.ConfigDict:
    """The base config; `arg` picks a size: None, `smoke`, `smollm2` or `qwen3_4b`.

    Raises:
      ValueError: an unknown variant.
    """
    c = ml_collections.ConfigDict()
    c.name = "common"
    c.seed = 0
    c.variant = variant  # "structured" or "causal": the paper's Unseen and Seen
    c.stages = ("sft", "rl")  # evaluated before, between and after
    # What computes the model: "xla", "cpu" (C++ kernels: float32 on a CPU, updates on
    # one device), or "auto": for updates and for decoding each "cpu" where it runs.
    c.kernels = "auto"

    c.model = ml_collections.ConfigDict()
    c.model.path = ""  # Hugging Face folder or hub name; "" = the embedded model
    c.model.num_layers = 4
    c.model.width = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.mlp_width = 512
    c.model.rope_base = 1e4
    c.model.dtype = "float32"  # of activations
    c.model.param_dtype = "float32"
    c.model.scan_layers = False  # one compiled layer, stacked parameters
    c.model.remat = False  # recompute layers in the backward pass
    c.model.remat_policy = "nothing"  # kept all the same; or "dots", matrix products
    c.model.attention = "auto"  # "pallas" (TPU) or "xla"
    c.model.query_chunk = 512  # of "xla": queries whose scores are held at once
    c.model.logits_chunk = 0  # positions whose logits are held at once; 0 = all
    c.model.length_buckets = (60, 76, 92)  # micro-batches are cut to the next of these

    c.data = ml_collections.ConfigDict()
    c.data.sft = "embedded:easy"  # traces
    c.data.coldstart = "embedded:easy"  # problems for a teacher
    c.data.rl = "embedded:hard"  # problems
    c.data.eval = "embedded:hard"  # held-out problems
    c.data.seed = 0
    c.data.eval_seed = 0
    c.data.template = "plain"  # or "instruction", "chat", "own"
    # Columns of the data; of several names the first that a record has.
    c.data.columns = ml_collections.ConfigDict()
    c.data.columns.question = "question,problem,Problem,prompt"
    c.data.columns.answer = "answer,Answer,reward_model.ground_truth"
    c.data.columns.response = "response"
    c.data.block_share = 1.0  # embedded traces with a block
    c.data.hard_share = 0.0  # embedded traces of the hard family
    c.data.late_share = 0.0  # embedded blocks that come after some searching

    c.rollout = ml_collections.ConfigDict()
    c.rollout.num_paths = 2
    c.rollout.max_blocks = 4
    c.rollout.max_prompt_tokens = 28
    c.rollout.max_response_tokens = 92
    c.rollout.min_path_tokens = 10
    c.rollout.max_path_tokens = 36  # 0 = as the plan allows
    c.rollout.max_summary_tokens = 8  # 0 = as the plan allows
    c.rollout.summary_reserve = 8
    c.rollout.answer_reserve = 6
    c.rollout.temperature = 1.0
    c.rollout.top_k = 0  # 0 = no limit
    c.rollout.top_p = 1.0
    c.rollout.ban_illegal = True
    # "causal_after_block": RL samples as the published code does, plain causal text
    # once a block has closed, and trains as ever; for studies of what that costs.
    c.rollout.shortcut = ""
    c.rollout.rows = 128  # responses decoded at the same time
    c.rollout.prompts_per_prefill = 4
    # Sizes of the list of live lanes, × rows; those above `num_paths` are left out.
    c.rollout.lane_buckets = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    c.rollout.steps_per_chunk = 32  # decode steps between two looks of the host
    c.rollout.refill_share = 0.0625  # refill once so many rows are finished

    c.reward = ml_collections.ConfigDict()
    c.reward.schedule = "alternating"
    c.reward.window = 10  # steps
    c.reward.tiered_steps = 2  # the last of each window
    c.reward.scaffold_steps = 200
    c.reward.timeout_sec = 3.0  # of processor time, for one answer

    c.sft = ml_collections.ConfigDict()
    c.sft.steps = 500
    c.sft.batch_size = 64  # traces
    c.sft.micro_batch_size = 8  # small ones stay in a CPU's cache
    c.sft.lr = 3e-3
    c.sft.lr_schedule = "cosine"
    c.sft.warmup_share = 0.1

    c.rl = ml_collections.ConfigDict()
    c.rl.steps = 80
    c.rl.prompts_per_step = 32
    c.rl.group_size = 8  # responses to a prompt
    c.rl.mini_batches = 2  # updates a step
    c.rl.micro_batch_size = 8  # responses
    # First tokens of a prompt that are computed once for its responses in a micro-batch,
    # where that is cheaper than to sort responses by length. Of several numbers the
    # largest that no prompt falls short of; each makes as many programs again as there
    # are lengths. () = never.
    c.rl.shared_prompt_tokens = (19,)
    c.rl.lr = 3e-4
    c.rl.lr_schedule = "cosine"
    c.rl.warmup_share = 0.0
    c.rl.clip_low = 0.2
    c.rl.clip_high = 0.2
    c.rl.kl_coef = 0.0
    c.rl.importance_cap = 0.0  # where old log-probs are recomputed; 0 = no correction
    c.rl.aggregation = "token_mean"  # or "response_mean", "constant"
    c.rl.normalize_std = True  # False = Dr. GRPO
    c.rl.train_on_forced = False  # True = as the published code
    c.rl.dynamic_sampling = False  # replace groups without signal
    c.rl.dynamic_sampling_rounds = 3  # at most

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # 0 = none
    c.optimizer.tag_lr_multiplier = 1.0  # of the tags' embedding rows

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # -1 = what the others leave
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.coldstart = ml_collections.ConfigDict()
    c.coldstart.problems = 512  # at most
    c.coldstart.samples = 4  # attempts at each; the first good one is kept
    c.coldstart.needs_block = True  # a trace without a block is left out
    c.coldstart.mode = "structured"  # "ordinary": the teacher does not know the tags

    # A metric alarm/… is 1, and the log says so, beyond these bounds.
    c.alarms = ml_collections.ConfigDict()
    c.alarms.logp_gap = 1e-2 if variant == "structured" else 1e-1
    c.alarms.min_entropy = 0.01  # nats a token
    c.alarms.min_length = 2.0  # mean tokens of a response
    c.alarms.min_parallel_ratio = 0.01
    c.alarms.max_parallel_ratio = 1.0  # 1 = never; traces with a block teach just that
    c.alarms.max_undecided = 0.1
    c.alarms.max_degenerate = 0.99
    c.alarms.max_skipped = 10  # updates in a row, then the run stops; 0 = never

    c.eval = ml_collections.ConfigDict()
    c.eval.problems = 512
    c.eval.samples = 1  # a problem
    c.eval.banned = True  # also with <Parallel> banned
    # Of the stage `benchmark`: name -> source and samples a problem.
    c.eval.benchmarks = ml_collections.ConfigDict()
    c.eval.modes = ("structured", "causal", "ordinary")

    c.metrics = ml_collections.ConfigDict()
    c.metrics.sinks = ()  # also to "wandb" or "trackio", which are to be installed

    c.report = ml_collections.ConfigDict()
    c.report.traces = 32  # first responses of a file kept token by token; 0 = none
    c.report.every_sec = 60.0  # report.html is brought up to date at most so often

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every_steps = 20
    c.checkpoint.keep = 2  # the newest ones
    c.checkpoint.keep_best = 1  # and those best by …
    c.checkpoint.best_metric = "rollout/accuracy"  # of the step that was saved
    c.checkpoint.folder = ""  # another place for them than the workdir, or gs://…
    c.checkpoint.init = ""  # another run's workdir to take the parameters from

    sizes = {
        None: lambda c: None,
        "smoke": _smoke,
        "smollm2": _smollm2,
        "qwen3_4b": _qwen3_4b,
    }
    if arg not in sizes:
        known = [name for name in sizes if name]
        raise ValueError(f"config variant {arg!r} is not one of {known}")
    sizes[arg](c)
    return c


def _smoke(c: ml_collections.ConfigDict) -> None:
    """All stages in well under 90 seconds on two cores; learns nothing."""
    c.model.num_layers, c.model.width, c.model.mlp_width = 2, 64, 128
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 2, 1, 32
    c.model.length_buckets, c.rl.shared_prompt_tokens = (76,), ()
    c.rollout.rows, c.rollout.prompts_per_prefill = 12, 4
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 12, 16, 16
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 4, 4, 4
    c.rl.micro_batch_size = 8
    c.reward.window = 2
    c.reward.tiered_steps = 1
    c.reward.scaffold_steps = 2
    c.eval.problems = 16
    c.checkpoint.every_steps = 2


def _smollm2(c: ml_collections.ConfigDict) -> None:
    """A few steps of a small pretrained model on real data; a CPU is enough.

    Peak memory is about 8 GB. SmolLM2 is weak at maths: this shows that all parts work
    together, and learns the format at best.
    """
    c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    c.model.scan_layers = c.model.remat = True
    c.model.logits_chunk = 512
    c.model.length_buckets = (384, 512, 640)
    c.data.sft = "hf:Parallel-R1/parallel-r1-cold-start"
    c.data.coldstart = c.data.rl = c.data.eval = "hf:openai/gsm8k/main"
    c.data.template = "instruction"
    c.rollout.max_prompt_tokens, c.rollout.max_response_tokens = 320, 448
    c.rollout.min_path_tokens, c.rollout.max_path_tokens = 16, 96
    c.rollout.max_summary_tokens, c.rollout.summary_reserve = 64, 48
    c.rollout.answer_reserve = 48
    c.rollout.rows, c.rollout.prompts_per_prefill = 8, 2
    c.sft.steps, c.sft.batch_size, c.sft.micro_batch_size = 6, 4, 2
    c.sft.lr = 1e-4
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 2, 2, 4
    c.rl.mini_batches, c.rl.micro_batch_size = 1, 2
    c.rl.shared_prompt_tokens = ()
    c.rl.lr, c.rl.lr_schedule = 1e-6, "constant"
    c.reward.window, c.reward.tiered_steps = 2, 1
    c.coldstart.mode, c.coldstart.problems, c.coldstart.samples = "ordinary", 8, 1
    c.eval.problems, c.eval.samples, c.eval.banned = 4, 1, False
    c.checkpoint.every_steps = 4


def _qwen3_4b(c: ml_collections.ConfigDict) -> None:
    """The published settings for Qwen3-4B-Base; needs weights and data."""
    c.model.path = "Parallel-R1/Qwen3-4B-Base-add-special-token"
    c.model.dtype = "bfloat16"
    c.model.scan_layers = c.model.remat = True
    c.model.logits_chunk = 2048
    c.model.length_buckets = (1536, 3072)
    c.data.sft = "hf:Parallel-R1/parallel-r1-cold-start"
    c.data.rl = "hf:Leo-Dai/dapo-math-17k_dedup"
    c.data.eval = "tfds:gsm8k"
    c.data.template = "instruction"
    c.rollout.max_prompt_tokens, c.rollout.max_response_tokens = 2000, 3000
    c.rollout.min_path_tokens, c.rollout.max_path_tokens = 64, 0
    c.rollout.max_summary_tokens, c.rollout.summary_reserve = 0, 256
    c.rollout.answer_reserve = 256
    c.rollout.rows, c.rollout.prompts_per_prefill = 128, 16
    c.rollout.lane_buckets = (1.0, 1.25, 1.5, 2.0)
    c.rollout.steps_per_chunk = 128
    c.reward.window, c.reward.tiered_steps = 10, 2
    c.sft.steps = 230 if c.variant == "structured" else 58
    c.sft.batch_size, c.sft.micro_batch_size, c.sft.lr = 128, 4, 1e-5
    c.rl.steps, c.rl.prompts_per_step, c.rl.group_size = 300, 512, 8
    c.rl.mini_batches, c.rl.micro_batch_size = 4, 4
    c.rl.shared_prompt_tokens = ()  # two rows a device, of which prompts are little
    c.rl.lr, c.rl.lr_schedule = 1e-6, "constant"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 4
    c.eval.problems, c.eval.samples, c.eval.banned = 256, 1, False
    c.checkpoint.every_steps, c.report.traces = 10, 8
