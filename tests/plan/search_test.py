"""Tests of the plan's search: its laws on invented prices, its prices on invented programs."""

import dataclasses
import itertools
import json
import math
import random

import jax
import pytest

from pr1_jax.plan import found as found_
from pr1_jax.plan import hardware, hlo, kernels, memory, prices, schedule, search
from pr1_jax.plan.prices import Compiled, extrapolate
from pr1_jax.plan.search import SAMPLING, UPDATE, Axis, Price
from pr1_jax.system import accelerators, mesh
from tests.helpers import command
from tests.plan import plan_test

GIB = accelerators.GIB


# --- The search, on invented prices ---------------------------------------------------


class Invented:
    """A space of three meshes in which all prices are there from the start."""

    def __init__(self, seed=0, fits=0.6, bound=lambda mesh: 0.0):
        draw = random.Random(seed)
        self.meshes = [{"mesh": n} for n in (1, 2, 4)]
        self._axes = {
            UPDATE: [
                Axis("a", [{"a": n} for n in range(4)]),
                Axis("b", [{"b": n, "c": -n} for n in range(3)]),
            ],
            SAMPLING: [Axis("rows", [{"rows": 8 * n} for n in range(1, 5)])],
        }
        self.prices, self.asked = {}, []
        for kind, axes in self._axes.items():
            for shape in self.meshes:
                for choice in itertools.product(*(axis.choices for axis in axes)):
                    setting = {**shape, **{n: x for c in choice for n, x in c.items()}}
                    why = "" if draw.random() < fits else "it is too large"
                    seconds = {kind: 1 + draw.random()}
                    price = Price(seconds, {kind: 1}, why)
                    self.prices[kind, self._key(setting)] = price
        self._bound = bound
        self.own = {"mesh": 2, "a": 1, "b": 1, "c": -1, "rows": 16}

    @staticmethod
    def _key(setting):
        return tuple(sorted(setting.items()))

    def axes(self, kind, mesh):
        return self._axes[kind]

    def start(self, kind, mesh, like):
        names = {n for axis in self._axes[kind] for n in axis.choices[0]}
        return {name: like[name] for name in names}

    def price(self, kind, setting, *, full=False):
        self.asked.append((kind, self._key(setting), full))
        return self.prices[kind, self._key(setting)]

    def bound(self, kind, mesh):
        return self._bound(mesh)

    def of(self, kind, setting):
        """The price of a complete setting, without asking."""
        names = {"mesh", *self.start(kind, setting, setting)}
        return self.prices[kind, self._key({n: setting[n] for n in names})]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_found_fits_and_is_no_slower_than_the_config(seed):
    space = Invented(seed, fits=0.3 + 0.02 * seed)
    found = search.search(space)
    assert found.complete
    totals = [x.total for x in found.candidates]
    assert totals == sorted(totals) and all(map(math.isfinite, totals))
    for x in found.candidates:
        assert {*x.setting} == {*space.own}
        for kind, price in ((UPDATE, x.update), (SAMPLING, x.sampling)):
            assert price == space.of(kind, x.setting) and not price.why
    own = [space.of(kind, space.own) for kind in search.KINDS]
    if not any(price.why for price in own):
        assert found.total <= sum(price.total for price in own)
    assert len(space.asked) == len({*space.asked})  # nothing is priced twice
    refused = {space._key(setting) for setting, _ in found.refused}
    wrong = {key for kind, key, _ in space.asked if space.prices[kind, key].why}
    assert refused == wrong


def test_a_smooth_space_gives_the_best_of_all():
    """More memory is faster until it does not fit, and one axis has to give way."""
    space = Invented(fits=1.0)
    for kind, key in [*space.prices]:
        of = dict(key)
        if kind == UPDATE:
            why = "" if of["a"] + of["b"] <= 3 else "it is too large"
            seconds = 100 - 10 * of["a"] - 9 * of["b"] - of["mesh"]
        else:
            why, seconds = "", 50 + (of["rows"] - 24) ** 2 - of["mesh"]
        space.prices[kind, key] = Price({kind: seconds}, {}, why)
    found = search.search(space)
    best = {"mesh": 4, "a": 3, "b": 0, "c": 0, "rows": 24}
    assert found.best.setting == best and found.total == (100 - 30 - 4) + (50 - 4)
    meshes = [x.setting["mesh"] for x in found.candidates if x is not found.own]
    assert meshes == [4, 2, 1] and found.candidates[-1] is found.own


def test_where_the_first_setting_does_not_fit_the_leanest_is_tried():
    axes = [Axis(n, [{n: x} for x in range(3)]) for n in "ab"]
    fits = lambda setting: setting["a"] + setting["b"] == 0
    price = lambda setting: Price({"x": 1.0}, {}, "" if fits(setting) else "too large")
    setting, found = search.descend({"a": 2, "b": 2}, axes, price)
    assert setting == {"a": 0, "b": 0} and not found.why
    none = lambda setting: Price({}, {}, "too large")
    assert search.descend({"a": 2, "b": 2}, axes, none)[1].why == "too large"


def test_a_mesh_that_cannot_be_the_fastest_is_not_priced():
    least = lambda mesh: 0.0 if mesh["mesh"] == 2 else 10.0
    space = Invented(fits=1.0, bound=least)
    found = search.search(space)
    assert {dict(key)["mesh"] for _, key, _ in space.asked} == {2}
    assert [mesh["mesh"] for mesh, _ in found.left] == [1, 4]
    assert all("20 s at the least" in why for _, why in found.left)


def test_a_far_worse_start_is_not_improved():
    space = Invented(fits=1.0)
    for (kind, key), price in space.prices.items():
        if kind == UPDATE and dict(key)["mesh"] == 1:
            slow = {UPDATE: 100 * price.total}
            space.prices[kind, key] = dataclasses.replace(price, seconds=slow)
    search.search(space)
    tried = [key for kind, key, _ in space.asked if kind == UPDATE]
    assert [dict(key)["mesh"] for key in tried].count(1) == 1


def test_the_fastest_is_confirmed_and_the_next_taken_if_it_does_not_fit():
    space = Invented(fits=1.0)
    alone = search.search(space)
    first, second = alone.candidates[:2]

    def price(kind, setting, *, full=False):
        known = space.of(kind, setting)
        is_first = all(first.setting[n] == x for n, x in setting.items())
        why = "too large in full" if full and is_first and kind == UPDATE else ""
        return dataclasses.replace(known, why=why)

    space.price = price
    found = search.search(space, confirm=True)
    assert found.confirmed and found.best.setting == second.setting
    assert (first.setting, "too large in full") in found.refused


def test_an_interruption_leaves_what_was_found():
    space, found = Invented(fits=1.0), search.Found()
    price, count = space.price, itertools.count()

    def interrupted(*args, **kwargs):
        if next(count) == 6:
            raise KeyboardInterrupt
        return price(*args, **kwargs)

    space.price = interrupted
    with pytest.raises(KeyboardInterrupt):
        search.search(space, found=found)
    assert found.own is not None and found.best is not None and not found.complete


# --- Prices, on invented programs -----------------------------------------------------


def test_the_line_through_two_depths_is_exact_where_costs_are_linear():
    of = lambda n: Compiled({"head": 3.0, "attention": 0.5 * n}, 100 + 7 * n)
    found = extrapolate((2, 4), [of(2), of(4)], 36)
    assert found.seconds == pytest.approx(of(36).seconds)
    assert found.rest == pytest.approx(of(36).rest)
    lost = dataclasses.replace(of(4), fits=False)
    assert not extrapolate((2, 4), [of(2), lost], 36).fits
    late = Compiled({"copies": 1.0}, 9.0), Compiled({"copies": 1.0, "rows": 2.0}, 9.0)
    assert extrapolate((2, 4), late, 36).seconds == {"copies": 1.0, "rows": 34.0}


def test_a_cache_keeps_programs_and_names_a_file_that_is_none(tmp_path):
    path = tmp_path / "folder" / "programs.jsonl"
    first = Compiled({"head": 0.25}, 12.0)
    assert prices.Cache(path).get("key", lambda: first, name="a") == first
    again = prices.Cache(path)
    assert again.get("key", lambda: pytest.fail("compiled twice"), name="a") == first
    path.write_bytes(path.read_bytes() + b'{"half')  # the last line was not finished
    assert prices.Cache(path).get("key", lambda: None) == first
    with pytest.raises(ValueError, match="is a folder"):
        prices.Cache(tmp_path)
    path.write_text('{"key": "a"}\n')
    with pytest.raises(
        ValueError, match=r"programs.jsonl, line 1: 'seconds' is missing"
    ):
        prices.Cache(path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"programs.jsonl, line 1"):
        prices.Cache(path)


def test_a_key_says_all_that_a_program_follows_from(monkeypatch):
    made = plan_test.built()
    key = lambda kind=UPDATE, topology=DEVICES: prices._key(Shown(kind, made), topology)
    slower = dataclasses.replace(UNIT, hbm_per_sec=1.0)
    keys = [key(), key("decode"), key(topology=dataclasses.replace(DEVICES, text="x"))]
    keys.append(key(topology=dataclasses.replace(DEVICES, hardware=slower)))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--some=flag")
    keys.append(key())
    monkeypatch.setattr(prices, "TPU_OPTIONS", {"some": "option"})
    keys.append(key())
    monkeypatch.setattr(prices, "_versions", lambda: ["jax 99"])
    keys.append(key())
    assert len({*keys}) == len(keys) == 7 and key() == keys[-1]


class Shown:
    """A lowered program that only knows what it was made of."""

    def __init__(self, kind, made):
        self.kind, self.made = kind, made

    def as_text(self):
        c = self.made.config
        fields = c.rl.micro_batch_size, c.rollout.rows, c.model.logits_chunk
        return f"{self.kind} {self.made.model} {dict(self.made.mesh.shape)} {fields}"


UNIT = dataclasses.replace(plan_test.UNIT, clock_hz=1.0)
DEVICES = hardware.Topology("unit:8", UNIT, (8,))


@pytest.fixture
def invented(monkeypatch):
    """Programs that take as long, and as much memory, as is easily said."""
    compiled = []

    def compile_with_text(lowered, arguments):
        compiled.append(lowered.as_text())
        made = lowered.made
        layers, chunk = made.model.num_layers, made.config.model.logits_chunk
        size = made.config.rl.micro_batch_size
        if lowered.kind == UPDATE:
            seconds = layers * (1 + 8 / size) + (chunk > 0)
            rest = layers * size * 2**20
        else:
            rows = made.config.rollout.rows
            seconds, rest = layers * (20 + rows), layers * rows * 2**20
        return memory.Program(int(rest)), str(seconds)

    read = lambda program, hardware, bodies: schedule.Schedule(
        [schedule.Cost("x", "fusion", "head", "", 1, float(program), 0)]
    )
    monkeypatch.setattr(hlo, "parse", lambda text: text)
    monkeypatch.setattr(kernels, "measure", lambda program, hardware: {})
    monkeypatch.setattr(memory, "compile_with_text", compile_with_text)
    monkeypatch.setattr(schedule, "of_program", read)
    monkeypatch.setattr(prices, "lower_update", lambda made: Shown(UPDATE, made))
    both = lambda made, lanes: {n: Shown(n, made) for n in ("prefill", "decode")}
    monkeypatch.setattr(prices, "lower_sampling", both)
    return compiled


def space(tmp_path, limit=GIB, **fields):
    config = plan_test.tiny(mesh__fsdp=2, mesh__data=-1, **fields)
    topology = dataclasses.replace(
        DEVICES, hardware=dataclasses.replace(UNIT, hbm_bytes=limit)
    )
    cache = prices.Cache(tmp_path / "programs.jsonl")
    return prices.Prices(config, topology, jax.devices(), cache=cache)


def test_meshes_are_those_that_divide_model_and_devices(tmp_path, invented):
    """One key and value head: `tensor` cannot split it. Batches of 8 on 8 devices."""
    of = space(tmp_path)
    shapes = [
        tuple(x[f"mesh.{n}"] for n in ("data", "fsdp", "tensor")) for x in of.meshes
    ]
    assert shapes == [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
    of = space(tmp_path, model__num_kv_heads=2)
    assert (2, 2, 2) in {
        tuple(x[f"mesh.{n}"] for n in ("data", "fsdp", "tensor")) for x in of.meshes
    }
    assert all(x["sft.micro_batch_size"] == 8 for x in of.meshes)


def test_a_search_of_a_config_and_its_cache(tmp_path, invented):
    fields = {"model__num_layers": 16, "rollout__max_sequential_steps": 0}
    first = space(tmp_path, model__remat=True, **fields)
    found = search.search(first)
    assert found.complete and first.compiled == len(invented) > 4
    best = found.best.setting
    # Without a chunk, with the largest micro-batch; 4 prompts × 4 responses are 2 batches.
    assert (best["rl.micro_batch_size"], best["model.logits_chunk"]) == (8, 0)
    assert found.best.seconds["update"] == 2 * 16 * (1 + 8 / 8)
    # 16 responses of 48 tokens on average; at the end the last go on to 96.
    rows, c = best["rollout.rows"], first.experiment.config
    steps = 48 * 16 / rows + 96 - 48
    each = 16 * (20 + rows) / c.rollout.steps_per_chunk
    assert found.best.seconds["decode"] == pytest.approx(steps * each)
    assert found.total <= found.own.total

    again = space(tmp_path, model__remat=True, **fields)
    assert found_.data(search.search(again), again) == found_.data(found, first) | {
        "compiled_programs": 0
    }
    assert json.loads(json.dumps(found_.data(found, first)))["fastest"]["overrides"]
    assert "An RL step" in found_.candidates_table(found).title


def test_all_meshes_are_priced_whatever_the_config_can_split(tmp_path, invented):
    """Micro-batches of 4 on meshes of 4 × 2 devices; other meshes have 8 shards."""
    fields = {"mesh__tensor": 2, "model__num_kv_heads": 2, "sft__micro_batch_size": 4}
    of = space(tmp_path, rl__micro_batch_size=4, **fields)
    found = search.search(of)
    shapes = {
        tuple(x.setting[f"mesh.{n}"] for n in mesh.AXES) for x in found.candidates
    }
    assert shapes == {tuple(x[f"mesh.{n}"] for n in mesh.AXES) for x in of.meshes}
    assert not found.refused and not found.left


def test_overrides_are_what_differs_from_the_config():
    given = {"mesh.data": -1, "mesh.fsdp": 1, "rollout.rows": 8}
    own = given | {"mesh.data": 4}
    of = lambda **changes: found_.overrides(
        own | {n.replace("__", "."): x for n, x in changes.items()}, given, own
    )
    assert of() == []
    assert of(rollout__rows=16) == ["--config.rollout.rows=16"]
    assert of(mesh__data=2, mesh__fsdp=2) == [
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
    ]
    assert of(mesh__fsdp=2) == ["--config.mesh.data=4", "--config.mesh.fsdp=2"]


def test_what_does_not_fit_is_never_the_answer(tmp_path, invented):
    """Six layers take 6 MiB a response of 76 tokens, so 78 MiB for 8 of 124 tokens."""
    limit, fields = 100 * 2**20, {"rl__mini_batches": 1, "rl__micro_batch_size": 16}
    of = space(tmp_path, limit, model__num_layers=6, model__remat=True, **fields)
    found = search.search(of)
    assert "training temporaries" in found.own.why
    assert found.best.setting["rl.micro_batch_size"] == 8
    assert 78 * 2**20 < max(found.best.memory.values()) <= limit
    assert {
        x["rl.micro_batch_size"] for x, _ in found.refused if "model.remat" in x
    } == {16}
    nothing = search.search(space(tmp_path, 2**10))
    assert nothing.best is None and nothing.complete
    assert "NOTHING FITS" in str(found_.verdict(nothing, of))
    assert all("needs" in why for _, why in nothing.refused)
    assert "by arithmetic" in nothing.refused[0][1]


def test_rows_whose_decode_steps_do_not_fit_are_not_the_answer(tmp_path, invented):
    """Steps of six layers take 6 MiB a row, as only the compiler knows."""
    limit, fields = 90 * 2**20, {"model__num_layers": 6, "model__remat": True}
    of = space(tmp_path, limit, rl__micro_batch_size=8, **fields)
    found = search.search(of)
    most = found.best.setting["rollout.rows"]
    refused = [x["rollout.rows"] for x, _ in found.refused if "rollout.rows" in x]
    assert refused and most < min(refused)
    assert max(found.best.memory.values()) <= limit


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--topology=gpu:h100x8", "--config.stages=('sft',)"], "stages=('sft',)"),
        (["--topology=gpu:h100x8", "--search_cache=."], "--search_cache=. is a folder"),
    ],
)
def test_a_mistake_is_one_line(args, text):
    config = "--config=configs/rl_alternating.py:smoke"
    done = command.run("pr1_jax.plan", config, "--search", *args)
    assert done.returncode == 2 and done.stdout == ""
    assert text in done.stderr and len(done.stderr.splitlines()) == 1
