"""The launch scripts against commands that record what they were told."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.helpers import launch_world, stand_ins
from tests.helpers.launch_world import PROGRAM, ROOT, XPK

SCRIPTS = ["tpu_vm.sh", "xpk.sh", "slurm.sh", "ssh.sh"]
TPU = ["--name=pr1", "--zone=us-west4-a", "--project=mine", "--type=v5litepod-16"]
SSH = ["--hosts=one,me@two", "--accelerator=cpu"]
QUICK = ["--poll-sec=0.2", "--backoff-sec=0"]
ALL_FLAGS = {
    "tpu_vm.sh": [*TPU, "--spot"],
    "xpk.sh": XPK,
    "slurm.sh": ["--name=pr1", "--nodes=2", "--gpus-per-node=4"],
    "ssh.sh": SSH,
}


@pytest.fixture
def world(tmp_path):
    made = launch_world.World(tmp_path)
    yield made
    made.close()


def verbs(calls):
    """The words of gcloud's TPU calls that say what is done to what."""
    return [(call[3], call[4]) for call in calls if call[:3] == TPU_CALL]


TPU_CALL = ["gcloud", "compute", "tpus"]


# All scripts.


def test_shellcheck():
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    command = shutil.which("shellcheck", path=path)
    assert command, "pip install -e '.[test]'"
    scripts = [*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/**/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > 9
    done = subprocess.run(
        [command, "-x", *scripts], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "host.sh"])
def test_help_is_the_comment_on_top(world, script):
    text = world.run(script, "--help")
    comment = (ROOT / "launch" / script).read_text().partition("\nset -euo")[0]
    assert text.splitlines() == [
        re.sub("^# ?", "", line) for line in comment.splitlines()[1:]
    ]
    # Every flag that is read is explained.
    source = (ROOT / "launch" / script).read_text()
    flags = " ".join(re.search(r'parse "([^"]*)" "([^"]*)"', source).groups())
    explained = set(re.findall(r"--([a-z-]+)", text))
    assert set(flags.replace("\\", "").split()) <= explained


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("tpu_vm.sh", [], "an action is not one of create"),
        ("tpu_vm.sh", ["creat"], "creat is not one of create"),
        ("tpu_vm.sh", ["create", "--zone=z"], "--name is missing"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z"], "--type is missing"),
        ("tpu_vm.sh", ["create", "--name=n", "--zone=z", "--type=v9-1"], "--version"),
        ("tpu_vm.sh", ["create", "--name"], "--name needs a value"),
        ("tpu_vm.sh", ["run", *TPU, "--config=c"], "unknown flag --config=c"),
        ("tpu_vm.sh", ["run", *TPU, "--spot=no"], "unknown flag --spot=no"),
        ("tpu_vm.sh", ["run", *TPU], "--config is missing"),
        ("tpu_vm.sh", ["run", *TPU, "--", "--config=c"], "--workdir is missing"),
        ("tpu_vm.sh", ["run", *TPU, "--", "--config=c", "--workdir=w"], "--workdir=w"),
        ("tpu_vm.sh", ["run", *TPU, "--", *PROGRAM, "a\nb"], "line break"),
        ("tpu_vm.sh", ["run", *TPU, "--restarts=x"], "--restarts=x"),
        ("xpk.sh", ["run", *XPK[1:]], "--cluster is missing"),
        ("xpk.sh", ["build"], "--image is missing"),
        ("xpk.sh", ["run", *XPK, "--name=A_b"], "--name=A_b"),
        ("slurm.sh", ["submit"], "--name is missing"),
        ("slurm.sh", ["submit", "--name=a b"], "--name=a b"),
        ("slurm.sh", ["all", "--name=a"], "--config is missing"),
        ("ssh.sh", ["status"], "--hosts is missing"),
        ("ssh.sh", ["status", "--hosts=-oProxyCommand=x"], "-oProxyCommand=x"),
        ("ssh.sh", ["status", "--hosts-file=none"], "--hosts-file=none"),
        ("ssh.sh", ["status", *SSH, "--accelerator=npu"], "--accelerator=npu"),
    ],
)
def test_mistake_is_one_line(world, script, args, message):
    error = world.run(script, *args, code=2)
    assert message in error and error.startswith(f"{script}: ")
    assert error.count("\n") == 1
    assert not world.calls("create")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("action", ["all", "watch"])
def test_dry_run_prints_all_and_runs_nothing(world, script, action):
    if action == "watch" and "watch" not in (ROOT / "launch" / script).read_text():
        action = "all"
    world.env["PATH"] = "/usr/bin:/bin"  # none of the real commands is needed
    before = sorted(world.checkout.rglob("*"))
    lines = world.run(
        script, action, *ALL_FLAGS[script], "--dry-run", "--", *PROGRAM
    ).splitlines()
    assert sorted(world.checkout.rglob("*")) == before
    commands = [shlex.split(line, comments=True) for line in lines]
    told = [command[0] for command in commands if command]
    assert set(told) <= {*stand_ins.NAMES, "git", "bash"}
    assert not world.calls()
    assert any(PROGRAM[0] in line for line in lines)
    if script == "tpu_vm.sh":
        assert verbs(commands)[:5] == [
            ("tpu-vm", "describe"),
            ("tpu-vm", "create"),
            ("tpu-vm", "ssh"),
            ("tpu-vm", "scp"),
            ("tpu-vm", "ssh"),
        ]


# Cloud TPU VMs.


def test_tpu_is_created_once(world):
    world.run("tpu_vm.sh", "create", *TPU, "--spot", "--create-flags=--network=n --x")
    world.run("tpu_vm.sh", "create", *TPU, "--spot")
    assert world.calls("create") == [
        [*TPU_CALL, "tpu-vm", "create", "pr1", "--version=v2-alpha-tpuv5-lite"]
        + ["--accelerator-type=v5litepod-16", "--spot", "--network=n", "--x"]
        + ["--quiet", "--zone=us-west4-a", "--project=mine"]
    ]


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_preempted_tpu_is_made_again(world, state):
    world.write("slice", state)
    world.run("tpu_vm.sh", "create", *TPU)
    assert [verb for _, verb in verbs(world.calls())] == [
        *("describe", "delete"),
        *("describe", "create"),
        "describe",
    ]
    assert "--quiet" in world.calls("delete")[0]


def test_queued_tpu_is_waited_for_and_made_again(world):
    world.write("request", "SUSPENDED")
    world.write("request.plan", "\n\n")
    flags = [*TPU, "--queued", *QUICK]
    process = world.start("tpu_vm.sh", "create", *flags)
    world.wait_for(lambda: world.calls("create"))
    world.write("request.plan", "PROVISIONING\nACTIVE\n")
    assert process.wait(timeout=60) == 0
    process.communicate()
    assert world.calls("delete")[0][3:7] == [
        *("queued-resources", "delete", "pr1", "--force")
    ]
    assert world.calls("create")[0][3:7] == [
        *("queued-resources", "create", "pr1", "--node-id=pr1")
    ]
    assert "--runtime-version=v2-alpha-tpuv5-lite" in world.calls("create")[0]


def test_an_error_is_not_an_absent_tpu(world):
    world.write("answer.gcloud", "1\nERROR: you do not have permission")
    assert "permission" in world.run("tpu_vm.sh", "create", *TPU, code=1)
    assert not world.calls("create")


def test_tpu_delete_and_status(world):
    world.run("tpu_vm.sh", "delete", *TPU)
    assert not world.calls("delete")
    assert world.run("tpu_vm.sh", "status", *TPU) == "slice: ABSENT\n"
    world.run("tpu_vm.sh", "create", *TPU)
    assert world.run("tpu_vm.sh", "status", *TPU) == "slice: READY\njob: none\n"
    world.run("tpu_vm.sh", "delete", *TPU)
    world.run("tpu_vm.sh", "delete", *TPU)
    assert len(world.calls("delete")) == 1


def test_install_only_what_changed(world):
    world.run("tpu_vm.sh", "create", *TPU)
    status = world.git("status", "--porcelain")
    world.run("tpu_vm.sh", "install", *TPU, "--ssh-flags=--internal-ip")
    assert len(world.calls("scp")) == 1
    assert "--internal-ip" in world.calls("scp")[0]
    assert world.calls("python", "install", ".[tpu]")
    world.run("tpu_vm.sh", "install", *TPU)
    assert len(world.calls("scp")) == 1
    # An edit that is not committed goes along, a file that is gone goes away.
    (world.checkout / "requirements.txt").write_text("jax\n")
    (world.checkout / "launch" / "test.sh").unlink()
    world.run("tpu_vm.sh", "install", *TPU)
    assert len(world.calls("scp")) == 2
    for worker in "01":
        copied = world.home(worker) / "pr1_jax"
        assert (copied / "requirements.txt").read_text() == "jax\n"
        assert not (copied / "launch" / "test.sh").exists()
    world.git("checkout", "--quiet", "--", ".")
    assert world.git("status", "--porcelain") == status


def ready(world, *exits):
    """A slice with the checkout on it, whose program will act like this."""
    world.run("tpu_vm.sh", "create", *TPU)
    world.run("tpu_vm.sh", "install", *TPU)
    for worker in "01":
        (world.home(worker) / "exits").write_text("\n".join(exits))


def test_tpu_run_once_with_its_arguments(world):
    ready(world, "wait")
    world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM)
    world.wait_for(lambda: len(world.programs()) == 2)
    assert world.programs() == [["--distributed", *PROGRAM]] * 2
    world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM)
    assert len(world.programs()) == 2
    other = world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM, "--x", code=1)
    assert "another job is running" in other
    (world.checkout / "requirements.txt").write_text("jax\n")
    assert "stop it first" in world.run("tpu_vm.sh", "install", *TPU, code=1)
    assert "job: running" in world.run("tpu_vm.sh", "status", *TPU)


def test_stop_lets_the_program_save(world):
    ready(world, "wait")
    world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM)
    world.wait_for(lambda: all((world.home(w) / "waiting").exists() for w in "01"))
    world.run("tpu_vm.sh", "stop", *TPU)
    assert all((world.home(worker) / "saved").exists() for worker in "01")
    assert "job: stopped" in world.run("tpu_vm.sh", "status", *TPU)
    assert "nothing is running" in world.run("tpu_vm.sh", "stop", *TPU)
    world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM)
    world.wait_for(lambda: "finished" in world.run("tpu_vm.sh", "status", *TPU))


def test_tail_ends_with_the_job(world):
    ready(world, "2")
    world.run("tpu_vm.sh", "run", *TPU, "--", *PROGRAM)
    assert world.run("tpu_vm.sh", "tail", *TPU).endswith("state=wrong\n")
    assert "--worker=0" in world.calls("ssh")[-1]


def test_watch_brings_a_preempted_job_back(world):
    world.run("tpu_vm.sh", "create", *TPU)
    for worker in "01":
        (world.home(worker) / "exits").write_text("wait")
    process = world.start("tpu_vm.sh", "watch", *TPU, *QUICK, "--", *PROGRAM)
    world.wait_for(lambda: len(world.programs()) == 2)
    world.write("slice.plan", "PREEMPTED\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(world.calls("create")) == 2 and len(world.calls("delete")) == 1
    assert len(world.calls("scp")) == 2
    assert world.programs() == [["--distributed", *PROGRAM]] * 4


@pytest.mark.parametrize("exits, code", [(["2"], 2), (["1"] * 3, 1)])
def test_watch_ends_where_a_restart_is_of_no_use(world, exits, code):
    ready(world, *exits)
    flags = [*TPU, *QUICK, "--restarts=2"]
    world.run("tpu_vm.sh", "watch", *flags, "--", *PROGRAM, code=code)
    assert len(world.programs()) == 2 * len(exits)


# Plain ssh.


def ssh_ready(world, **exits):
    for host in ("one", "me@two"):
        stand_ins.make_home(world.root, host)
    world.run("ssh.sh", "install", *SSH)
    for host, lines in exits.items():
        (world.home(host.replace("two", "me@two")) / "exits").write_text(lines)


def test_ssh_joins_the_hosts(world):
    ssh_ready(world)
    world.run("ssh.sh", "run", *SSH, "--", *PROGRAM)
    world.wait_for(lambda: world.run("ssh.sh", "status", *SSH).count("finished") == 2)
    joined = ["--coordinator=one:8476", "--num_processes=2"]
    assert sorted(world.programs()) == [
        [*joined, f"--process_id={i}", *PROGRAM] for i in range(2)
    ]
    assert {call[-1] for call in world.calls("install")} == {"."}  # --accelerator=cpu
    hosts = world.checkout / "hosts"
    hosts.write_text("# first\n me@two \n\none # last\n")
    flags = [f"--hosts-file={hosts}", "--coordinator=10.0.0.2:99"]
    world.run("ssh.sh", "run", *flags, "--", *PROGRAM)
    world.wait_for(lambda: len(world.programs()) == 4)
    assert world.programs()[-1][0] == "--coordinator=10.0.0.2:99"
    ids = {call[-2]: call[-1] for call in world.calls("ssh")[-2:]}
    assert "--process_id=0" in ids["me@two"] and "--process_id=1" in ids["one"]


def test_ssh_installs_once(world):
    ssh_ready(world)
    assert len(world.calls("scp")) == 2
    world.run("ssh.sh", "install", *SSH)
    assert len(world.calls("scp")) == 2
    (world.checkout / "requirements.txt").write_text("jax\n")
    world.run("ssh.sh", "install", *SSH, "--shared-home")
    assert len(world.calls("scp")) == 3
    (world.home("one") / "down").touch()
    world.run("ssh.sh", "install", *SSH, code=1)


def test_a_failure_is_run_again_on_its_host(world):
    ssh_ready(world, one="1\n134\n0", two="0")
    world.run("ssh.sh", "watch", *SSH, *QUICK, "--", *PROGRAM)
    assert len(world.programs()) == 4
    assert world.run("ssh.sh", "status", *SSH) in (
        "one: finished\nme@two: finished\n",
        "me@two: finished\none: finished\n",
    )


def test_a_host_that_went_down_joins_again(world):
    ssh_ready(world, one="wait", two="wait\nwait")
    process = world.start("ssh.sh", "watch", *SSH, *QUICK, "--", *PROGRAM)
    two = world.home("me@two")
    world.wait_for((two / "waiting").exists)
    (two / "down").touch()
    os.killpg(int(next(two.glob("pr1_jax-*.pid")).read_text()), signal.SIGKILL)
    (two / "waiting").unlink()
    (two / "down").unlink()
    world.wait_for((two / "waiting").exists)
    assert process.poll() is None and len(world.programs()) == 3
    world.run("ssh.sh", "stop", *SSH)
    assert process.wait(timeout=60) == 0
    assert "stopped" in process.communicate()[1]
    assert len(world.programs()) == 3


def test_watch_begins_in_spite_of_an_old_stop_and_a_failure(world):
    ssh_ready(world)
    world.run("ssh.sh", "stop", *SSH)
    late = [*SSH, "--unless-stopped"]
    world.run("ssh.sh", "run", *late, "--", *PROGRAM)
    assert not world.programs() and "stopped" in world.run("ssh.sh", "status", *SSH)
    (world.home("one") / "down").touch()
    process = world.start("ssh.sh", "watch", *SSH, *QUICK, "--", *PROGRAM)
    world.wait_for(lambda: len(world.calls("ssh")) > 12)
    (world.home("one") / "down").unlink()
    assert process.wait(timeout=60) == 0
    assert "has finished" in process.communicate()[1]
    assert len(world.programs()) == 2
