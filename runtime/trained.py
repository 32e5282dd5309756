"""What people do with a run that is there: draw, evaluate, export. And what can be named in an experiment."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from align import ALGORITHMS
from diffusion import SOLVERS, Prompt, sample_seed
from rewards import REWARDS, knobs, scorer
from rollouts.prompts import read_prompts
from rollouts.worker import Group, seed_groups
from runtime.config import Experiment, InputError, nearest, one_of, read_experiment, validated
from runtime.learner import AVERAGE, load_adapters
from runtime.loop import HELDOUT_ITERATION, Baseline, heldout_metrics
from runtime.roles import IMAGES_PER_PROMPT, Sampler, new_generator
from runtime.run_folder import RunFolder

FORMATS = ("diffusers",)


def read_run(run_dir: Path, changes: Mapping[str, Any] | None = None) -> tuple[Experiment, RunFolder]:
    """A run's experiment, with changed rollouts if any. Raises InputError for a folder that holds none."""
    if not (run_dir / "experiment.yaml").is_file():
        raise InputError(f"{run_dir}: no run there (no experiment.yaml)")
    overrides = [f"{key}={value}" for key, value in (changes or {}).items() if value is not None]
    return read_experiment(run_dir / "experiment.yaml", overrides), RunFolder(run_dir)


def trained_generator(experiment: Experiment, folder: RunFolder, step: int | None = None) -> tuple[Any, int]:
    """The generator with the adapters of a checkpoint, the newest unless a step is given; and that checkpoint's step."""
    checkpoints = folder.checkpoints()
    if not checkpoints:
        raise InputError(f"{folder.path}: no checkpoint there")
    if step is None:
        step = max(checkpoints)
    if step not in checkpoints:
        raise InputError(f"--step {step}: {folder.path} has checkpoints of steps {', '.join(map(str, checkpoints))}")
    generator = new_generator(experiment)
    load_adapters(generator.adapters, checkpoints[step])
    return generator, step


def trained_adapter(experiment: Experiment) -> str:
    return "policy" if experiment.optimizer.ema is None else AVERAGE


def draw_one(run_dir: Path, prompt: str, seed: int, steps: int | None, base: bool, out: Path) -> None:
    experiment, folder = read_run(run_dir, {"rollouts.steps": steps})
    generator, _ = trained_generator(experiment, folder)
    group = Group(Prompt("sample", prompt), seed, [sample_seed(seed, 0, prompt, 0)])
    adapter = None if base else trained_adapter(experiment)
    worker = Sampler(experiment, generator).evaluation
    image = worker.draw([group], adapter=adapter, version=None if base else 0).images[0]
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(out)


def evaluate_run(
    run_dir: Path, prompts: str | None, rewards: Sequence[str], steps: int | None, solver: str | None
) -> list[dict[str, str]]:
    """One row a reward: the teacher's mean, the trained adapter's, on the same noise."""
    experiment, folder = read_run(run_dir, {"rollouts.steps": steps, "rollouts.solver": solver})
    if rewards:
        raw = experiment.model_dump(mode="json")
        raw["rewards"]["heldout"] = [*raw["rewards"]["heldout"], *({"name": name} for name in rewards)]
        experiment = validated(raw)
    try:
        texts = read_prompts(prompts or experiment.prompts.heldout)
    except ValueError as error:
        raise InputError(str(error)) from None
    generator, _ = trained_generator(experiment, folder)
    sampler = Sampler(experiment, generator)
    number = len(texts) if prompts else experiment.prompts.heldout_number
    groups = seed_groups(texts[:number], IMAGES_PER_PROMPT, experiment.seed, HELDOUT_ITERATION)
    base, result = sampler.evaluate(groups, None), sampler.evaluate(groups, trained_adapter(experiment))
    line = heldout_metrics(result, Baseline(base.scores, base.images))
    rows = [
        {"reward": label, "teacher": f"{line[f'heldout/base/{label}']:.4f}", "trained": f"{line[f'heldout/{label}']:.4f}"}
        for label in result.scores
    ]
    rows.append({"reward": "win rate of total", "teacher": "", "trained": f"{line['heldout/win_rate']:.3f}"})
    rows.append({"reward": "standard error of the gain", "teacher": "", "trained": f"{line['heldout/total_se']:.4f}"})
    rows.append({"reward": "diversity", "teacher": f"{base.diversity:.4f}", "trained": f"{result.diversity:.4f}"})
    return rows


def export_run(run_dir: Path, format: str, step: int | None, out: Path | None) -> Path:
    from generators.export import export_diffusers

    if format not in FORMATS:
        raise InputError(f"--format {format!r}: is not known{nearest(format, FORMATS)}")
    experiment, folder = read_run(run_dir)
    generator, step = trained_generator(experiment, folder, step)
    metadata = {
        "base_model": experiment.generator.weights,
        "algorithm": experiment.objective.algorithm,
        "step": str(step),
        "rewards": ", ".join(f"{entry['weight']:g} {entry['label']}" for entry in experiment.rewards.train),
    }
    try:
        return export_diffusers(generator, trained_adapter(experiment), out or run_dir / "export" / format, metadata)
    except ValueError as error:
        raise InputError(f"{run_dir}: {error}") from None


def reward_table() -> list[dict[str, str]]:
    rows = []
    for name in REWARDS:
        kind = scorer(name)
        low, high = getattr(kind, "bounds", (0.0, 1.0))
        text = (inspect.getdoc(kind) or "").split("\n")[0]
        gradient = "yes" if kind.differentiable else "no"
        rows.append({"reward": name, "differentiable": gradient, "range": f"[{low:g}, {high:g}]", "what": text})
    return rows


def description(name: str) -> str:
    """The docstring, and the knobs with their defaults."""
    known = [*ALGORITHMS, *REWARDS, *SOLVERS]
    kind: Any
    config: type[BaseModel]
    if name in ALGORITHMS:
        kind, config = ALGORITHMS[name], ALGORITHMS[name].Config
        text = inspect.getdoc(inspect.getmodule(kind))
    elif name in REWARDS:
        kind, config = scorer(name), knobs(name)
        text = inspect.getdoc(inspect.getmodule(kind))
    elif name in SOLVERS:
        return inspect.getdoc(SOLVERS[name].step) or ""
    else:
        try:
            one_of(name, known)
        except ValueError as error:
            raise InputError(f"{name!r} {error}") from None
    lines = [
        f"  {key} = {field.get_default()!r}\n      {field.description or ''}" for key, field in config.model_fields.items()
    ]
    return "\n".join([text or "", "", "Knobs:" if lines else "No knobs.", *lines])
