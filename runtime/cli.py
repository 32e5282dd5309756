"""The command line. Light to import: every command imports what it needs when it is called.

Exit codes: 0 done, 1 the run failed, 2 invalid input (one line states what), 130 and 143 stopped by a signal.
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

AllowCode = Annotated[bool, typer.Option("--allow-code", help="allow rewards that are Python functions (python:...)")]
RunDir = Annotated[Path, typer.Argument(help="an existing run's folder")]


def main() -> NoReturn:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except ValueError as error:
        if _is_input_error(error):
            print(f"odeon: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    except FloatingPointError as error:  # raised by the learner for a loss or gradient that is not finite
        print(f"odeon: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if _is_expected(error):
            print(f"odeon: {error}", file=sys.stderr)
            sys.exit(1)
        raise
    sys.exit(0)


def _is_input_error(error: ValueError) -> bool:
    from runtime.experiment.config import InputError

    return isinstance(error, InputError)


def _is_expected(error: RuntimeError) -> bool:
    """Whether it is about a reward, its server or an image file; its message is then enough, and no traceback is printed."""
    from inputs.images import ImageError
    from rewards.mixture import RewardError

    return isinstance(error, (RewardError, ImageError))


@app.command()
def launch(
    experiment: Annotated[Path, typer.Argument(help="the experiment's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides key=value, as in run.steps=20")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run's folder; default runs/<name>")] = None,
    executor: Annotated[str, typer.Option(help="ray: a process for each role; inline: all roles in this process")] = "ray",
    ray: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="local: start a cluster; auto or an address: join one; RAY_ADDRESS if set")
    ] = "local",
    profile: Annotated[int, typer.Option(help="number of steps to trace into profile.json; needs --executor inline")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the complete experiment, run nothing")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run an experiment, or continue the run in its folder."""
    from runtime.run.launch import launch_experiment

    if code := launch_experiment(experiment, overrides or [], run_dir, executor, ray, dry_run, allow_code, profile):
        raise typer.Exit(code)


@app.command("prompt-policy")
def prompt_policy(
    experiment: Annotated[Path, typer.Argument(help="the YAML file, e.g. experiments/prompt_policy.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides key=value, as in run.steps=20")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="the run's folder; default runs/<name>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the complete experiment, run nothing")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Train a language model to rewrite prompts for a frozen generator, or continue the run in its folder."""
    from runtime.prompt_policy.run import train_prompt_policy

    if code := train_prompt_policy(experiment, overrides or [], run_dir, dry_run, allow_code):
        raise typer.Exit(code)


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="existing runs' folders")],
    metric: Annotated[str | None, typer.Option(help="plot this metric only")] = None,
    x: Annotated[str, typer.Option(help="x axis: step, seconds or nfe (network evaluations)")] = "step",
    out: Annotated[
        Path | None, typer.Option(help="file to write: .html (interactive page), .png, .svg or .pdf (figure)")
    ] = None,
) -> None:
    """Print a table of runs, and write a page or a figure with their curves."""
    from inputs import nearest
    from runtime.experiment.config import InputError
    from runtime.finished.compare import AXES, WRITERS, print_table, read_runs

    if x not in AXES:
        raise InputError(f"--x {x!r}: is not known{nearest(x, AXES)}")
    if out is not None and out.suffix not in WRITERS:
        raise InputError(f"--out {str(out)!r}: is not a known format{nearest(out.suffix, WRITERS)}")
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
    prompt: Annotated[str, typer.Option(help="text prompt")],
    seed: Annotated[int, typer.Option(help="noise seed")] = 0,
    steps: Annotated[int | None, typer.Option(help="solver steps; default: the experiment's")] = None,
    base: Annotated[bool, typer.Option("--base", help="sample the frozen teacher instead of the trained adapter")] = False,
    out: Annotated[Path, typer.Option(help="image file to write")] = Path("sample.png"),
) -> None:
    """Sample one image."""
    from runtime.finished.verbs import sample_one

    sample_one(run_dir, prompt, seed, steps, base, out)
    print(f"wrote {out}")


@app.command()
def evaluate(
    run_dir: RunDir,
    prompts: Annotated[str | None, typer.Option(help="prompt set; default: the experiment's held-out one")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="additional rewards: comma-separated names, or {name: NAME, knob: VALUE}")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="solver steps, or several numbers of them, as in 1,2,4; default: the experiment's")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="solver; default: the experiment's")] = None,
    reference: Annotated[
        str | None, typer.Option(help="prompt set with images: use its captions, and print distances to its images")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Compare the trained adapter with the frozen teacher on the same prompts and noise."""
    from runtime.finished.verbs import evaluate_run

    _table(evaluate_run(run_dir, prompts, rewards or [], _numbers("--steps", steps), solver, allow_code, reference))


@app.command()
def export(
    run_dir: RunDir,
    format: Annotated[str, typer.Option(help="file format: diffusers")] = "diffusers",
    step: Annotated[int | None, typer.Option(help="step of the checkpoint; default: the newest")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write; default RUN_DIR/export/FORMAT")] = None,
) -> None:
    """Export the trained adapter, and verify that a stock diffusers pipeline gives the same output with it."""
    from runtime.finished.verbs import export_run

    print(f"wrote {export_run(run_dir, format, step, out)}")


rewards_app = typer.Typer(
    help="List, score with or serve the rewards that an experiment can name.", invoke_without_command=True
)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback()
def rewards(context: typer.Context) -> None:
    from runtime.finished.catalogue import reward_table

    if context.invoked_subcommand is None:
        _table(reward_table())


@rewards_app.command("score")
def score_images(
    name: Annotated[str, typer.Argument(help="a reward, comma-separated names, or {name: NAME, knob: VALUE}")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    prompt: Annotated[str, typer.Option(help="the images' prompt")],
    allow_code: AllowCode = False,
) -> None:
    """Score image files."""
    from runtime.finished.catalogue import score_files

    _table(score_files(name, images, prompt, allow_code))


@rewards_app.command("serve")
def serve_reward(
    name: Annotated[str, typer.Argument(help="a reward, or {name: NAME, knob: VALUE}")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: all interfaces")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: any free port")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    allow_code: AllowCode = False,
) -> None:
    """Serve a reward over HTTP, for entries with `server: http://HOST:PORT`."""
    from runtime.executors.isolation import serve
    from runtime.finished.catalogue import one_reward

    raise typer.Exit(serve(one_reward(name, allow_code), host, port, device))


rollouts_app = typer.Typer(help="The store of the frozen teacher's trajectories.", no_args_is_help=True)
app.add_typer(rollouts_app, name="rollouts")
Store = Annotated[Path, typer.Argument(help="the store's folder, `teacher.store` of an experiment")]


@rollouts_app.command("generate")
def generate_rollouts(
    experiment: Annotated[Path, typer.Argument(help="the experiment's YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="overrides key=value, as in teacher.noises=4")] = None,
    executor: Annotated[str, typer.Option(help="ray: `rollouts.workers` processes; inline: this process")] = "ray",
    ray: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="as for launch")] = "local",
) -> None:
    """Draw all trajectories that an experiment reads, ahead of its launch; those that are stored already are kept."""
    from runtime.finished.store import generate

    def show(done: int, groups: int, evaluations: int) -> None:
        print(f"\r{done}/{groups} prompts, {evaluations:,} network evaluations", end="", file=sys.stderr)

    summary = generate(experiment, overrides or [], executor, ray, show)
    print(file=sys.stderr)
    print(summary)


@rollouts_app.command("list")
def list_rollouts(store: Store) -> None:
    """Print which teachers' trajectories a store holds, how many and their size."""
    from runtime.finished.store import store_table

    _table(store_table(store))


@rollouts_app.command("show")
def show_rollout(
    store: Store,
    prompt: Annotated[str, typer.Option(help="text prompt of the trajectory")],
    weights: Annotated[str, typer.Option(help="the generator whose autoencoder decodes the states")],
    family: Annotated[str, typer.Option(help="the generator's family")] = "sd3",
    number: Annotated[int, typer.Option(help="which of the prompt's trajectories: 0, 1, ...")] = 0,
    out: Annotated[Path, typer.Option(help="image file to write")] = Path("trajectory.png"),
) -> None:
    """Write the states of one trajectory, decoded, from noise to image."""
    from runtime.finished.store import show_trajectory

    print(f"wrote {show_trajectory(store, weights, family, prompt, number, out)}")


env_app = typer.Typer(help="Python environments for rewards whose libraries conflict with Odeon's.", no_args_is_help=True)
app.add_typer(env_app, name="env")


@env_app.callback()
def env() -> None:
    pass


@env_app.command("build")
def build_env(
    name: Annotated[str, typer.Argument(help="the environment is envs/NAME")],
    requirements: Annotated[Path | None, typer.Option(help="pip requirements file; default envs/NAME.txt")] = None,
) -> None:
    """Create the environment envs/NAME, for rewards with `env: envs/NAME`."""
    from runtime.executors.isolation import build_environment

    print(f"wrote {build_environment(name, requirements)}")


@app.command()
def describe(name: Annotated[str, typer.Argument(help="an algorithm, a reward, a solver or a generator family")]) -> None:
    """Print what an algorithm, reward, solver or generator family is, its source, and its knobs."""
    from runtime.finished.catalogue import description

    print(description(name))


@app.command()
def schema() -> None:
    """Print the JSON schema of an experiment, for editors."""
    from runtime.experiment.config import Experiment

    print(json.dumps(Experiment.model_json_schema(), indent=2))


def _numbers(option: str, text: str | None) -> list[int]:
    """Comma-separated positive integers."""
    from runtime.experiment.config import InputError

    parts = [] if text is None else text.split(",")
    if bad := [part for part in parts if not part.strip().isdecimal() or int(part) < 1]:
        raise InputError(f"{option} {bad[0]!r}: is not a number; allowed: positive integers, separated by commas")
    return [int(part) for part in parts]


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Long cells are wrapped, never truncated; short names in the first column are not broken."""
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
