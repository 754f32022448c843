"""The folder of a run: whose it is, and what it may hold before there is a run."""

import json

import pytest

from configs import rl_alternating
from pr1_jax.system import files
from pr1_jax.workdir.folder import open_workdir, read_config

CONFIG = rl_alternating.get_config("smoke").lock()


def config_json(**fields):
    return json.dumps({**CONFIG.to_dict(), **fields})


def test_a_folder_is_made_and_found_again(tmp_path):
    path = open_workdir(tmp_path / "deep" / "run", CONFIG)
    assert path.is_dir()
    (path / "config.json").write_text(config_json())
    (path / "metrics.jsonl").write_text("")
    assert open_workdir(path, CONFIG) == path
    assert files.plain(read_config(path).to_dict()) == files.plain(CONFIG.to_dict())


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("run.lock", "lost+found", ".nfs0001", ".git"),
        ("log.txt", "logs", "run.log", "slurm-12.out", "process-1.err"),
    ],
)
def test_logs_and_hidden_files_may_be_there_before(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("")
    assert open_workdir(tmp_path, CONFIG) == tmp_path


@pytest.mark.parametrize(
    "names, named",
    [
        (("thesis.tex",), "but thesis.tex; name a new folder"),
        (("metrics.jsonl", "checkpoints"), "but checkpoints, metrics.jsonl;"),
        (("a", "b", "c", "d"), "but a, b, c, …; name"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, names, named):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=f"--workdir={tmp_path} .*{named}"):
        open_workdir(tmp_path, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_a_config_of_something_else_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(ValueError, match="its config.json is of something else"):
        open_workdir(tmp_path, CONFIG)


def test_a_file_or_a_bucket_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; name a folder"):
        open_workdir(tmp_path / "file", CONFIG)
    with pytest.raises(ValueError, match="checkpoint.folder=gs://bucket/run"):
        open_workdir("gs://bucket/run", CONFIG)


def test_the_run_of_another_config_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(config_json(seed=5, mesh={"data": 4}))
    with pytest.raises(ValueError, match="seed=0, but the run in .* has 5"):
        open_workdir(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(config_json(mesh={"data": 4}))
    open_workdir(tmp_path, CONFIG)  # a run may go on with other devices


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (read_config, lambda path: open_workdir(path, CONFIG)):
        named = f"{tmp_path}/config.json does not hold a JSON object: .* put a copy of"
        with pytest.raises(ValueError, match=named):
            read(tmp_path)


@pytest.mark.parametrize("text", ['{"evalua', "", "null", "[]", "[" * 100_000])
def test_other_files_that_were_not_written_whole_are_named(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(files.DamagedFileError, match=f"{path} .* or delete it"):
        files.read_json(path, {})


@pytest.mark.parametrize(
    "line", ["\0\0", "null", "3", "{", "x" * 10_000, "[" * 100_000]
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(
        files.DamagedFileError, match=f"{path}, line 2: not .*: b'"
    ) as e:
        files.read_json_lines(path)
    assert len(str(e.value)) < 400 + len(str(path))
