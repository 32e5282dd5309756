"""The parts of the roles, built from an experiment alone, so that every process can build its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion import (
    SOLVERS,
    Condition,
    Follows,
    Generator,
    Objective,
    Predict,
    Source,
    Teacher,
    adapter_names,
    guided,
)
from generators import embedded, load, resolve, weights_hash
from generators.lora_file import load_lora
from rewards import Isolated, build
from rewards.mixture import Mixture
from rewards.parts.compat import ensure_torchvision
from rollouts.images import Images, open_images
from rollouts.prompts import read_prompts
from rollouts.records import RecordStore
from rollouts.store import Stored
from rollouts.worker import Worker
from runtime.executors.isolation import Child
from runtime.experiment.config import Experiment, SamplingSection, Task

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

# Before anything imports diffusers or transformers: a torchvision built for another torch breaks their imports.
ensure_torchvision()

EMA = "ema"
"""The adapter that holds the exponential moving average of the policy, if `optimizer.ema` is set."""
TOKENS_OF_A_BATCH = 4096
"""`micro_batch: auto`: as many rows as make this many image tokens, one image of 1024 pixels, but at most 64."""


def roles_of_adapters(experiment: Experiment, objective: Objective) -> dict[str, Any]:
    """{adapter: Trained or Follows}: the objective's, and the policy's EMA if the experiment has one."""
    found: dict[str, Any] = {name: objective.adapters[name] for name in adapter_names(objective)}
    if experiment.optimizer.ema is not None:
        assert EMA not in found, f"{EMA!r} is the runtime's own adapter"
        found[EMA] = Follows("policy", experiment.optimizer.ema)
    return found


def evaluated_adapter(experiment: Experiment) -> str:
    """The adapter that is evaluated, sampled from and exported."""
    return "policy" if experiment.optimizer.ema is None else EMA


def new_generator(task: Task) -> PipelineGenerator:
    """The frozen generator, without adapters."""
    section = task.generator
    set_threads(task)
    return load(
        section.weights,
        family=section.family,
        dtype=section.dtype,
        device=device(task),
        gradient_checkpointing=task.run.gradient_checkpointing,
    )


def new_generator_with_adapters(experiment: Experiment, objective: Objective) -> PipelineGenerator:
    """The frozen generator with every adapter of the objective and the EMA, all with the same initial values."""
    generator, lora, seed = new_generator(experiment), experiment.lora, experiment.seed
    for name, role in roles_of_adapters(experiment, objective).items():
        trainable = not isinstance(role, Follows)
        if lora.start_from is not None:
            load_lora(generator.adapters, name, Path(lora.start_from), trainable=trainable)
        else:
            generator.adapters.add(name, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed, trainable=trainable)
    return generator


def set_threads(task: Task) -> None:
    """The same number in every process: it changes the order of float sums, and so the rounding of every result."""
    torch.set_num_threads(threads(task))


def threads(task: Task) -> int:
    return (os.cpu_count() or 1) if task.run.threads == "auto" else task.run.threads


def device(task: Task) -> str:
    if task.run.device != "auto":
        return task.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def micro_batch(task: Task, generator: Generator) -> int:
    """The largest number of rows of one network call."""
    if task.run.micro_batch != "auto":
        return task.run.micro_batch
    return max(1, min(64, TOKENS_OF_A_BATCH // generator.tokens(task.generator.height, task.generator.width)))


def new_teacher(experiment: Experiment, generator: Generator, predict: Predict) -> Teacher:
    """The frozen teacher with its own sampling, for objectives. predict: the network, which may count."""
    section, negative = experiment.teacher_sampling, generator.encode([""])

    def evaluate(x: Tensor, t: Tensor, condition: Condition, scale: Tensor) -> Tensor:
        one: float | Tensor = scale if (scale != 1).any() else 1.0
        return guided(predict, condition, adapter=None, scale=one, negative=negative.repeat(len(condition)))(x, t)

    return Teacher(evaluate, SOLVERS[section.solver], time_grid(experiment, generator, section), section.guidance_range)


def new_teacher_source(experiment: Experiment, generator: Generator) -> Source:
    """Where the teacher's rollouts come from: the experiment's trajectory store, and a worker for those it lacks."""
    section = experiment.teacher_sampling
    worker = new_worker(experiment, generator, section, guidance=section.guidance_range)
    if section.store is None:
        return worker
    store = RecordStore(Path(section.store), int(section.store_limit * 10**9))
    return Stored(worker, store, identity_of_teacher(experiment, worker))


def new_image_source(experiment: Experiment, generator: Generator) -> Source:
    """Where real images come from: those of prompts.train."""
    source, prompts = experiment.generator, experiment.prompts
    images = open_images(prompts.train, read_prompts(prompts.train))
    store = None
    if prompts.image_store is not None:
        store = RecordStore(Path(prompts.image_store), int(prompts.image_store_limit * 10**9))
    identity = {"weights": weights_hash(resolve(source.weights, source.family)), "family": source.family}
    return Images(generator, images, generator.image_size(source.height, source.width), store, identity)


def identity_of_teacher(experiment: Experiment, worker: Worker) -> dict[str, Any]:
    """Everything that determines a stored trajectory, except its prompt and seed."""
    source, section = experiment.generator, experiment.teacher_sampling
    return {
        "weights": weights_hash(resolve(source.weights, source.family)),
        "family": source.family,
        "dtype": source.dtype,
        "solver": section.solver,
        "grid": worker.grid.tolist(),
        "guidance": list(section.guidance_range),
        "negative": "",
        "shape": list(worker.shape),
    }


def with_guidance(predict: Predict, scale: float, negative: Condition, detach_negative: bool = False) -> Predict:
    """The network with guidance, as a network: objectives train it, since guidance is part of the sampler; see `guided`."""
    if scale == 1:
        return predict

    def predict_guided(x: Tensor, t: Tensor, condition: Condition, adapter: str | None) -> Tensor:
        rows = negative.repeat(len(condition))
        return guided(predict, condition, adapter=adapter, scale=scale, negative=rows, detach_negative=detach_negative)(x, t)

    return predict_guided


def time_grid(task: Task, generator: Generator, sampling: SamplingSection) -> Tensor:
    """[S+1] float64, from noise to 0."""
    section = task.generator
    return generator.time_grid(sampling.steps, section.height, section.width, sampling.shift, sampling.spacing == "even")


def new_worker(
    task: Task,
    generator: Generator,
    sampling: SamplingSection,
    guidance: float | tuple[float, float] | None = None,
    **options: Any,
) -> Worker:
    """A rollout worker with the section's settings: the task's own section, or another one to sample differently.

    guidance: default: the generator section's.
    """
    section = task.generator
    return Worker(
        generator,
        solver=SOLVERS[sampling.solver],
        grid=time_grid(task, generator, sampling),
        shape=generator.latent_shape(section.height, section.width),
        guidance=section.guidance if guidance is None else guidance,
        most=micro_batch(task, generator),
        **options,
    )


def resolve_embedded(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reward entries with the folder for each `embedded:NAME`, because rewards/ may not import generators/."""

    def folder(value: Any) -> Any:
        return str(embedded(value)) if isinstance(value, str) and value.startswith("embedded:") else value

    return [{name: folder(value) for name, value in entry.items()} for entry in entries]


def in_children(task: Task) -> Isolated:
    """Runs each scorer with an environment of its own in a child process of this one."""
    return lambda entry: Child(entry, task.run.device, threads(task))


def trained_reward(task: Task, isolated: Isolated | None = None) -> Mixture:
    """The mixture that is trained. isolated: runs scorers with an environment of their own; in child processes unless given."""
    return build(resolve_embedded(task.rewards.train), "rewards.train", isolated or in_children(task))
