"""The table of programs compiled for TPUs, from made-up prices."""

import json

import pytest

from pr1_jax.system import accelerators
from tests.programs.tpu_peers import table

V5E = accelerators.TPUS["v5e"]


@pytest.fixture
def write(tmp_path):
    """write(topology, peer, work, layers, seconds, …): a worker's files; None = failed."""

    def write(topology, peer, work, layers, seconds=None, **kwargs):
        folder = tmp_path / topology.replace(":", "-")
        folder.mkdir(exist_ok=True)
        file = folder / f"{peer}-{work}-{layers}.json"
        file.with_suffix(".log").write_text(
            "a warning\nValueError: 1 | 4\nexit status 1\n"
        )
        if seconds is None:
            return
        price = {
            **{name: 0.0 for name in table.ADDED},
            "seconds": seconds,
            "seconds_before_collectives": 0.8 * seconds,
            "seconds_without_overlap": 1.25 * seconds,
            "memory_bytes": 2**30,
            "seconds_by_group": {"attention": seconds / 2},
            "kernels": [],
            "compile_sec": 1.0,
            "tokens": 128,
            "mesh": {"fsdp": 4, "tensor": 4},
            "setting": "as it is",
            "versions": {"jax": "0.10"},
        }
        file.write_text(json.dumps(price | kwargs))

    return write


def row_of(folder, peer, work):
    return next(x for x in table.read_rows(folder) if (x.peer, x.work) == (peer, work))


def test_two_depths_make_a_line_and_all_layers_are_taken_as_they_are(write, tmp_path):
    # A layer takes 2 ms, the rest 6.
    write("v5e:4x4", "ours", "decode", 4, 0.014, needed_bytes=0.5e9)
    write("v5e:4x4", "ours", "decode", 8, 0.022, needed_bytes=0.9e9)
    row = row_of(tmp_path, "ours", "decode")
    assert row.value("seconds") == pytest.approx(0.078)
    assert row.bandwidth == pytest.approx(3.7e9 / 819e9 / 0.078)
    assert row.token_sec == pytest.approx(0.078 / 128)
    write("v5e:4x4", "ours", "decode", 36, 0.1)
    assert row_of(tmp_path, "ours", "decode").value("seconds") == 0.1


def test_one_depth_alone_says_nothing(write, tmp_path):
    write("v5e:4x4", "ours", "update", 2, 0.01)
    write("v5e:4x4", "ours", "update", 4)
    rows = table.read_rows(tmp_path)
    assert rows[0].value("seconds") is None
    assert "4 layers: ValueError: 1 / 4" in table.markdown(rows)
    assert {x["met"] for x in table.summary(rows)["targets"]} == {"not found"}


def test_ours_is_set_against_the_best_mode_that_fits(write, tmp_path):
    for work, seconds, memory in [
        ("update", 0.30, 2**30),
        ("update_once", 0.25, 2**30),
        ("update_tp1", 0.10, V5E.hbm_bytes + 1),
    ]:
        write("v5e:4x4", "tunix", work, 36, seconds, memory_bytes=memory)
    # Twice the tokens in the same time, at half of the peak before collectives.
    flops = 0.5 * 0.2 * V5E.flops_per_sec
    write("v5e:4x4", "ours", "update", 36, 0.25, tokens=256, flops=flops)
    rows = table.read_rows(tmp_path)
    assert table.best(rows, "v5e:4x4", "update").work == "update_once"
    ours = row_of(tmp_path, "ours", "update")
    assert table.ratio(ours, rows) == pytest.approx(0.5)
    assert ours.over_peak("seconds_before_collectives") == pytest.approx(0.5)
    found = {x["target"]: x["met"] for x in table.summary(rows)["targets"]}
    assert found == {
        "MFU before collectives": "yes",
        "MFU if none overlaps": "no",
        "time a token, ours / Tunix": "yes",
    }


def test_a_step_of_blocks_is_set_against_main_streams(write, tmp_path):
    write("v6e:4x4", "tunix", "decode", 36, 0.012)
    write("v6e:4x4", "ours", "decode", 36, 0.006)
    write("v6e:4x4", "ours", "decode_blocks", 36, 0.0072, tokens=256)
    found = {
        x["target"]: x for x in table.summary(table.read_rows(tmp_path))["targets"]
    }
    step = found["a step, over one of main streams"]
    assert step["found"] == pytest.approx(1.2) and step["met"] == "no"
    # That of blocks comes last: half of a step's 7.2 ms for each row's token.
    assert found["time a token, ours / Tunix"]["found"] == pytest.approx(0.3)


def test_results_are_written_and_every_row_has_all_cells(
    write, tmp_path, monkeypatch, capsys
):
    write("v5p:2x2x2", "ours", "decode", 36, 0.006)
    write("v5p:2x2x2", "tunix", "update_packed", 2)
    out = tmp_path / "results"
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path), "--out", str(out)])
    table.main()
    text = (out / "tpu_peers.md").read_text()
    assert capsys.readouterr().out == text
    for part in text.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    found = json.loads((out / "tpu_peers.json").read_text())
    assert found["versions"] == {"ours": {"jax": "0.10"}}
    assert found["rows"][0]["seconds_by_group"] == {"attention": 0.003}


def test_what_cannot_be_compared_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match="has no <topology>"):
        table.read_rows(tmp_path)
    write("v5e:4x4", "ours", "decode", 36, 0.006)
    write("v5e:4x4", "ours", "update", 36, 0.006, versions={"jax": "0.11"})
    with pytest.raises(ValueError, match="prices of ours are of"):
        table.markdown(table.read_rows(tmp_path))
