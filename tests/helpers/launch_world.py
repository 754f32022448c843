"""A world for the tests of the launch scripts: a checkout and stand-in commands."""

import json
import pathlib
import shutil
import subprocess
import time

import pytest

from tests.helpers import stand_ins

ROOT = pathlib.Path(__file__).parents[2]
# Whatever a shell on the way might take for its own.
PROGRAM = [
    "--config=configs/rl_alternating.py:qwen3_4b",
    "--workdir=/mnt/bucket/a run",
    "--config.data.rl=hf:a/b#x=y z",
    '--config.name=it\'s "$HOME" $$ `id` \\ * ~ ; & | <x> (a) {b,c} ! é',
    "--config.stages=('sft','rl')",
    "--config.model.path=",
]
XPK = ["--cluster=pods", "--name=pr1", "--zone=us-west4-a", "--project=mine"]
XPK += ["--type=v5litepod-16", "--image=registry/pr1:1"]


class World:
    """A checkout, a PATH with stand-ins, and what they were told."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "world"
        self.checkout = tmp_path / "checkout"
        self.started = []
        self.root.mkdir()
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        for name in ("pyproject.toml", "setup.py", "requirements.txt", ".gitignore"):
            shutil.copy(ROOT / name, self.checkout)
        self.git("init", "--quiet")
        self.git("add", "--all")
        stand_ins.install(tmp_path / "bin")
        self.env = {
            "HOME": str(tmp_path),
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "STAND_INS": str(self.root),
            "SLURM_JOB_ID": "7",
        }

    def start(self, script, *args):
        process = subprocess.Popen(
            ["bash", self.checkout / "launch" / script, *args],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, script, *args, code=0):
        """Runs a script; returns its output, or its errors if it is to fail."""
        process = self.start(script, *args)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err + out
        return err if code else out

    def close(self):
        for process in self.started:
            process.kill()
            process.communicate()
        stand_ins.kill_jobs(self.root)

    def git(self, *args):
        return subprocess.check_output(["git", *args], cwd=self.checkout, text=True)

    def calls(self, *words):
        """What was called with all of these words, each as [command, words...]."""
        file = self.root / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if {*words} <= {*call}]

    def programs(self):
        """Arguments of each run of pr1_jax.main."""
        return [call[3:] for call in self.calls("python", "pr1_jax.main")]

    def home(self, host):
        return self.root / "hosts" / host

    def write(self, name, text):
        (self.root / name).write_text(text)

    def wait_for(self, done):
        for _ in range(1500):
            if done():
                return
            time.sleep(0.02)
        logs = self.root.glob("hosts/*/pr1_jax-*.log")
        pytest.fail("never came\n" + "\n".join(log.read_text() for log in logs))
