"""Commands on an existing run: sample, evaluate, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from diffusion import SOLVERS, Group, Plan, Prompt, sample_seed
from inputs import nearest
from inputs.images import ImageError, read_image
from rollouts.images import fitted, open_images
from rollouts.prompts import read_prompts
from runtime.evaluation.distribution import cmmd, frechet_distance, recall
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.heldout import heldout_groups
from runtime.evaluation.statistics import heldout_metrics
from runtime.executors.isolation import check_rewards
from runtime.experiment.config import Experiment, InputError, RolloutsSection, new_objective
from runtime.experiment.yaml import read_experiment, validated
from runtime.finished.catalogue import named_rewards
from runtime.roles.build import evaluated_adapter, new_generator_with_adapters, new_worker, resolve_embedded
from runtime.roles.learner import read_tensors
from runtime.roles.scoring import pixels
from runtime.run.folder import RunFolder

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

LCM_SCHEDULER = "FlowMatchLCMScheduler"
"""The scheduler of diffusers that samples as the solver `consistency` does, on a flow path."""
FORMATS = ("diffusers",)


def read_run(run_dir: Path, *, allow_code: bool = True) -> tuple[Experiment, RunFolder]:
    """Raises InputError for a folder without a run. allow_code: to be restricted only by commands that call the rewards."""
    if not (run_dir / "experiment.yaml").is_file():
        raise InputError(f"{run_dir}: not a run's folder (no experiment.yaml)")
    if "language_model" in yaml.safe_load((run_dir / "experiment.yaml").read_text()):
        raise InputError(
            f"{run_dir}: is the run of a prompt policy, which has no adapter; its language model is in {run_dir / 'export'}"
        )
    return read_experiment(run_dir / "experiment.yaml", allow_code=allow_code), RunFolder(run_dir)


def changed_rollouts(experiment: Experiment, **changes: Any) -> RolloutsSection:
    """The rollouts section with those changes that are not None; they need not fit the objective, which is not used here."""
    given = {key: value for key, value in changes.items() if value is not None}
    return validated({**experiment.rollouts.model_dump(), **given}, RolloutsSection)


def trained_generator(experiment: Experiment, folder: RunFolder, step: int | None = None) -> tuple[PipelineGenerator, int]:
    """The generator with the adapters of a checkpoint, by default the newest, and that checkpoint's step."""
    checkpoints = folder.checkpoints()
    if not checkpoints:
        raise InputError(f"{folder.path}: has no checkpoint")
    if step is None:
        step = max(checkpoints)
    if step not in checkpoints:
        raise InputError(f"--step {step}: {folder.path} has checkpoints of steps {', '.join(map(str, checkpoints))}")
    generator = new_generator_with_adapters(experiment, new_objective(experiment))
    for name in generator.adapters.names:
        read_tensors(generator.adapters.named_parameters(name), checkpoints[step], name)
    return generator, step


def sample_one(run_dir: Path, prompt: str, seed: int, steps: int | None, base: bool, out: Path) -> None:
    experiment, folder = read_run(run_dir)
    rollouts = changed_rollouts(experiment, steps=steps)
    generator, _ = trained_generator(experiment, folder)
    group = Group(Prompt("sample", prompt), seed, [sample_seed(seed, 0, prompt, 0)])
    plan = Plan(source="teacher") if base else Plan(adapter=evaluated_adapter(experiment))
    images = new_worker(experiment, generator, rollouts).take([group], plan).images
    assert images is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(images)[0].numpy()).save(out)


def evaluate_run(
    run_dir: Path,
    prompts: str | None,
    rewards: Sequence[str],
    steps: Sequence[int],
    solver: str | None,
    allow_code: bool = False,
    reference: str | None = None,
) -> list[dict[str, str]]:
    """One row for each reward: the teacher's mean and the trained adapter's on the same noise. rewards: see `more_rewards`.

    reference: a prompt set with images. Its captions are then the prompts, and each column has the distances of its images to
    these, in the features between which diversity is measured.

    steps: numbers of solver steps, each with a column of its own; empty: the experiment's. The teacher samples as the
    experiment's section `teacher` states, and without one as the adapter does, at the first number of steps.
    """
    if prompts and reference:
        raise InputError(f"--reference {reference}: its captions are the prompts; leave out --prompts {prompts}")
    experiment, folder = read_run(run_dir, allow_code=allow_code)
    numbers = list(steps) or [experiment.rollouts.steps]
    prompts = reference or prompts
    samplings = {number: changed_rollouts(experiment, steps=number, solver=solver) for number in numbers}
    experiment = more_rewards(experiment, rewards, allow_code)
    try:
        check_rewards(resolve_embedded(experiment.all_rewards))
        texts = read_prompts(prompts or experiment.prompts.heldout)
    except ValueError as error:
        raise InputError(str(error)) from None
    if len(texts) < 2:
        raise InputError(f"{prompts or experiment.prompts.heldout}: has one prompt; at least 2 are needed")
    generator, _ = trained_generator(experiment, folder)
    number = len(texts) if prompts else experiment.prompts.heldout_number
    groups = heldout_groups(texts[:number], experiment.seed)
    real = None if reference is None else real_images(experiment, generator, reference, texts[:number])
    columns: dict[str, dict[str, str]] = {}
    base = None
    for count, sampling in samplings.items():
        evaluator = Evaluator(experiment, generator, sampling, teacher=experiment.teacher)
        if base is None:
            base = evaluator.evaluate(groups, None)
        result = evaluator.evaluate(groups, evaluated_adapter(experiment))
        line = heldout_metrics(result, base)
        columns.setdefault("teacher", {label: f"{line[f'heldout/base/{label}']:.4f}" for label in result.scores})
        columns["teacher"]["diversity"] = f"{base.diversity:.4f}"
        distances: dict[str, str] = {}
        if real is not None:
            features = evaluator.features(real)
            columns["teacher"] |= to_real_images(base, features)
            distances = to_real_images(result, features)
        columns["trained" if len(samplings) == 1 else f"trained, {count} step{'s' * (count > 1)}"] = {
            **{label: f"{line[f'heldout/{label}']:.4f}" for label in result.scores},
            "win rate of total": f"{line['heldout/win_rate']:.3f}",
            "standard error of the gain": f"{line['heldout/total_se']:.4f}",
            "diversity": f"{result.diversity:.4f}",
            **distances,
        }
    labels = list(list(columns.values())[-1])
    return [{"reward": label, **{name: column.get(label, "") for name, column in columns.items()}} for label in labels]


def real_images(experiment: Experiment, generator: PipelineGenerator, source: str, prompts: Sequence[Prompt]) -> Tensor:
    """[B, 3, H, W]: a source's images of these prompts, in the generator's size and through its autoencoder, as samples are."""
    section = experiment.generator
    try:
        images = open_images(source, prompts)
        size = generator.image_size(section.height, section.width)
        parts = [fitted(read_image(data, name), size)[None] for name, data in map(images, prompts)]
    except (ValueError, ImageError) as error:
        raise InputError(f"--reference {source}: {error}") from None
    with torch.no_grad():
        return torch.cat([generator.decode(generator.encode_images(part.to(generator.device))) for part in parts])


def to_real_images(result: Evaluated, real: Tensor) -> dict[str, str]:
    """Distances of an evaluation's images to real ones, features [A, D], and the shares of each set that the other covers."""
    assert result.features is not None
    generated, real = result.features, real.float().cpu()
    return {
        "Frechet distance": f"{frechet_distance(generated, real):.4f}",
        "CMMD": f"{cmmd(generated, real):.4f}",
        "precision": f"{recall(generated, real):.3f}",
        "recall": f"{recall(real, generated):.3f}",
    }


def more_rewards(experiment: Experiment, texts: Sequence[str], allow_code: bool) -> Experiment:
    """The experiment with additional held-out rewards, as `named_rewards` reads them; existing labels stay unchanged."""
    raw = experiment.model_dump(mode="json")
    known = [{"name": entry["label"]} for entry in experiment.all_rewards]
    raw["rewards"]["heldout"] += [entry for text in texts for entry in named_rewards(text) if entry not in known]
    return validated(raw, Experiment, allow_code=allow_code)


def few_step_settings(experiment: Experiment) -> dict[str, str]:
    """For the exported file of a few-step student: how a stock diffusers pipeline samples from it; otherwise nothing."""
    rollouts = experiment.rollouts
    if not SOLVERS[rollouts.solver].renoises:
        return {}
    return {
        "scheduler": LCM_SCHEDULER,
        "num_inference_steps": str(rollouts.steps),
        "sigmas": ", ".join(f"{1 - i / rollouts.steps:g}" for i in range(rollouts.steps)),
        "guidance_scale": f"{experiment.generator.guidance:g}",
    }


def export_run(run_dir: Path, format: str, step: int | None, out: Path | None) -> Path:
    if format not in FORMATS:
        raise InputError(f"--format {format!r}: is not known{nearest(format, FORMATS)}")
    experiment, folder = read_run(run_dir)
    from generators.export import export_diffusers

    generator, step = trained_generator(experiment, folder, step)
    metadata = {
        "base_model": experiment.generator.weights,
        "algorithm": experiment.objective.algorithm,
        "step": str(step),
        "rewards": ", ".join(f"{entry['weight']:g} {entry['label']}" for entry in experiment.rewards.train),
        **few_step_settings(experiment),
    }
    try:
        return export_diffusers(generator, evaluated_adapter(experiment), out or run_dir / "export" / format, metadata)
    except ValueError as error:
        raise InputError(f"{run_dir}: {error}") from None
