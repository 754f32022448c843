"""Jobs whose restarts are a scheduler's: containers, GKE by XPK and SLURM."""

import re
import shlex
import shutil
import subprocess
import time

import pytest

from tests.helpers import launch_world, stand_ins
from tests.helpers.launch_world import PROGRAM, ROOT, XPK


@pytest.fixture
def world(tmp_path):
    made = launch_world.World(tmp_path)
    yield made
    made.close()


# In the foreground: containers and SLURM.


def supervise(world, exits, *flags):
    home = world.root / "hosts" / "me"
    stand_ins.make_home(world.root, "me")
    shutil.copytree(world.checkout, home / "pr1_jax", dirs_exist_ok=True)
    (home / "exits").write_text(exits)
    return subprocess.Popen(
        ["bash", "pr1_jax/launch/host.sh", "supervise", *flags, "--", *PROGRAM],
        cwd=home,
        env=world.env | {"HOME": str(home)},
    )


@pytest.mark.parametrize(
    "exits, flags, code, runs",
    [
        ("0", [], 0, 1),
        ("2\n0", ["--restarts=9", "--backoff-sec=0"], 2, 1),
        ("7\n0", [], 7, 1),
        ("7\n0", ["--restarts=1", "--backoff-sec=0"], 0, 2),
    ],
)
def test_exit_codes_and_restarts(world, exits, flags, code, runs):
    assert supervise(world, exits, *flags).wait(timeout=60) == code
    assert world.programs() == [PROGRAM] * runs


def test_told_to_stop_is_not_finished(world):
    process = supervise(world, "wait", "--restarts=9")
    world.wait_for((world.home("me") / "waiting").exists)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (world.home("me") / "saved").exists() and len(world.programs()) == 1


def test_stop_during_the_pause_before_a_restart(world):
    process = supervise(world, "1\n0", "--restarts=9", "--backoff-sec=60")
    world.wait_for(lambda: not (world.home("me") / "exits").read_text().startswith("1"))
    time.sleep(0.3)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert len(world.programs()) == 1


def test_setup_gets_a_newer_python_where_there_is_none(world, tmp_path):
    """As on TPU VMs, where python3 is 3.10."""
    stand_ins.make_home(world.root, "new")
    new = world.home("new") / "pr1_jax" / ".venv"
    says = f"echo python3 $* >>{world.root}/python3; case $* in"
    old = f"{says} *find*) echo {new}/bin/made;; *uv*) ;; *) exit 1;; esac"
    made = f'case $* in *venv*--clear*) cp -r {new}/. "$4";; esac'
    for path, script in [
        *(
            (tmp_path / "bin" / f"python3{minor}", old)
            for minor in ("", ".11", ".12", ".13")
        ),
        (new / "bin" / "made", made),
    ]:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    world.run("host.sh", "setup", "gpu", "abc")
    assert (world.checkout / ".venv" / "checkout").read_text() == "abc\n"
    installed = [call[-1] for call in world.calls("python", "install")]
    assert installed == [".[gpu]"]
    calls = (world.root / "python3").read_text()
    assert "pip install --quiet --user uv" in calls and "uv python install" in calls
    world.run("host.sh", "setup", "gpu", "abc")
    assert (world.root / "python3").read_text() == calls
    assert "npu" in world.run("host.sh", "setup", "npu", code=2)


# GKE by XPK.


def test_xpk_starts_a_workload_once(world):
    world.run("xpk.sh", "all", *XPK, "--restarts=9", "--", *PROGRAM)
    world.run("xpk.sh", "run", *XPK, "--", *PROGRAM)
    (create,) = world.calls("workload", "create")
    assert {"--workload=pr1", "--cluster=pods", "--tpu-type=v5litepod-16"} < {*create}
    assert {"--docker-image=registry/pr1:1", "--max-restarts=9"} < {*create}
    # Lost hosts are errors too; 2 is a wrong config.
    assert "--restart-on-exit-codes=1" in create
    assert [call[1] for call in world.calls("docker")] == ["build", "push"]
    (command,) = [word for word in create if word.startswith("--command=")]
    command = command.removeprefix("--command=").replace(
        "$$", "$"
    )  # as Kubernetes does
    assert shlex.split(command) == [
        *("exec", "bash", "launch/host.sh", "supervise", "--", "--distributed"),
        *PROGRAM,
    ]


def test_xpk_starts_an_ended_workload_again(world):
    world.write("jobset", "pr1 Failed")
    world.run("xpk.sh", "run", *XPK, "--", *PROGRAM)
    assert [call[2] for call in world.calls("xpk")] == ["delete", "create"]
    world.write("jobset", "pr1 StartupPolicyCompleted")


def test_xpk_delete(world):
    world.run("xpk.sh", "delete", *XPK)
    assert not world.calls("xpk")
    world.write("jobset", "pr1 ")
    world.run("xpk.sh", "delete", *XPK)
    world.run("xpk.sh", "delete", *XPK)
    assert len(world.calls("xpk", "delete", "--workload=pr1")) == 1
    world.run("xpk.sh", "tail", *XPK)
    assert "jobset-name=pr1" in str(world.calls("kubectl", "logs"))


def test_the_image_gets_what_it_copies():
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    recipe = (ROOT / "launch" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE)
    sources = " ".join(copied).split()
    assert sources and all(list(ROOT.glob(source)) for source in sources)
    assert all(source.split("/")[0] in allowed for source in sources)
    assert '"launch/host.sh", "supervise", "--"]' in recipe


# SLURM.


def test_slurm_submits_once(world):
    flags = ["--name=pr1", "--nodes=2", "--gpus-per-node=4", "--time=1:00:00"]
    world.run("slurm.sh", "submit", *flags, "--sbatch-flags=--qos=low", "--", *PROGRAM)
    world.run("slurm.sh", "submit", *flags, "--", *PROGRAM)
    (call,) = world.calls("sbatch")
    assert {"--requeue", "--signal=TERM@120", "--nodes=2", "--qos=low"} < {*call}
    assert {"--ntasks-per-node=1", "--gpus-per-node=4", "--time=1:00:00"} < {*call}
    assert call[-1] == "build/launch/pr1.sbatch"
    world.run("slurm.sh", "cancel", "--name=pr1")
    world.run("slurm.sh", "cancel", "--name=pr1")
    assert len(world.calls("scancel", "--name=pr1")) == 1


@pytest.mark.parametrize(
    "code, state, count, again",
    [
        (0, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),
        (1, "RUNNING", 2, True),
        (1, "RUNNING", 3, False),
        (143, "COMPLETING", 0, False),  # cancelled
    ],
)
def test_slurm_job_is_queued_again(world, code, state, count, again):
    flags = ["--name=pr1", "--gpus-per-node=4", "--restarts=3", "--cpus-per-task=8"]
    world.run("slurm.sh", "submit", *flags, "--", *PROGRAM)
    world.write("queue", state)
    world.write("answer.srun", f"{code}\n")
    script = world.checkout / "build/launch/pr1.sbatch"
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in script.read_text()
    env = world.env | {"SLURM_RESTART_COUNT": str(count)}
    done = subprocess.run(
        ["bash", script], check=False, env=env, capture_output=True, cwd="/"
    )
    assert done.returncode == code
    assert world.calls("scontrol") == [["scontrol", "requeue", "7"]] * again
    (call,) = world.calls("srun")
    assert "--cpus-per-task=8" in call
    assert call[call.index("bash") :] == [
        *("bash", "launch/host.sh", "supervise", "--", "--distributed"),
        *PROGRAM,
    ]
