r"""The paper's claims in miniature: `python -m pr1_jax.study --out=runs/study`.

Trains every cell of `cells.py` at its seeds, one a CPU core at a time, and says of each
claim whether it holds here. What is finished is not run again: the same command goes on.

    --only=phase        some experiments: phase, division, tables, scaffold, shortcuts,
                        planned
    --cell=accuracy_43_plain    one cell, and what it starts from
    --again=accuracy_43_plain   a finished cell once more; exit code 1 unless all is the same
    --dry_run           prints every command, with the time that it is expected to take
    --size=smoke        does everything still run? (learns nothing)

`OUT` then holds results.json, README.md, a picture an experiment, `found/` and `runs/`.
`found/` keeps what was read of each finished run, in a small file a seed: copy or commit
it, and the same command goes on elsewhere, without the runs. A kept cell is run again
only where another has to start from its checkpoint, or for `--again`.

Two quiet CPU cores: about eight hours.
"""

import itertools
import pathlib
import sys

from absl import flags

from pr1_jax.study import cells
from pr1_jax.system import cli

_OUT = flags.DEFINE_string("out", None, "Folder of the study.")
_SEEDS = flags.DEFINE_list(
    "seeds",
    list(map(str, range(cells.MANY))),
    f"Seeds; {cells.MANY} for verdicts. Cells of curves alone take the first {cells.FEW}.",
)
_ONLY = flags.DEFINE_list("only", list(cells.EXPERIMENTS), "Experiments to run.")
_CELL = flags.DEFINE_enum(
    "cell", None, list(cells.CELLS), "One cell to run, with what it starts from."
)
_AGAIN = flags.DEFINE_enum(
    "again", None, list(cells.CELLS), "A finished cell to run once more."
)
_SIZE = flags.DEFINE_enum("size", "embedded", cells.SIZES, "Variant of the configs.")
_OVERRIDE = flags.DEFINE_multi_string(
    "override", [], "field=value of the config of all runs; may be given several times."
)
_JOBS = flags.DEFINE_integer(
    "jobs", 0, "Runs at a time; 0: one a CPU core.", lower_bound=0
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and run nothing.")


def main(argv: list[str]) -> None:
    """Runs the study; the exit code is 1 where some run failed."""
    del argv
    cli.require([_OUT])
    for name in _ONLY.value:
        if name not in cells.EXPERIMENTS:
            cli.stop(f"--only={name} is not one of {', '.join(cells.EXPERIMENTS)}")
    seeds = _SEEDS.value
    if not seeds or not all(x.isdecimal() and int(x) < 2**31 for x in seeds):
        cli.stop(f"--seeds={','.join(seeds)}: whole numbers below 2^31 apart by commas")
    if len(seeds) > cells.MANY:
        cli.stop(f"--seeds={','.join(seeds)}: no cell has more than {cells.MANY}")
    if not _ONLY.value:
        cli.stop(f"--only= names no experiment: {', '.join(cells.EXPERIMENTS)}")
    if _AGAIN.value and (_DRY_RUN.value or _CELL.value):
        cli.stop("--again goes without --dry_run and --cell")
    for override in _OVERRIDE.value:
        if "=" not in override:
            cli.stop(f"--override={override}: FIELD=VALUE is expected")
    from pr1_jax.study import runner

    study = runner.Study(
        pathlib.Path(_OUT.value).absolute(),
        seeds=tuple(dict.fromkeys(map(int, _SEEDS.value))),
        size=_SIZE.value,
        overrides=tuple(_OVERRIDE.value),
        jobs=_JOBS.value,
    )
    experiments = [name for name in cells.EXPERIMENTS if name in _ONLY.value]
    asked = [name for e in experiments for name in cells.MEMBERS[e]]
    chosen = cells.with_starts([_CELL.value] if _CELL.value else asked)
    dense = "shortcuts" in experiments and not _CELL.value
    if _DRY_RUN.value:
        try:
            _print_commands(study, chosen, dense)
        except ValueError as error:
            cli.stop(error)
        return
    try:
        study.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cli.stop(f"--out={_OUT.value}: {error.strerror}")
    say = lambda text: print(text, flush=True)
    runner.stop_by_signal()
    try:
        if _AGAIN.value:
            cell = cells.CELLS[_AGAIN.value]
            seeds = study.seeds_of(cell)
            same = [runner.again(study, cell, seed, say) for seed in seeds]
            sys.exit(0 if all(same) else 1)
        running = runner.Runner(study, say)
        running.run(chosen, dense=dense, after_round=lambda: _publish(study))
    except ValueError as error:
        cli.stop(error)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on in {_OUT.value}")
        sys.exit(130)
    if running.failed:
        say(f"failed: {', '.join(running.failed)} (see log.txt in their folders)")
        sys.exit(1)
    say(f"finished: {_OUT.value}/README.md")


def _print_commands(study, chosen, dense: bool) -> None:
    """Every command that is still to be run, and what is expected to be left."""
    from pr1_jax.study import outcomes, runner

    left, took = 0.0, runner.seconds(study)
    if dense and not outcomes.of_dense(study):
        print(runner.shown(study.dense_command()))
    todo = {seed: runner.to_run(study, chosen, seed) for seed in study.seeds}
    for cell, seed in itertools.chain(*runner.rounds(study, chosen)):
        command = runner.shown(study.command(cell, seed))
        if cell.name not in todo[seed]:
            print(f"# done: {command}")
            continue
        minutes = runner.expected_minutes(study, cell, took)
        left += minutes or 0.0
        print(f"# {runner.expected(minutes)}\n{command}")
    if left:
        at_a_time = study.runs_at_a_time
        print(f"# left: about {left / 60 / at_a_time:.1f} h, {at_a_time} at a time")


def _publish(study) -> None:
    """Writes results.json, README.md, and pictures of experiments that are complete."""
    from pr1_jax.study import figures, results, tables
    from pr1_jax.study.verdicts import judge
    from pr1_jax.system import files

    findings = results.read(study)
    complete = [
        name
        for name in cells.EXPERIMENTS
        if all(member in findings.problems for member in cells.MEMBERS[name])
    ]
    if not findings.problems:
        return
    begun = results.begun(findings)
    out = results.summarize(findings, study)
    asked = pathlib.Path(_OUT.value)
    given = [f"--out={asked.name if asked.is_absolute() else asked}"]
    given += [arg for arg in sys.argv[1:] if not arg.lstrip("-").startswith("out")]
    command = " ".join(["python -m pr1_jax.study", *given])
    out = {
        "about": results.about(study, command),
        "claims": judge(findings, begun),
        **out,
    }
    files.write_json_by_key(study.out / "results.json", out)
    figures.save(out, complete, study.out)
    text = tables.readme(out, complete)
    files.replace_file(study.out / "README.md", text.encode())


if __name__ == "__main__":
    cli.run(main)
