"""The table of the bench beside other libraries, from made-up results."""

import json

import pytest

from tests.programs.peers import table


@pytest.fixture
def write(tmp_path):
    """write(round, work, row, unit_sec, ...): a worker's files; no seconds = failed."""

    def write(number, work, row, unit_sec=None, **kwargs):
        folder = tmp_path / f"round{number}"
        folder.mkdir(exist_ok=True)
        (folder / f"{work}-{row}.log").write_text("")
        if unit_sec is None:
            return
        result = {
            "peer": row.removesuffix("_eager"),
            "version": {"jax": "0.10"},
            "work": work,
            "tokens": 4096,
            "load_sec": 1.0,
            "first_sec": 5.0,
            "second_sec": 2 * unit_sec,
            "seconds": [
                unit_sec,
                9 * unit_sec,
                unit_sec / 2,
            ],  # the median is the first
            "peak_rss_bytes": 500_000_000,
            "checks": {},
        }
        (folder / f"{work}-{row}.json").write_text(json.dumps(result | kwargs))

    return write


def _targets(folder, work, measure="unit_sec"):
    """Judged targets by peer."""
    rows = table.read_rows(folder)
    targets = [t for t in table.TARGETS if (t.work, t.measure) == (work, measure)]
    return {target.peer: table.judge(target, rows) for target in targets}


def test_medians_spreads_and_ratios_over_rounds(write, tmp_path):
    for number, ours, tunix in [(1, 1.0, 3.0), (2, 2.0, 4.0), (3, 1.0, 2.5)]:
        write(number, "sampling", "ours", ours)
        write(number, "sampling", "tunix", tunix)
    first, second = table.summary(table.read_rows(tmp_path))["rows"]
    assert (first["row"], second["row"]) == ("ours", "tunix")
    assert first["unit_sec"] == (1.0, 2.0, 1.0)
    assert first["from_start_sec"] == (6.0,) * 3
    assert second["second_sec"] == (6.0, 8.0, 5.0)
    judged = _targets(tmp_path, "sampling")["tunix"]
    assert judged["ratio"].values == (3.0, 2.0, 2.5)
    assert judged["met"] is True
    text = table.markdown(table.read_rows(tmp_path))
    line = "| sampling | tunix | 4,096 |  | 3 (2.5–4) | 1,365 | 2.5 (2–3) |"
    assert line in text
    assert "Medians of 3 repeats, then of 3 rounds" in text


def test_a_target_is_set_against_the_best_mode(write, tmp_path):
    write(1, "update", "ours", 1.0, peak_rss_bytes=600)
    write(1, "update", "trl", 2.0, peak_rss_bytes=700)
    write(1, "update", "trl_eager", 1.3, peak_rss_bytes=800)
    write(1, "update", "tunix", 1.9, peak_rss_bytes=599)
    found = _targets(tmp_path, "update")
    assert found["trl"]["row"] == "trl_eager"
    assert found["trl"]["ratio"].median == pytest.approx(1.3)
    assert found["trl"]["met"] is False
    assert found["tunix"]["met"] is False
    found = _targets(tmp_path, "update", "peak_rss_bytes")
    assert found["trl"]["row"] == "trl"
    assert found["trl"]["met"] is True
    assert found["tunix"]["met"] is False


def test_the_first_unit_is_to_be_no_later(write, tmp_path):
    write(1, "step", "ours", 1.0, first_sec=5.0, load_sec=2.0)
    write(1, "step", "tunix", 1.0, first_sec=5.0, load_sec=1.0)
    assert _targets(tmp_path, "step", "first_sec")["tunix"]["met"] is True
    assert _targets(tmp_path, "step", "from_start_sec")["tunix"]["met"] is False


def test_failed_rounds_are_named_and_the_others_count(write, tmp_path):
    for number in (1, 2):
        write(number, "update", "ours", 1.0)
        write(number, "update", "trl")
    write(1, "update", "tunix", 3.0)
    write(2, "update", "tunix")
    (tmp_path / "round2" / "update-tunix.json").write_text('{"peer": ')  # cut short
    rows = table.read_rows(tmp_path)
    text = table.markdown(rows)
    assert "| round1/update-trl.log, round2/update-trl.log |" in text
    assert "| round2/update-tunix.log |" in text
    assert _targets(tmp_path, "update")["tunix"]["met"] is True
    missing = _targets(tmp_path, "update")["trl"]
    assert (missing["row"], missing["ratio"], missing["met"]) == (None, None, None)
    # Every row of a table has as many cells as its head.
    for part in text.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_rounds_in_which_only_one_of_two_ran(write, tmp_path):
    write(1, "step", "ours", 1.0)
    write(1, "step", "tunix")
    write(2, "step", "ours")
    write(2, "step", "tunix", 4.0)
    ratio = _targets(tmp_path, "step")["tunix"]["ratio"]
    assert ratio.values == (4.0,)


@pytest.mark.parametrize("rows", [["ours"], ["trl", "tunix"]])
def test_without_a_peer_or_without_ours(write, tmp_path, rows):
    for row in rows:
        write(1, "step", row, 1.0)
    assert all(t["met"] is None for t in _targets(tmp_path, "step").values())
    text = table.markdown(table.read_rows(tmp_path))
    assert text.count("| not measured |") == len(table.TARGETS)


def test_what_was_measured_is_written(write, tmp_path, monkeypatch, capsys):
    write(1, "update", "ours", 1.0)
    out = tmp_path / "results" / "new"
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path), "--out", str(out)])
    table.main()
    assert capsys.readouterr().out == (out / "peers.md").read_text()
    found = json.loads((out / "peers.json").read_text())
    assert found["versions"] == {"ours": {"jax": "0.10"}}
    assert found["machine"]["cores"] >= 1
    assert found["rows"][0]["unit_sec"] == [1.0]


def test_what_cannot_be_compared_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match="has no round<n>"):
        table.read_rows(tmp_path)
    write(1, "step", "ours", 1.0)
    write(1, "step", "trl", 1.0, tokens=64)
    with pytest.raises(ValueError, match=r"step of \[64, 4096\] tokens"):
        table.read_rows(tmp_path)
