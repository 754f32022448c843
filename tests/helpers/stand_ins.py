"""Commands that stand in for gcloud, ssh, sbatch and others in launch_test.py.

`install` links them into a folder. Each appends its words to $STAND_INS/calls.jsonl
and then acts on that folder as the real one would on the world:

    slice, request   state of the TPU slice and of the queued request for it
    slice.plan, request.plan   states to come, one a line, one for each look
    hosts/NAME/      home of a host; a file `down` there makes it unreachable
    hosts/NAME/exits what the program does there, one line a run: an exit code, or
                     `wait` for SIGTERM and leave with 0; 0 when there is none left
    jobset, queue    what kubectl and squeue print
    answer.NAME      exit code, newline, output: instead of all that
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

NAMES = [
    *("docker", "gcloud", "kubectl", "sbatch", "scancel", "scontrol", "scp"),
    *("squeue", "srun", "ssh", "xpk"),
]
NUM_WORKERS = 2


def install(folder: pathlib.Path) -> None:
    """Puts all commands into `folder`, to be found first on the PATH."""
    folder.mkdir()
    for name in NAMES:
        _write_command(folder / name, name)


def make_home(root: pathlib.Path, host: str) -> None:
    """Makes a host's home folder with an environment whose Python is a stand-in."""
    home = root / "hosts" / host
    python = home / "pr1_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    _write_command(python, "python")


def kill_jobs(root: pathlib.Path) -> None:
    """Kills what is left in the background on all hosts, as a power cut would."""
    for file in root.glob("hosts/*/pr1_jax-*.pid"):
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def _write_command(path: pathlib.Path, name: str) -> None:
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in "-m pip --version") exit 0 ;; esac\n'  # asked often
        f'exec "{sys.executable}" -IS "{__file__}" {name} "$@"\n'
    )
    path.chmod(0o755)


def _flag(args: list[str], name: str) -> str:
    """Value of --name=VALUE, or nothing."""
    given = [arg for arg in args if arg.startswith(f"--{name}=")]
    return given[-1].partition("=")[2] if given else ""


def _read(file: pathlib.Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _next_line(file: pathlib.Path) -> str:
    """Takes the first line off a file."""
    first, _, rest = _read(file).partition("\n")
    if first:
        file.write_text(rest)
    return first


def _on_host(root: pathlib.Path, host: str, command: str) -> int:
    home = root / "hosts" / host
    if not home.exists() or (home / "down").exists():
        print(f"ssh: connect to host {host}: No route to host", file=sys.stderr)
        return 255
    env = os.environ | {"HOME": str(home)}
    return subprocess.call(["bash", "-c", command], cwd=home, env=env)


def _gcloud(root: pathlib.Path, args: list[str]) -> int:
    if args[0] == "container":
        return 0
    kind = {"tpu-vm": "slice", "queued-resources": "request"}[args[2]]
    verb, state = args[3], root / kind
    workers = [str(worker) for worker in range(NUM_WORKERS)]
    if verb == "describe":
        return _describe(root, kind)
    if verb == "create":
        if state.exists():
            print("ALREADY_EXISTS", file=sys.stderr)
            return 1
        state.write_text("WAITING_FOR_RESOURCES" if kind == "request" else "READY")
        for worker in workers:
            make_home(root, worker)
    elif verb == "delete":
        if not state.exists():
            print("NOT_FOUND", file=sys.stderr)
            return 1
        kill_jobs(root)
        shutil.rmtree(root / "hosts", ignore_errors=True)
        state.unlink()
        (root / "slice").unlink(missing_ok=True)
    elif verb == "start":
        state.write_text("READY")
    elif verb == "ssh":
        chosen = _flag(args, "worker")
        chosen = workers if chosen == "all" else [chosen]
        return max(_on_host(root, host, _flag(args, "command")) for host in chosen)
    elif verb == "scp":
        for worker in workers:
            shutil.copy(args[4], root / "hosts" / worker)
    return 0


def _describe(root: pathlib.Path, kind: str) -> int:
    state = root / kind
    coming = _next_line(root / f"{kind}.plan")
    if coming:
        state.write_text(coming)
    if coming == "PREEMPTED":
        kill_jobs(root)
        for home in (root / "hosts").iterdir():
            (home / "down").touch()
    if coming == "ACTIVE":
        (root / "slice").write_text("READY")
    if not state.exists():
        print(f"ERROR: NOT_FOUND: Resource {kind} was not found", file=sys.stderr)
        return 1
    print(_read(state))
    return 0


def _elsewhere(root: pathlib.Path, name: str, args: list[str]) -> int:
    """The other commands."""
    match name, *args:
        case "ssh", *_, host, command:
            return _on_host(root, host, command)
        case "scp", *_, source, target:
            shutil.copy(source, root / "hosts" / target.rstrip(":"))
        case "xpk", "workload", "create", *_:
            (root / "jobset").write_text(_flag(args, "workload") + " ")
        case "xpk", "workload", "delete", *_:
            (root / "jobset").unlink()
        case "kubectl", "get", *_:
            print(_read(root / "jobset"))
        case "sbatch", *_:
            (root / "queue").write_text("7 PENDING")
        case "squeue", *_:
            print(_read(root / "queue"))
        case "scancel", *_:
            (root / "queue").unlink()
    return 0


def _python(args: list[str]) -> int:
    """The program of a host, or its pip."""
    if args[1] != "pr1_jax.main":
        return 0
    home = pathlib.Path(os.environ["HOME"])
    action = _next_line(home / "exits") or "0"
    if action != "wait":
        return int(action)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    (home / "waiting").touch()
    for _ in range(6000):  # two minutes, should nobody stop it
        if told:
            break
        time.sleep(0.02)
    (home / "saved").touch()
    return 0


def main(name: str, args: list[str]) -> int:
    """Logs the call and acts; returns the exit code."""
    root = pathlib.Path(os.environ["STAND_INS"])
    with open(root / "calls.jsonl", "a") as file:
        file.write(json.dumps([name, *args]) + "\n")
    answer = root / f"answer.{name}"
    if answer.exists():
        code, _, output = answer.read_text().partition("\n")
        print(output, file=sys.stderr if int(code) else sys.stdout)
        return int(code)
    if name == "gcloud":
        return _gcloud(root, args)
    return _python(args) if name == "python" else _elsewhere(root, name, args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
