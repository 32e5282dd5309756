"""The command line. Light: every verb imports what it needs when it is called.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong (one line says what), 130 and 143 stopped by a signal, checkpointed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="Align and distil diffusion and flow-matching generators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AllowCode = Annotated[bool, typer.Option("--allow-code", help="call the functions that python: rewards name")]
RunDir = Annotated[Path, typer.Argument(help="a run's folder")]


def main() -> NoReturn:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except ValueError as error:
        if _is_input_error(error):
            print(f"odeon: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    except FloatingPointError as error:  # the learner's, of a loss or gradient that is not finite
        print(f"odeon: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if _is_reward_error(error):
            print(f"odeon: {error}", file=sys.stderr)
            sys.exit(1)
        raise
    sys.exit(0)


def _is_input_error(error: ValueError) -> bool:
    from runtime.experiment.config import InputError

    return isinstance(error, InputError)


def _is_reward_error(error: RuntimeError) -> bool:
    """What a reward says about pictures or a server says about itself is an answer; where in our code it came up is not."""
    from rewards.mixture import RewardError

    return isinstance(error, RewardError)


@app.command()
def launch(
    experiment: Annotated[Path, typer.Argument(help="an experiment's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in run.steps=20")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run's folder; runs/<name> unless given")] = None,
    executor: Annotated[str, typer.Option(help="ray: a process for each role; inline: everything in this one")] = "ray",
    ray: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="local: an own cluster; auto or an address: join one; RAY_ADDRESS if set")
    ] = "local",
    profile: Annotated[int, typer.Option(help="trace this many steps into profile.json; needs --executor inline")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the whole experiment, run nothing")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run an experiment, or go on with the one in its folder."""
    from runtime.run.launch import launch_experiment

    if code := launch_experiment(experiment, overrides or [], run_dir, executor, ray, dry_run, allow_code, profile):
        raise typer.Exit(code)


@app.command("prompt-policy")
def prompt_policy(
    experiment: Annotated[Path, typer.Argument(help="a YAML file such as experiments/prompt_policy.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in run.steps=20")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run's folder; runs/<name> unless given")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the whole experiment, run nothing")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Train a language model to write prompts for a frozen generator, or go on with the run in its folder."""
    from runtime.prompt_policy.run import train_prompt_policy

    if code := train_prompt_policy(experiment, overrides or [], run_dir, dry_run, allow_code):
        raise typer.Exit(code)


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="runs' folders")],
    metric: Annotated[str | None, typer.Option(help="this one only")] = None,
    x: Annotated[str, typer.Option(help="step, seconds or nfe")] = "step",
    out: Annotated[Path | None, typer.Option(help="an interactive page, .html, or a picture: .png, .svg, .pdf")] = None,
) -> None:
    """A table of runs, and a page or a picture with their curves."""
    from inputs import nearest
    from runtime.experiment.config import InputError
    from runtime.finished.compare import AXES, WRITERS, print_table, read_runs

    if x not in AXES:
        raise InputError(f"--x {x!r}: is not known{nearest(x, AXES)}")
    if out is not None and out.suffix not in WRITERS:
        raise InputError(f"--out {str(out)!r}: ends in no known format{nearest(out.suffix, WRITERS)}")
    runs = read_runs(run_dirs)
    keys = {key for lines in runs.values() for line in lines for key in line if key != "hacking"}
    if metric is not None and metric not in keys:
        raise InputError(f"--metric {metric!r}: is in none of the runs{nearest(metric, keys)}")
    print_table(runs)
    if out is not None:
        WRITERS[out.suffix](runs, out, x, metric)
        print(f"wrote {out}")


@app.command()
def sample(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(help="what to draw")],
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    steps: Annotated[int | None, typer.Option(help="solver steps; the experiment's unless given")] = None,
    base: Annotated[bool, typer.Option("--base", help="the frozen teacher instead of the trained adapter")] = False,
    out: Annotated[Path, typer.Option(help="a PNG file")] = Path("sample.png"),
) -> None:
    """Draw one picture."""
    from runtime.finished.verbs import sample_one

    sample_one(run_dir, prompt, seed, steps, base, out)
    print(f"wrote {out}")


@app.command()
def evaluate(
    run_dir: RunDir,
    prompts: Annotated[str | None, typer.Option(help="a prompt set; the experiment's held-out one unless given")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="more rewards: names with commas between them, or {name: NAME, knob: VALUE}")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="solver steps")] = None,
    solver: Annotated[str | None, typer.Option(help="solver")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Score the trained adapter and the teacher on the same noise."""
    from runtime.finished.verbs import evaluate_run

    _table(evaluate_run(run_dir, prompts, rewards or [], steps, solver, allow_code))


@app.command()
def export(
    run_dir: RunDir,
    format: Annotated[str, typer.Option(help="diffusers")] = "diffusers",
    step: Annotated[int | None, typer.Option(help="of the checkpoint; the newest unless given")] = None,
    out: Annotated[Path | None, typer.Option(help="a folder; RUN_DIR/export/FORMAT unless given")] = None,
) -> None:
    """Write the trained adapter for other programs, after proving that they read it right."""
    from runtime.finished.verbs import export_run

    print(f"wrote {export_run(run_dir, format, step, out)}")


rewards_app = typer.Typer(help="The rewards that can be named in an experiment.", invoke_without_command=True)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback()
def rewards(context: typer.Context) -> None:
    from runtime.finished.catalogue import reward_table

    if context.invoked_subcommand is None:
        _table(reward_table())


@rewards_app.command("score")
def score_pictures(
    name: Annotated[str, typer.Argument(help="a reward, several with commas between them, or {name: NAME, knob: VALUE}")],
    images: Annotated[list[Path], typer.Argument(help="picture files")],
    prompt: Annotated[str, typer.Option(help="what they should show")],
    allow_code: AllowCode = False,
) -> None:
    """Score picture files."""
    from runtime.finished.catalogue import score_files

    _table(score_files(name, images, prompt, allow_code))


@rewards_app.command("serve")
def serve_reward(
    name: Annotated[str, typer.Argument(help="a reward, or {name: NAME, knob: VALUE}")],
    host: Annotated[str, typer.Option(help="the address to listen at; 0.0.0.0 is all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    allow_code: AllowCode = False,
) -> None:
    """Run a reward behind HTTP, for entries with `server: http://HOST:PORT`."""
    from runtime.executors.isolation import serve
    from runtime.finished.catalogue import one_reward

    raise typer.Exit(serve(one_reward(name, allow_code), host, port, device))


env_app = typer.Typer(help="Environments for rewards whose libraries cannot stand beside Odeon's.", no_args_is_help=True)
app.add_typer(env_app, name="env")


@env_app.callback()
def env() -> None:
    pass


@env_app.command("build")
def build_env(
    name: Annotated[str, typer.Argument(help="it becomes envs/NAME")],
    requirements: Annotated[Path | None, typer.Option(help="a file for pip; envs/NAME.txt unless given")] = None,
) -> None:
    """Make the environment envs/NAME, for rewards with `env: envs/NAME`."""
    from runtime.executors.isolation import build_environment

    print(f"wrote {build_environment(name, requirements)}")


@app.command()
def describe(name: Annotated[str, typer.Argument(help="an algorithm, a reward, a solver or a generator family")]) -> None:
    """What it is, where it comes from, and its knobs."""
    from runtime.finished.catalogue import description

    print(description(name))


@app.command()
def schema() -> None:
    """The JSON schema of an experiment, for editors."""
    from runtime.experiment.config import Experiment

    print(json.dumps(Experiment.model_json_schema(), indent=2))


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    """What is too long goes on in the next line, so that nothing is cut off; names in the first column stay whole."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    first, *others = rows[0]
    names = Column(first, overflow="fold", no_wrap=max(len(str(row[first])) for row in rows) <= 20)
    columns = [names, *(Column(other, overflow="fold") for other in others)]
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*[str(value) for value in row.values()])
    Console().print(table)


if __name__ == "__main__":
    main()
