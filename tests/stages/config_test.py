"""Configs: all load and check out; a wrong one stops in time, in one line.

What `--config.a.b=v` becomes is tested in this process through `config_flags`, as
`pr1_jax.main` uses it; the command itself a few times, for it takes seconds.
"""

import ast
import importlib
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import ml_collections
import pytest

from pr1_jax import defaults, rewards, sizes
from pr1_jax.data import search, sources, tasks
from pr1_jax.plan import hardware
from pr1_jax.stages import checks, curriculum
from pr1_jax.system import files
from tests.helpers import command, compiling, search_task

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = "coldstart evaluate grpo_sequential rl_accuracy rl_alternating rl_easy"
PUBLISHED += " rl_parallel_only rl_scaffold sft_causal sft_structured"
PUBLISHED = PUBLISHED.split()
NAMES = (*PUBLISHED, "rl_planned")
VARIANTS = (None, "smoke", "smollm2", "qwen3_4b")
SMOKE = "configs/rl_alternating.py:smoke"


def get_config(name, variant=None):
    return importlib.import_module(f"configs.{name}").get_config(variant)


def parsed(*arguments, config=SMOKE):
    """The config that `pr1_jax.main` would get from these flags."""
    return command.config_of(config, *arguments)


def changed(**fields):
    """The smoke config with some fields changed."""
    config = get_config("rl_alternating", "smoke").lock()
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Makes any compilation an error."""

    def compiles(*args, **kwargs):
        raise AssertionError("something compiles before the config is checked")

    monkeypatch.setattr(jax._src.compiler, "backend_compile_and_load", compiles)


# --- Configs that are right -----------------------------------------------------------


def test_no_config_is_forgotten():
    stems = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert stems == {"common", *NAMES}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_loads_locked_and_round_trips(name, variant):
    suffix = f":{variant}" if variant else ""
    config = parsed(config=f"configs/{name}.py{suffix}")
    assert config.name == name
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.rl.no_such_field = 1
    plain = files.plain(config.to_dict())
    assert json.loads(json.dumps(plain)) == plain
    again = ml_collections.ConfigDict(plain)
    assert files.plain(again.to_dict()) == plain


@pytest.mark.parametrize("variant", [None, "smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_embedded_configs_pass_their_checks_and_compile_nothing(
    name, variant, nothing_compiles
):
    config = get_config(name, variant)
    made, held_out = curriculum.prepare(config.lock())
    assert (held_out is None) == (name == "evaluate")
    assert held_out is None or len(held_out) == config.eval.problems
    assert made.settings.variant == config.variant
    assert not config.model.path and not config.checkpoint.init


def test_the_other_task_is_there_by_the_fields_that_it_names(nothing_compiles):
    config = search_task.put(get_config("rl_alternating"))
    made, held_out = curriculum.prepare(config.lock())
    assert tasks.spoken(made.tokenizer) == search.Search()
    assert all(p.question.startswith("Which two add to") for p in held_out)
    assert not made.vocab.label_ids


@pytest.mark.parametrize("name", NAMES)
def test_variants_are_the_same_experiment(name):
    default, *others = (get_config(name, v) for v in VARIANTS)
    names = lambda c: {k for k, _ in c.items()}
    for other in others:
        assert names(other) == names(default)
        for group in ("rl", "sft", "rollout", "reward", "eval", "model", "data"):
            assert names(other[group]) == names(default[group])
        assert other.variant == default.variant
        assert other.reward.schedule == default.reward.schedule
        assert other.rl.clip_high == default.rl.clip_high


def test_overrides_take_the_type_of_the_field():
    config = parsed(
        "--config.rollout.path_labels=(' 1', ' 2')",
        "--config.rl.lr=2e-6",
        "--config.rl.steps=7",
        "--config.rl.dynamic_sampling=true",
        "--config.model.length_buckets=(96, 108)",
        "--config.data.rl=embedded:easy",
    )
    assert (config.rl.lr, config.rl.steps) == (2e-6, 7)
    assert config.rl.dynamic_sampling is True
    assert tuple(config.model.length_buckets) == (96, 108)
    assert config.data.rl == "embedded:easy"
    assert config.rollout.path_labels == (" 1", " 2")


# --- Published settings: docs/method.md, section 6 --------------------------------------


@pytest.mark.parametrize(
    "name, variant, stages, schedule, clip",
    [
        ("sft_causal", "causal", ("sft",), None, None),
        ("sft_structured", "structured", ("sft",), None, None),
        ("rl_easy", "causal", None, "parallel_and_accuracy", (0.2, 0.2)),
        ("rl_accuracy", "structured", None, "accuracy", (0.2, 0.2)),
        ("rl_alternating", "structured", None, "alternating", (0.2, 0.28)),
        ("rl_parallel_only", "structured", None, "parallel_only", None),
        ("rl_scaffold", "structured", None, "scaffold", (0.2, 0.28)),
        ("grpo_sequential", None, ("rl",), "accuracy", (0.2, 0.2)),
        ("evaluate", None, ("benchmark",), None, None),
        ("coldstart", None, ("coldstart",), None, None),
    ],
)
def test_published_method(name, variant, stages, schedule, clip):
    c = get_config(name, "qwen3_4b")
    assert variant in (None, c.variant)
    assert tuple(c.stages) == stages or (stages is None and "rl" in c.stages)
    assert schedule in (None, c.reward.schedule)
    assert clip in (None, (c.rl.clip_low, c.rl.clip_high))


def test_published_benchmarks():
    c = get_config("evaluate", "qwen3_4b")
    found = sources.benchmarks(c.data.eval, c.eval.samples)
    samples = {name: benchmark.samples for name, benchmark in found.items()}
    assert samples == {"aime24": 16, "aime25": 16, "amc23": 16, "math": 1}
    assert found["aime24"].source == "hf:HuggingFaceH4/aime_2024@train"
    assert {*c.eval.modes} == {"structured", "causal", "ordinary"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    c = get_config(name, "qwen3_4b")
    assert (c.rollout.max_prompt_tokens, c.rollout.max_response_tokens) == (2000, 3000)
    assert c.rollout.num_paths == 2
    assert c.rollout.max_blocks == (0 if name == "grpo_sequential" else 4)
    assert (c.rollout.temperature, c.rollout.top_p) == (1.0, 1.0)
    if "sft" in c.stages:
        assert c.sft.steps == {"causal": 58, "structured": 230}[c.variant]
        assert (c.sft.batch_size, c.sft.lr) == (128, 1e-5)
        assert (c.sft.lr_schedule, c.sft.warmup_share) == ("cosine", 0.1)
        assert c.optimizer.weight_decay == 0.01
        assert c.data.sft.startswith("hf:Parallel-R1/parallel-r1-cold-start")
    if "rl" in c.stages:
        size = (c.rl.prompts_per_step, c.rl.group_size, c.rl.steps)
        assert size == ((1024, 5, 35) if name == "rl_easy" else (512, 8, 300))
        assert c.rl.lr == 1e-6
        assert (c.rl.kl_coef, c.rl.aggregation) == (0.0, "token_mean")
        assert c.data.rl == (
            "tfds:gsm8k" if name == "rl_easy" else "hf:Leo-Dai/dapo-math-17k_dedup"
        )
        if name != "rl_easy":
            assert c.rl.prompts_per_step // c.rl.mini_batches == 128


DEVICES = [
    (size, devices) for size, known in sizes.FASTEST.items() for devices in known
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "devices"), DEVICES)
def test_settings_for_devices_divide_what_they_must(name, size, devices):
    c, plain = get_config(name, f"{size},{devices}"), get_config(name, size)
    count = hardware.parse_topology(devices).num_devices
    fixed = math.prod(n for n in c.mesh.values() if n > 0)
    assert count % fixed == 0 and (fixed == count or -1 in c.mesh.values())
    shards = count // c.mesh.tensor
    whole = c.rl.prompts_per_step * c.rl.group_size // c.rl.mini_batches
    assert whole % c.rl.micro_batch_size == 0 == c.rl.micro_batch_size % shards
    assert c.sft.batch_size % c.sft.micro_batch_size == 0
    assert c.sft.micro_batch_size % shards == 0 == c.rollout.rows % shards
    fields, before = (defaults.flat(x.to_dict()) for x in (c, plain))
    changed = {n for n, x in fields.items() if x != before[n]}
    assert changed <= {*sizes.FASTEST[size][devices]}


def test_settings_for_unknown_devices_name_the_known_ones():
    for variant in ("qwen3_4b,v9:4x4", "smoke,v5e:4x4", ",v5e:4x4"):
        with pytest.raises(
            ValueError, match=f"config variant '{variant}'.*settings for"
        ):
            get_config("rl_alternating", variant)


def names_of(c, steps):
    return [
        rewards.scheduled(
            c.reward.schedule,
            step,
            window=c.reward.window,
            tiered_steps=c.reward.tiered_steps,
            scaffold_steps=c.reward.scaffold_steps,
        )
        for step in range(1, steps + 1)
    ]


def test_alternating_is_eight_steps_of_accuracy_and_two_tiered():
    for variant in (None, "qwen3_4b"):
        c = get_config("rl_alternating", variant)
        assert names_of(c, 20) == (["accuracy"] * 8 + ["tiered"] * 2) * 2
    c = get_config("rl_alternating", "smoke")
    assert set(names_of(c, c.rl.steps)) == {"accuracy", "tiered"}


def test_scaffold_turns_to_accuracy_for_good():
    found = names_of(get_config("rl_scaffold", "qwen3_4b"), 300)
    assert found[:200] == (["accuracy"] * 8 + ["tiered"] * 2) * 20
    assert set(found[200:]) == {"accuracy"}
    for variant in (None, "smoke"):
        c = get_config("rl_scaffold", variant)
        found = names_of(c, c.rl.steps)
        assert "tiered" in found[: c.rl.steps // 2]
        assert set(found[c.rl.steps // 2 :]) == {"accuracy"}


# --- Configs that are wrong -------------------------------------------------------------

# Values that are refused; each stands in its message as it does here.
WRONG_VALUES = """
    rollout.num_paths=99 rollout.num_paths=1 rollout.max_blocks=-1 rollout.rows=0
    rollout.top_p=0.0 rollout.temperature=0.0 rollout.temperature=-1.0
    rollout.min_path_tokens=1 rollout.max_path_tokens=3 rollout.max_prompt_tokens=0
    rollout.shortcut='fast' rollout.max_sequential_steps=-1
    rollout.max_sequential_steps=2
    rl.micro_batch_size=3 rl.micro_batch_size=0 rl.mini_batches=3
    rl.prompts_per_step=5 rl.steps=0 rl.aggregation='sum' rl.lr_schedule='linear'
    rl.importance_cap=-1.0 rl.shared_prompt_tokens=(0,) rl.shared_prompt_tokens=(8.5,)
    rl.lr=-1.0 rl.clip_low=-0.1 rl.kl_coef=-0.1
    sft.batch_size=15 sft.micro_batch_size=32 sft.steps=-1 sft.warmup_share=1.5
    coldstart.mode='plain' coldstart.samples=0 eval.problems=0 eval.samples=0
    checkpoint.init=/nowhere/run checkpoint.init=nowhere checkpoint.init=nowhere/run
    checkpoint.every_steps=0 mesh.data=3 mesh.fsdp=3 mesh.fsdp=-1
    model.path=/nowhere/model model.num_kv_heads=3 model.head_dim=31
    model.dtype='float99' model.query_chunk=0 model.attention='cudnn'
    model.logits_chunk=-1 model.packed_tokens=-1 model.packed_tokens=123
    reward.schedule='best' reward.window=0 reward.tiered_steps=5 reward.timeout_sec=0.0
    reward.latency_coef=-0.1 reward.latency_coef=1.5 reward.function_sec=0.0
    reward.function=mine.py reward.verifier=mine:1 reward.workers=0
    reward.weights=schedule=1
    data.rl=embedded:medium data.template='fancy' data.instruction=told.txt data.task=partner:late_share=-0.1
    data.task=partner:paths=4 data.task=partner:planned=1
    data.task=sorting variant='both' seed=-1 kernels='cuda'
"""
BENCHMARK = {"stages": ("benchmark",)}
WRONG = [
    # What is changed, and what the message must name.
    ({"rl.group_size": 1, "rl.micro_batch_size": 1}, "rl.group_size=1"),
    ({"sft.lr": float("nan")}, "sft.lr=nan"),
    ({"reward.latency_coef": float("nan")}, "reward.latency_coef=nan"),
    ({"checkpoint.init": str(ROOT / "configs")}, "checkpoint.init="),
    (
        {"rollout.planned": True},
        "makes traces without plans, and rollout.planned is True",
    ),
    ({"data.rl": "/nowhere/data.jsonl"}, "/nowhere/data.jsonl"),
    ({"data.sft": "/nowhere/data.jsonl"}, "/nowhere/data.jsonl"),
    ({"data.eval": "/nowhere/data.jsonl"}, "/nowhere/data.jsonl"),
    ({"data.template": "/nowhere/a.jinja"}, "data.template=/nowhere/a.jinja: No such"),
    (
        {"data.template": "instruction", "data.instruction": "/nowhere/told.txt"},
        "data.instruction=/nowhere/told.txt: No such file",
    ),
    (
        {"reward.function": "/nowhere/a.py:f"},
        "reward.function=/nowhere/a.py:f cannot be",
    ),
    ({"reward.verifier": "nowhere.a:f"}, "No module named 'nowhere'"),
    (
        {
            "reward.function": f"{ROOT}/docs/examples/length_penalty.py:score",
            "reward.weights": "function=1",
        },
        "reward.weights=function=1: 'function' is no part; the",
    ),
    ({"data.eval": "embedded:hard@4"}, "data.eval=embedded:hard@4 is of the stage"),
    ({"data.eval": "a=embedded:hard"}, "data.eval=a=embedded:hard is of the stage"),
    ({"data.eval": "a=x@0", **BENCHMARK}, "data.eval=a=x@0"),
    ({"data.eval": "", **BENCHMARK}, "data.eval="),
    ({"data.eval": "a=x,a=y", **BENCHMARK}, "two benchmarks are named"),
    ({"data.eval": "a=/no.jsonl", **BENCHMARK}, "data.eval, a=/no.jsonl"),
    ({"eval.modes": ("structured", "beam")}, "eval.modes=('structured', 'beam')"),
    ({"stages": ("sft", "dpo")}, "'dpo'"),
    ({"stages": ("rl", "rl")}, "stages=('rl', 'rl')"),
    ({"model.attention": "pallas"}, "model.attention=pallas needs a TPU"),
    ({"kernels": "tpu"}, "kernels=tpu: the device is a cpu"),
    ({"kernels": "cpu", "model.dtype": "bfloat16"}, "model.dtype=bfloat16 is not fl"),
    (
        {"kernels": "cpu"},
        "kernels=cpu: updates run on one device, and the mesh has 8 devices",
    ),
    ({"model.length_buckets": (0, 108)}, "model.length_buckets=(0, 108)"),
    (
        {"model.packed_tokens": 200, "rl.shared_prompt_tokens": (9,)},
        "rl.shared_prompt_tokens=(9,) and model.packed_tokens=200 exclude each other",
    ),
    ({"model.dtype": "float16"}, "model.dtype=float16 cannot train: gradients below"),
    ({"rl.importance_cap": 2.0}, "rl.importance_cap=2.0 corrects old log-probs that"),
    (
        {"rollout.shortcut": "causal_after_block", "variant": "causal"},
        "rollout.shortcut=causal_after_block",
    ),
    ({"rollout.path_labels": (" 7",)}, "rollout.path_labels=(' 7',) is too few"),
    ({"rollout.path_labels": (" 7", "one")}, "rollout.path_labels: 'one' is no text"),
    (
        {"rollout.path_labels": (" 7", " 8" * 9)},
        "rollout.min_path_tokens=10 must hold both tags and the longest label",
    ),
]


def refused(fields):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        curriculum.prepare(changed(**fields))
    return str(error.value)


@pytest.mark.parametrize("given", WRONG_VALUES.split())
def test_a_wrong_value_is_named_before_anything_compiles(given, nothing_compiles):
    name, _, text = given.partition("=")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    assert given in refused({name: value})


@pytest.mark.parametrize("fields, named", WRONG, ids=[named for _, named in WRONG])
def test_values_that_do_not_go_together_are_named(fields, named, nothing_compiles):
    assert named in refused(fields)


@pytest.mark.parametrize(
    "name, said",
    [
        ("model.param_dtype", "and always 'float32'"),
        ("model.kernels", "It is kernels now"),
        ("rl.stepz", "Take it out of the config file"),
    ],
)
def test_what_a_file_adds_to_the_config_is_refused(name, said, nothing_compiles):
    config = get_config("rl_alternating", "smoke").unlock()
    group, _, leaf = name.partition(".")
    config[group][leaf] = "float16"
    with pytest.raises(ValueError, match=f"{name}='float16' is not a field.*{said}"):
        curriculum.prepare(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"model.dtype": "float16", **BENCHMARK, "data.eval": "a=embedded:easy"},
        {"rl.importance_cap": 2.0, "rl.recompute_logps": True},
        {"rl.importance_cap": 2.0, "variant": "causal"},
        {"rl.importance_cap": 2.0, "rl.train_on_forced": True},
        {"rl.importance_cap": 2.0, "rollout.shortcut": "causal_after_block"},
    ],
    ids=str,
)
def test_what_is_refused_elsewhere_is_taken_where_it_works(fields, nothing_compiles):
    curriculum.prepare(changed(**fields))


def test_prompts_that_are_too_long_are_named(tmp_path, nothing_compiles):
    data = tmp_path / "long.jsonl"
    question = "Which number has a partner 4 larger?" + " 10" * 40 + "\n"
    data.write_text(json.dumps({"question": question, "answer": "1"}) + "\n")
    for field in ("data.rl", "data.eval"):
        assert "rollout.max_prompt_tokens=28" in refused({field: str(data)})


def test_the_nothing_compiles_fixture_would_notice(nothing_compiles):
    with pytest.raises(AssertionError, match="something compiles"):
        jax.jit(lambda x: x + 41)(1.0)


def test_a_deadline_without_room_for_a_block_is_said(caplog):
    config = changed(**{"rollout.max_sequential_steps": 18})
    checks.check(config)
    assert "no block ever opens" in caplog.text and "18" in caplog.text
    caplog.clear()
    config.rollout.max_sequential_steps = 19  # <Parallel>, 10 + 3 + 2, 3 of an answer
    checks.check(config)
    config.rollout.max_blocks, config.rollout.max_sequential_steps = 0, 18
    checks.check(config)
    assert not caplog.text


# --- The command ------------------------------------------------------------------------


def stopped(workdir, *arguments):
    """Runs the command; asserts that it stops as it should; returns its one line."""
    before = workdir.exists()
    run = subprocess.run(
        [sys.executable, "-m", "pr1_jax.main", f"--workdir={workdir}", *arguments],
        check=False,
        cwd=ROOT,
        env=compiling.on_one_device() | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error:"), run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert workdir.exists() == before
    return run.stderr


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--config=configs/rl_alternating.py:tiny", "'tiny'"),
        ("--config=configs/nowhere.py", "nowhere.py"),
        ("--config.rollout.num_paths=99", "rollout.num_paths=99"),
        ("--config.rl.stepz=3", "rl.stepz=3"),
        ("--config.rl.steps=abc", "rl.steps=abc"),
        ("--config.model.kernels=xla", "model.kernels=xla: .* It is kernels now"),
        ("--config.checkpoint.init=/nowhere/run", "checkpoint.init=/nowhere/run"),
        ("--workdirr=somewhere", "workdirr"),
        ("surplus", "surplus"),
    ],
)
def test_the_command_stops_with_one_line(tmp_path, argument, named):
    config = () if argument.startswith("--config=") else (f"--config={SMOKE}",)
    assert re.search(named, stopped(tmp_path / "run", *config, argument))


def test_a_checkpoint_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    init = f"checkpoint.init={tmp_path / 'empty'}"
    said = stopped(tmp_path / "run", f"--config={SMOKE}", f"--config.{init}")
    assert init in said


@pytest.mark.parametrize(
    "name, text, argument, named",
    [
        (
            "config.json",
            '{"seed": 5, "stages": []}',
            "--config.seed=0",
            "but the run in",
        ),
        ("thesis.tex", "", "--config.seed=0", "is not the folder of a run"),
        # A wrong config is named even where the run is finished.
        (
            "summary.json",
            '{"finished": true}',
            "--config.rollout.num_paths=99",
            "error: rollout.num_paths=99",
        ),
    ],
)
def test_what_is_in_the_folder_is_left_alone(tmp_path, name, text, argument, named):
    (tmp_path / name).write_text(text)
    assert named in stopped(tmp_path, f"--config={SMOKE}", argument)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text
