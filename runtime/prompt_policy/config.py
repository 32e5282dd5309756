"""The schema of a prompt policy's experiment, and its checks before a network is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import Field, field_validator, model_validator

from diffusion import SOLVERS, Prompt, evaluations, guidance_evaluations
from generators import embedded
from generators.outline import Outline
from inputs import hub_revision, is_on_hub
from runtime.experiment.checks import check_task
from runtime.experiment.config import InputError, Section, Task
from runtime.roles.build import device


class LanguageModelSection(Section):
    weights: str = Field(description="embedded:NAME, a local transformers folder, or a hub id; all of it is trained")
    template: str = Field("{prompt}", description="the model's input; {prompt} is replaced by the prompt")
    chat: bool = Field(False, description="whether the input is a user message in the tokenizer's own chat template")
    max_new_tokens: int = Field(64, ge=1, description="of one rewriting")
    temperature: float = Field(1.0, gt=0, description="of rewritings in training; evaluations are greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of its weights")

    @field_validator("template")
    @classmethod
    def _has_placeholder(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} once, where the prompt goes")
        return value


class GRPOSection(Section):
    """Keys, ranges and defaults are those of TRL's GRPOConfig, except prompts_per_step; each batch is used for one update."""

    prompts_per_step: int = Field(8, ge=1)
    num_generations: int = Field(8, ge=2, description="rewritings of a prompt, which are scored against each other")
    per_device_train_batch_size: int | None = Field(None, ge=1, description="rewritings of one backward pass; all unless given")
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from the initial model")
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    bf16: bool = Field(False, description="mixed precision; needs a GPU")

    @model_validator(mode="after")
    def _whole_batches(self) -> GRPOSection:
        rows = self.prompts_per_step * self.num_generations
        if rows % self.rows_of_a_pass:
            raise ValueError(
                f"grpo.per_device_train_batch_size = {self.per_device_train_batch_size}: must divide the "
                f"{self.prompts_per_step} x {self.num_generations} = {rows} rewritings of a step"
            )
        return self

    @property
    def rows_of_a_pass(self) -> int:
        return self.per_device_train_batch_size or self.prompts_per_step * self.num_generations


class PromptPolicy(Task):
    """What `odeon prompt-policy` runs."""

    language_model: LanguageModelSection
    grpo: GRPOSection = GRPOSection()

    @model_validator(mode="after")
    def _fits_together(self) -> PromptPolicy:
        if self.rewards.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"rewards.multi_objective_aggregation = {self.rewards.multi_objective_aggregation!r}: is not available for a "
                "prompt policy; allowed: sum_then_normalize"
            )
        if self.watch.stop_on_hacking:
            raise ValueError("watch.stop_on_hacking = True: is not available for a prompt policy; allowed: False")
        return self


def check_prompt_policy(experiment: PromptPolicy) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The prompts to train on, the held-out ones, and the generator's outline. Raises InputError for what is wrong."""
    found = check_task(experiment, on_this_machine=True)
    on_gpu = device(experiment) != "cpu"
    if on_gpu and (torch.cuda.device_count() > 1 or experiment.run.device == "cuda:1"):
        raise InputError(
            f"run.device = {experiment.run.device!r}: the trainer uses the only visible GPU, and {torch.cuda.device_count()} "
            "are visible; select one with CUDA_VISIBLE_DEVICES"
        )
    if experiment.grpo.bf16 and not on_gpu:
        raise InputError("grpo.bf16 = True: needs a GPU; allowed here: False")
    weights = experiment.language_model.weights
    try:
        local = embedded(weights) if weights.startswith("embedded:") else Path(weights).expanduser()
        if local.exists():
            check_model_folder(local, weights, experiment.language_model.chat)
        elif is_on_hub(weights):
            hub_revision(weights)
        else:
            raise ValueError(
                f"weights {weights!r}: no such folder; "
                "allowed are embedded:NAME, a local transformers folder, or a hub id owner/name"
            )
    except ValueError as error:
        raise InputError(f"language_model: {error}") from None
    return found


def check_model_folder(folder: Path, weights: str, chat: bool) -> None:
    """Raises ValueError unless the folder holds a causal language model in safetensors, and a tokenizer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: not a transformers model folder (no config.json)")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in KNOWN:
        raise ValueError(f"weights {weights!r}: its config.json has model_type {kind!r}, which is not a causal language model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors file, the only supported format")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"weights {weights!r}: no tokenizer_config.json")
    in_config = "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    if chat and not in_config and not (folder / "chat_template.jinja").is_file():
        raise ValueError(f"weights {weights!r}: its tokenizer has no chat template; allowed: chat: false")


def plan_text(experiment: PromptPolicy, generator: Outline) -> str:
    """The complete experiment, and estimates of a step's network evaluations and the run's memory."""
    grpo, rollouts = experiment.grpo, experiment.rollouts
    rows = grpo.prompts_per_step * grpo.num_generations
    solve = evaluations(SOLVERS[rollouts.solver], torch.linspace(1, 0, rollouts.steps + 1))
    solve *= guidance_evaluations(experiment.generator.guidance)
    base = generator.parameters * {"float32": 4, "bfloat16": 2}[experiment.generator.dtype] / 2**20
    return "\n".join(
        [
            yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            f"# a step: {rows} rewritings, at most as many images and {rows * solve:,} network evaluations of the generator",
            f"# memory: transformer {base:,.0f} MiB, text encoders and VAE, libraries about 700 MiB; of the language model its",
            f"#   weights, gradient and optimiser{', and the initial weights' if grpo.beta else ''}, and the activations of "
            f"{grpo.rows_of_a_pass} rewritings",
        ]
    )
