"""The schema of an experiment. Algorithms and rewards define their knobs in a `Config` of their own; the rest is here.

yaml.py reads it from a file, checks.py compares it with the files, models and machine that it names.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator, model_validator

from diffusion import SOLVERS, Objective, RunSettings
from generators.families import FAMILIES
from generators.features import feature_channels
from generators.load import DTYPES
from inputs import one_of
from rewards import is_code, resolve
from runtime.experiment.algorithms import ALGORITHMS


class InputError(ValueError):
    """Invalid user input; the message is one line for the user. The command line exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class GeneratorSection(Section):
    family: str = Field("sd3", description=f"model family: {', '.join(FAMILIES)}")
    weights: str = Field(description="embedded:NAME, a local diffusers folder, or a hub id")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance scale of rollouts, training and evaluation; 1 is none"
    )
    dtype: str = Field("float32", description=f"of the frozen network: {', '.join(DTYPES)}")
    height: int | None = Field(None, gt=0, description="pixels; default: the model's own size")
    width: int | None = Field(None, gt=0, description="pixels; default: the model's own size")

    @field_validator("family")
    @classmethod
    def _known_family(cls, value: str) -> str:
        return one_of(value, FAMILIES)

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        return one_of(value, DTYPES)


class LoraSection(Section):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="short names (attn, ff, all-linear), layer names or patterns"
    )
    start_from: str | None = Field(None, description="a LoRA file or folder to start from; its rank, alpha and layers are used")


class PromptsSection(Section):
    train: str = Field(
        description="embedded:NAME/SET, .txt, .jsonl, .parquet, hf:OWNER/NAME, a folder of images with captions, or .tar"
    )
    heldout: str = Field(description="in the same form; never trained on")
    heldout_number: int = Field(64, ge=2, description="number of held-out prompts in an evaluation, from the start of the set")
    image_store: str | None = Field(
        "trajectories",
        description="folder in which latents of the training images are kept, for methods that need images; null: encode again",
    )
    image_store_limit: float = Field(50.0, gt=0, description="size in GB at which that store takes no more latents")


class RewardsSection(Section):
    """Entries are {name, label, weight, the scorer's own knobs ...}; see rewards/names.py."""

    train: tuple[dict[str, Any], ...] = Field(description="the mixture that is trained, a weighted mean")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize",
        description="what is trained: the weighted mean of rewards, or of rewards standardised in each group; TRL's names",
    )
    heldout: tuple[dict[str, Any], ...] = Field(
        (), description="rewards that are logged at every evaluation and never trained on"
    )

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _entries(cls, value: Any, info: ValidationInfo) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list of {name: REWARD, ...}")
        for entry in value:
            if isinstance(entry, dict) and is_code(entry.get("name")) and not (info.context or {}).get("allow_code"):
                raise ValueError(f"{entry['name']!r}: is a Python function; it runs only with --allow-code")
        return tuple(resolve(value, f"rewards.{info.field_name}")) if value or info.field_name == "train" else ()

    @model_validator(mode="after")
    def _one_label_one_reward(self) -> RewardsSection:
        trained = {entry["label"]: {**entry, "weight": None} for entry in self.train}
        for entry in self.heldout:
            if trained.get(entry["label"], {**entry, "weight": None}) != {**entry, "weight": None}:
                raise ValueError(
                    f"heldout has another reward under the trained label {entry['label']!r}: give it another `label`"
                )
        return self


class SamplingSection(Section):
    """How images are sampled."""

    solver: str = Field("dpmpp_2m", description=f"of the sampling ODE: {', '.join(SOLVERS)}")
    steps: int = Field(8, ge=1, description="solver steps")
    shift: float | None = Field(None, gt=0, description="of the time grid; default: the pipeline's scheduler")
    spacing: Literal["scheduler", "even"] = Field(
        "scheduler",
        description="of the time grid before the shift: the scheduler's own, or 1, (S-1)/S .. 1/S as in FLUX's pipeline",
    )

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str) -> str:
        return one_of(value, SOLVERS)


class TeacherSection(SamplingSection):
    """How the frozen teacher samples: trajectories that are distilled, and the baseline of evaluations."""

    solver: str = Field("euler", description=f"of the sampling ODE: {', '.join(SOLVERS)}")
    steps: int = Field(20, ge=1, description="solver steps")
    guidance: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        1.0, description="classifier-free guidance scale, 1 is none; or [low, high], from which each trajectory draws its own"
    )
    noises: int = Field(1, ge=1, description="trajectories of each training prompt, one for each pass; then they repeat")
    seed: int = Field(0, ge=0, description="of the trajectories' noise; runs with the same one share stored trajectories")
    store: str | None = Field("trajectories", description="folder of the trajectory store; null: draw again every time")
    store_limit: float = Field(50.0, gt=0, description="size in GB at which the store takes no more trajectories")

    @field_validator("guidance")
    @classmethod
    def _a_range(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"is {list(value)}, allowed are a number, or two that do not decrease")
        return value

    @property
    def guidance_range(self) -> tuple[float, float]:
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)


class RolloutsSection(SamplingSection):
    workers: int = Field(1, ge=1, description="rollout workers; results do not depend on their number")
    groups_per_step: int = Field(16, ge=1, description="prompts in one training step")
    deadline: float = Field(
        3600, gt=0, description="seconds for a worker's share of a step; a worker that takes longer is killed and restarted"
    )
    staleness: int = Field(
        0, ge=0, le=0, description="policy versions by which rollouts may lag; only 0, on-policy, is implemented"
    )


class AdamWSection(Section):
    """AdamW, its schedule and its gradient."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear and cosine decay to 0 at run.steps"
    )
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    accumulation: int = Field(1, ge=1, description="updates whose mean gradient is used for one optimiser step")


class OptimizerSection(AdamWSection):
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an exponential moving average (EMA) of the adapter, which is then evaluated"
    )
    players: dict[str, AdamWSection] = Field(
        {},
        description="{name: settings} of an algorithm's other players, such as a discriminator",
    )

    def of_player(self, name: str) -> AdamWSection:
        """The settings of a player other than the first."""
        return self.players.get(name, AdamWSection())


class WatchSection(Section):
    """When reward hacking is suspected in an evaluation; see runtime/evaluation/watch.py."""

    reward_drop: float = Field(
        0.2, gt=0, description="fall of a held-out, untrained reward below the teacher's, in standard deviations of its scores"
    )
    diversity_drop: float = Field(0.3, gt=0, lt=1, description="share of the teacher's diversity that is lost")
    discriminator_saturated: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of pairs of a real and a generated image of which an adversarial method's discriminator is certain",
    )
    stop_on_hacking: bool = Field(
        False, description="end the run at a suspicion; checkpoints are then written only at evaluations without one"
    )


class RunSection(Section):
    steps: int = Field(100, ge=1)
    evaluate_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep: int = Field(3, ge=1, description="newest checkpoints to keep, in addition to the best held-out one")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="of every role; it changes rounding")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="rows of one backward pass")
    gradient_checkpointing: bool = False


class Task(Section):
    """What every kind of run has: a frozen generator that samples images for prompts, and rewards that score them."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the run folder's name under runs/")
    seed: int = Field(0, ge=0)
    generator: GeneratorSection
    prompts: PromptsSection
    rewards: RewardsSection
    rollouts: SamplingSection = SamplingSection()
    run: RunSection = RunSection()
    watch: WatchSection = WatchSection()

    @property
    def all_rewards(self) -> list[dict[str, Any]]:
        """The entries of trained and held-out rewards."""
        return [*self.rewards.train, *self.rewards.heldout]

    @property
    def trained_labels(self) -> set[str]:
        return {entry["label"] for entry in self.rewards.train}


def _algorithm_model(name: str, config: type[BaseModel]) -> type[BaseModel]:
    """The knobs of one algorithm with the key that chooses it, so that errors and schema are the chosen algorithm's."""
    return create_model(name, __base__=config, algorithm=(Literal[name], name))  # type: ignore[arg-type]


ALGORITHM_MODELS = {name: _algorithm_model(name, algorithm.Config) for name, algorithm in ALGORITHMS.items()}
AnyObjective: Any = Annotated[reduce(or_, ALGORITHM_MODELS.values()), Field(discriminator="algorithm")]


class Experiment(Task):
    """What `odeon launch` runs."""

    lora: LoraSection = LoraSection()
    rollouts: RolloutsSection = RolloutsSection()
    teacher: TeacherSection | None = Field(
        None, description="how the frozen teacher samples; default: as `rollouts` and `generator.guidance` state"
    )
    objective: AnyObjective
    optimizer: OptimizerSection = OptimizerSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        standardized = self.rewards.multi_objective_aggregation == "normalize_then_sum"
        settings = RunSettings(
            steps=self.rollouts.steps,
            standardized_rewards=standardized,
            staleness=self.rollouts.staleness,
            renoises=SOLVERS[self.rollouts.solver].renoises,
            teacher_steps=None if self.teacher is None else self.teacher.steps,
        )
        self.objective.check(settings)
        return self

    @property
    def teacher_sampling(self) -> TeacherSection:
        """The section `teacher`, or what stands for it: the policy's own sampling, nothing stored."""
        if self.teacher is not None:
            return self.teacher
        own = self.rollouts.model_dump(include=set(SamplingSection.model_fields))
        return TeacherSection(**own, guidance=self.generator.guidance, store=None)


def new_objective(experiment: Experiment) -> Objective:
    """The experiment's objective; its networks' initial values depend on the experiment's seed alone, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        objective: Objective = ALGORITHMS[experiment.objective.algorithm](experiment.objective)
        if objective.features is not None:
            objective.build_networks(feature_channels(objective.features))
        return objective
