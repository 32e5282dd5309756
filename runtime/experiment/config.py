"""An experiment: a YAML file, validated whole before anything heavy starts.

`read_experiment` follows `extends`, applies `key=value` overrides and turns every mistake into one line that names the key,
the value and what is allowed. What an algorithm or a reward can be told is its own `Config`; here stands the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from align import ALGORITHMS
from diffusion import SOLVERS
from generators.load import DTYPES, FAMILIES
from rewards import is_code, resolve


class InputError(ValueError):
    """The user's input is wrong; the message is one line for them. The command line exits with 2."""


def one_of(value: str, allowed: Collection[str]) -> str:
    """The value, if it is one of the allowed. Raises ValueError with the nearest one, for validators."""
    if value not in allowed:
        raise ValueError(f"is not known{nearest(value, allowed)}")
    return value


def nearest(word: str, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (allowed: {', '.join(sorted(allowed))})"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


S = TypeVar("S", bound=Section)


class GeneratorSection(Section):
    family: str = Field("sd3", description=f"model family: {', '.join(FAMILIES)}")
    weights: str = Field(description="embedded:NAME, a local diffusers folder, or a hub id")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance scale of rollouts, training and evaluation; 1 is none"
    )
    dtype: str = Field("float32", description=f"of the frozen base: {', '.join(DTYPES)}")
    height: int | None = Field(None, gt=0, description="pixels; the model's own size unless given")
    width: int | None = Field(None, gt=0, description="pixels; the model's own size unless given")

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
    train: str = Field(description="embedded:NAME/SET, .txt, .jsonl, .parquet, or hf:OWNER/NAME")
    heldout: str = Field(description="likewise; never trained on")
    heldout_number: int = Field(
        64, ge=2, description="how many held-out prompts an evaluation draws, from the start of the set"
    )


class RewardsSection(Section):
    """Entries are {name, label, weight, the scorer's own knobs ...}; see rewards/names.py."""

    train: tuple[dict[str, Any], ...] = Field(description="the mixture that is trained, a weighted mean")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize",
        description="what is trained: the weighted mean, or that of rewards each standardised inside its group; TRL's words",
    )
    heldout: tuple[dict[str, Any], ...] = Field((), description="rewards only looked at, at every evaluation")

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _entries(cls, value: Any, info: ValidationInfo) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list of {name: REWARD, ...}")
        for entry in value:
            if isinstance(entry, dict) and is_code(entry.get("name")) and not (info.context or {}).get("allow_code"):
                raise ValueError(f"{entry['name']!r} is code named in an experiment; it runs only with --allow-code")
        return tuple(resolve(value, f"rewards.{info.field_name}")) if value or info.field_name == "train" else ()

    @model_validator(mode="after")
    def _one_label_one_reward(self) -> RewardsSection:
        trained = {entry["label"]: {**entry, "weight": None} for entry in self.train}
        for entry in self.heldout:
            if trained.get(entry["label"], {**entry, "weight": None}) != {**entry, "weight": None}:
                raise ValueError(
                    f"heldout has another reward under the trained label {entry['label']!r}: give it a `label` of its own"
                )
        return self


class RolloutsSection(Section):
    workers: int = Field(1, ge=1, description="rollout actors; results do not depend on it")
    solver: str = Field("dpmpp_2m", description=f"of rollouts: {', '.join(SOLVERS)}")
    steps: int = Field(8, ge=1, description="solver steps")
    shift: float | None = Field(None, gt=0, description="of the time grid; the pipeline's own scheduler decides unless given")
    spacing: Literal["scheduler", "even"] = Field(
        "scheduler",
        description="of the time grid before the shift: the scheduler's own, or 1, (S-1)/S .. 1/S as FLUX's pipeline",
    )
    groups_per_step: int = Field(16, ge=1, description="prompts in one training step")
    deadline: float = Field(
        3600, gt=0, description="seconds for a worker's share of a step; then it counts as hung and is replaced"
    )
    staleness: int = Field(0, ge=0, le=0, description="policy versions a rollout may be behind; only 0, on-policy, so far")

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str) -> str:
        return one_of(value, SOLVERS)


class OptimizerSection(Section):
    """AdamW."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up; to 0 at run.steps")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    accumulation: int = Field(1, ge=1, description="updates whose mean gradient makes one step of the optimiser")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the adapter, which is what is evaluated"
    )


class WatchSection(Section):
    """When an evaluation looks like reward hacking; see runtime/evaluation/watch.py."""

    reward_drop: float = Field(
        0.2, gt=0, description="fall of a held-out, untrained reward below the teacher's, in standard deviations of its scores"
    )
    diversity_drop: float = Field(0.3, gt=0, lt=1, description="share of the teacher's diversity that is gone")
    stop_on_hacking: bool = Field(
        False, description="end the run there; checkpoints are then made at evaluations that look good, and only there"
    )


class RunSection(Section):
    steps: int = Field(100, ge=1)
    evaluate_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    keep: int = Field(3, ge=1, description="newest checkpoints to keep, beside the best held-out one")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N")
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="of every role; it changes float sums")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="rows of one backward pass")
    gradient_checkpointing: bool = False


def _algorithm_model(name: str, config: type[BaseModel]) -> type[BaseModel]:
    """The knobs of one algorithm beside the key that chooses it, so that errors and schema are the chosen one's."""
    return create_model(name, __base__=config, algorithm=(Literal[name], name))  # type: ignore[arg-type]


ALGORITHM_MODELS = {name: _algorithm_model(name, algorithm.Config) for name, algorithm in ALGORITHMS.items()}
_models = list(ALGORITHM_MODELS.values())
# pydantic has no union of one
ObjectiveConfig: Any = _models[0] if len(_models) == 1 else Annotated[reduce(or_, _models), Field(discriminator="algorithm")]


class Experiment(Section):
    """What `odeon launch` runs."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the run folder's name under runs/")
    seed: int = Field(0, ge=0)
    generator: GeneratorSection
    lora: LoraSection = LoraSection()
    prompts: PromptsSection
    rewards: RewardsSection
    rollouts: RolloutsSection = RolloutsSection()
    objective: ObjectiveConfig
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection = RunSection()
    watch: WatchSection = WatchSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        self.objective.check(self.rollouts.steps)
        standardised = self.rewards.multi_objective_aggregation == "normalize_then_sum"
        if standardised and getattr(self.objective, "spread_weights", False):
            raise ValueError(
                "objective.spread_weights = True: has nothing to weigh by after normalize_then_sum; allowed: False"
            )
        return self


def read_experiment(path: Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> Experiment:
    """The experiment in a YAML file with `key=value` overrides, as in `run.steps=6` or `rewards.train.0.weight=2`.

    allow_code: whether it may name functions to call. Raises InputError for anything wrong with it.
    """
    return read_as(Experiment, path, overrides, allow_code=allow_code)


def read_as(section: type[S], path: Path, overrides: Sequence[str] = (), *, allow_code: bool = False) -> S:
    """As `read_experiment`, for a YAML file of another kind."""
    raw = _read_yaml(path)
    for override in overrides:
        _override(raw, override)
    return validated(raw, section, allow_code=allow_code)


def validated(raw: Any, section: type[S], *, allow_code: bool = False) -> S:
    try:
        return section.model_validate(raw, context={"allow_code": allow_code})
    except ValidationError as error:
        raise InputError(_one_line(error.errors()[0], section)) from None


def write_experiment(experiment: Section, path: Path) -> None:
    """Every key with its value, so that the file says what ran even when defaults change."""
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: an experiment is a mapping of keys to values, got {type(raw).__name__}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    base = (path.parent / base).resolve()
    if base in seen:
        raise InputError(f"{path}: extends goes round in a circle through {base.name}")
    return _merge(_read_yaml(base, (*seen, base)), raw)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge deeply, everything else replaces; another algorithm brings its own knobs only."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        if (
            isinstance(value, dict)
            and isinstance(below, dict)
            and value.get("algorithm", below.get("algorithm")) == below.get("algorithm")
        ):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"override {override!r}: expected key=value, as in run.steps=6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not YAML") from None
    *path, last = key.split(".")
    here: Any = raw
    for part in path:
        here = here.setdefault(part, {}) if isinstance(here, dict) else _element(here, part, override)
    if isinstance(here, list):
        _element(here, last, override)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise InputError(f"override {override!r}: {'.'.join(path)} is a value, not a mapping")


def _element(here: Any, part: str, override: str) -> Any:
    if not isinstance(here, list) or not part.isdigit() or int(part) >= len(here):
        raise InputError(f"override {override!r}: there is no {part!r} there")
    return here[int(part)]


_UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")
"""How pydantic calls the alternatives of a key that takes values of several types."""


def _one_line(error: ErrorDetails, section: type[Section]) -> str:
    location = [
        part
        for i, part in enumerate(error["loc"])
        if not (i == 1 and error["loc"][0] == "objective" and part in ALGORITHMS) and not _UNION_MEMBER.fullmatch(str(part))
    ]
    key, message, value = ".".join(map(str, location)), error["msg"].removeprefix("Value error, "), error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(error["loc"][:-1], section)
            return f"{key}: unknown key{nearest(str(location[-1]), known)}"
        case "missing":
            return f"{key}: missing"
        case "union_tag_invalid" | "union_tag_not_found" | "literal_error" if location in (
            ["objective"],
            ["objective", "algorithm"],
        ):
            algorithm = value.get("algorithm") if isinstance(value, dict) else value
            return f"objective.algorithm = {algorithm!r}: is not known{nearest(str(algorithm), ALGORITHMS)}"
        case "model_type":
            return f"{key} = {value!r}: must be a mapping of keys to values"
        case _ if not key or message.startswith(key):
            return message
        case _:
            shown = f" = {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""
            return f"{key}{shown}: {message}"


def _keys_at(location: Sequence[int | str], section: type[Section]) -> list[str]:
    """The keys that are known at this location inside the section."""
    if not location:
        return list(section.model_fields)
    if location[0] == "objective":
        return sorted(ALGORITHM_MODELS[str(location[1])].model_fields)
    return list(section.model_fields[str(location[0])].annotation.model_fields)  # type: ignore[union-attr]
