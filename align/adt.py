"""ADT: adversarial diffusion tuning. Run the sampler inside training, and push its images towards real ones.

arXiv 2504.11423. The diffusion loss trains single denoising steps on noised data; sampling applies many steps, each on the
result of the one before, from pure noise. ADT closes this gap: an image x_0 is noised to a random time of the sampler's grid,
the sampler runs from there to an image, and a discriminator on the features of a frozen network compares this image with x_0.

    L = L_diff + w L_adv ,   L_diff = |p(x_t, t) - target|^2  (the native prediction p, t uniform)

The gradient reaches the sampler's steps as in DRTune: the network's input is detached, and K of the steps after the start are
trained, so that the prediction of a trained step enters the image with a coefficient of the sampler
(`diffusion.prediction_coefficients`).

No code is public, and of the paper only the abstract was available. Where each part is from:
* Abstract: a siamese discriminator on an "image-to-image" start; the diffusion loss is kept; gradients are restricted when they
  flow back through the sampler.
* Second-hand (reviews; see docs/algorithms.md): the frozen network is DINOv2, with trained convolutional heads on the patches
  of some of its blocks; the score is a similarity of generated and real image; the start is uniform over the sampler's grid;
  both images are augmented by differentiable changes; gradients stop at the network's inputs, and few steps are trained.
* Ours: all formulas of the losses; the plain hinge loss as the default, since it is the one whose behaviour is known; the
  adaptive weight w; the order of the players (policy first, then the discriminator, on the same images, sampled once); K steps
  drawn at random for each row; `target: teacher`; the reward term; all constants.

The three discriminators (`loss`). D(x) are x's logits, one for each patch and layer, over which losses are averaged; S is the
similarity (`diffusion.discriminator`):

| loss         | discriminator                                              | policy                        |
| ------------ | ---------------------------------------------------------- | ----------------------------- |
| hinge        | max(0, 1 - D(x_0)) + max(0, 1 + D(x))                      | -D(x)                         |
| siamese      | max(0, 1 - S(x_0, x_0')) + max(0, 1 + S(x, x_0'))          | -S(x, x_0')                   |
| relativistic | softplus(D(x) - D(x_0))                                    | softplus(D(x_0) - D(x))       |

x is the generated image; x_0' is x_0 with another augmentation. Real images pass through the autoencoder as generated ones do.

Axes: N rows, S solver steps, V views of an image pair, i.e. draws of an augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from align.image_to_image import ImageRows, draw_trained, sample
from diffusion.augment import Strengths, apply_augmentation, draw_augmentation
from diffusion.discriminator import adaptive_weight, new_comparison, r1_penalty
from diffusion.objective import Items, Objective, Tools, by_time, judged
from diffusion.solvers import Solver, evaluations
from diffusion.types import Cost, Follows, Loss, Plan, Rollout, RunSettings

DISCRIMINATOR = "discriminator"
AVERAGE = "discriminator_ema"
CERTAIN = 2.0
"""The distance of the hinge loss's two margins, 1 and -1: a discriminator whose scores are further apart does not learn."""
VIEWS = 3
"""Augmentations of a pair: of the generated image, of the real one, of the real one once more."""


class ADTConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    features: str = Field(
        description="weights of the discriminator's frozen network, a DINOv2 or a CLIP, e.g. facebook/dinov2-small or "
        "embedded:glyphs-clip"
    )
    target: Literal["images", "teacher"] = Field(
        "images",
        description="what is imitated: the images of prompts.train, or the frozen teacher's samples (adversarial distillation)",
    )
    loss: Literal["hinge", "siamese", "relativistic"] = Field("hinge", description="of the discriminator; see above")
    similarity_scale: float = Field(
        2.0, gt=0, description="gamma of siamese: S lies in [-gamma, gamma]; below 1 the hinge loss cannot reach 0"
    )
    start: Literal["uniform", "noise"] = Field(
        "uniform", description="where the sampler starts: at a step of its grid, uniform for each row; or always at the noise"
    )
    train_steps: int = Field(2, ge=1, description="K, solver steps that are trained, of those after the start; the paper: few")

    diffusion_weight: float = Field(1.0, ge=0, description="of the diffusion loss")
    adversarial_weight: float = Field(1.0, ge=0, description="w, times the adaptive weight; 0: plain fine-tuning")
    adversarial_start: int = Field(10, ge=1, description="first step in which the policy has the adversarial loss")
    adaptive: bool = Field(
        True,
        description="the weight is also multiplied by |gradient of the diffusion loss| / |gradient of the adversarial loss|, "
        "norms over the adapter, in [0.01, 10]",
    )
    adaptive_every: int = Field(10, ge=1, description="steps between two measurements of it, each two backward passes more")
    reward_weight: float = Field(0.0, ge=0, description="of the trained rewards' gradient on the sampler's images")

    discriminator_updates: int = Field(1, ge=1, description="of the discriminator in a step, each with other augmentations")
    discriminator_ema: float | None = Field(
        None, ge=0, lt=1, description="decay of an average of the heads, which the policy then learns from; null: the heads"
    )
    augmentation: float = Field(
        1.0, ge=0, le=1, description="factor of DiffAugment's strengths (colour, translation, cutout); 0: no augmentation"
    )
    r1_weight: float = Field(0.0, ge=0, description="of the R1 penalty on the features of real images")

    @property
    def needs_reward_gradient(self) -> bool:
        return self.reward_weight > 0

    @property
    def samples(self) -> bool:
        """Whether the sampler runs in the learner."""
        return self.adversarial_weight > 0 or self.reward_weight > 0

    @model_validator(mode="after")
    def _something_is_learned(self) -> ADTConfig:
        if self.diffusion_weight == 0 and not self.samples:
            raise ValueError("diffusion_weight, adversarial_weight and reward_weight are all 0; allowed: at least one above 0")
        if self.diffusion_weight == self.reward_weight == 0 and self.adversarial_start > 1:
            raise ValueError(
                f"adversarial_start is {self.adversarial_start}, before which nothing is learned, since diffusion_weight and "
                "reward_weight are 0; allowed: 1"
            )
        if self.diffusion_weight == 0 and self.adaptive and self.adversarial_weight:
            raise ValueError("adaptive compares with the diffusion loss, whose diffusion_weight is 0; allowed: adaptive: false")
        return self

    def cost(self, solver: Solver, grid: Tensor) -> Cost:
        """With gradient at most K solver steps and the diffusion loss; without, at most one solve."""
        if not self.samples:
            return Cost(1, 0)
        return Cost(self.train_steps * solver.evaluations + bool(self.diffusion_weight), evaluations(solver, grid))

    def check(self, settings: RunSettings) -> None:
        """Raises ValueError for more trained steps than the solver has, and settings that the target or reward excludes."""
        if self.train_steps > settings.steps:
            raise ValueError(f"train_steps is {self.train_steps}, allowed are 1 to {settings.steps}, the solver's steps")
        if self.target == "teacher" and settings.teacher_steps is None:
            raise ValueError(
                "target 'teacher' needs a section `teacher`, e.g. teacher: {solver: euler, steps: 50, guidance: 4.5}"
            )
        if self.reward_weight and settings.standardized_rewards:
            raise ValueError(
                "rewards.multi_objective_aggregation = 'normalize_then_sum': needs groups of several images, and ADT has none; "
                "allowed: sum_then_normalize"
            )


class ADT(Objective):
    """Players: `policy`, whose turn samples an image for each row, and `discriminator`, which compares them with the real ones.

    Metrics: `adt/diffusion`, `adt/adversarial`, `adt/weight` (all factors of the adversarial loss); `discriminator/accuracy`,
    the share of pairs whose real image has the higher score (chance is 0.5); `discriminator/saturated`, the share of pairs
    whose scores are further apart than the margins of the hinge loss, which the watch for reward hacking reads; means over five
    bins of the start's time, `start/accuracy/LOW-HIGH` and `start/adversarial/LOW-HIGH`; and those of the reward.
    """

    Config = ADTConfig

    def __init__(self, config: ADTConfig) -> None:
        self.config = config
        self.comparison = new_comparison(config.loss, config.similarity_scale)
        self.features = config.features if config.adversarial_weight else None
        self.strengths = Strengths().scaled(config.augmentation)
        self.weight = torch.tensor([math.nan, math.nan], dtype=torch.float64)
        """the adaptive weight, and the step in which it was measured"""
        self.state: Mapping[str, Tensor] = MappingProxyType({"adaptive_weight": self.weight})

    def build_networks(self, channels: Sequence[int]) -> None:
        heads = self.comparison.new_heads(channels)
        self.networks: Mapping[str, nn.Module] = {DISCRIMINATOR: heads}
        if self.config.discriminator_ema is not None:
            average = self.comparison.new_heads(channels)
            average.load_state_dict(heads.state_dict())
            self.networks = {DISCRIMINATOR: heads, AVERAGE: average.requires_grad_(False)}
            self.averages = {AVERAGE: Follows(DISCRIMINATOR, self.config.discriminator_ema)}

    def plan(self, step: int, steps: int) -> Plan:
        return Plan(source=self.config.target, scored=False)

    def items(self, rollout: Rollout, credit: Tensor | None, tools: Tools) -> ImageRows:
        clean, rng, steps = rollout.trajectory.x[:, -1], tools.rng, tools.steps
        number = len(clean)

        def normal(*more: int) -> Tensor:
            return torch.randn((number, *more, *clean.shape[1:]), generator=rng).to(clean)

        start = torch.randint(steps, (number,), generator=rng)
        if self.config.start == "noise":
            start = torch.zeros_like(start)
        turns = 1 + self.config.discriminator_updates
        with torch.no_grad():
            real = tools.codec.decode(clean) if self.config.adversarial_weight else clean.new_empty(number, 0)
        return ImageRows(
            clean=clean,
            noise=normal(),
            fresh=normal(steps - 1 if tools.solver.renoises else 0),
            start=start,
            trained=draw_trained(start, steps, self.config.train_steps, rng),
            t=1 - torch.rand(number, generator=rng, dtype=torch.float64),
            diffused=normal(),
            views=draw_augmentation(number * turns * VIEWS, rng).view(number, turns, VIEWS, -1),
            real=real,
            generated=torch.zeros_like(real),
            condition=rollout.condition[rollout.group],
            prompts=rollout.sample_prompts,
        )

    def turns(self, step: int, items: Items) -> Iterable[tuple[str, Items]]:
        assert isinstance(items, ImageRows)
        yield "policy", items
        if self.config.adversarial_weight:
            for update in range(self.config.discriminator_updates):
                yield DISCRIMINATOR, replace(items, turn=1 + update)

    def loss(self, player: str, items: Items, tools: Tools) -> Loss:
        assert isinstance(items, ImageRows)
        return self._discriminator_loss(items, tools) if player == DISCRIMINATOR else self._policy_loss(player, items, tools)

    def _policy_loss(self, player: str, rows: ImageRows, tools: Tools) -> Loss:
        config, metrics = self.config, {}
        known: dict[str, Tensor] = {}
        value, diffusion = rows.clean.new_zeros((), dtype=torch.float32), None
        if config.diffusion_weight:
            value = diffusion = config.diffusion_weight * diffusion_loss(rows, player, tools)
            metrics["adt/diffusion"] = diffusion.detach()
        if not config.samples:
            return Loss(value, metrics)
        adversarial_now = config.adversarial_weight > 0 and tools.step >= config.adversarial_start
        generated = sample(rows, player, tools, with_gradient=adversarial_now or config.reward_weight > 0)
        if config.adversarial_weight:
            images = tools.codec.decode(generated if adversarial_now else generated.detach())
            rows.generated.copy_(images.detach())
        if adversarial_now:
            losses = self._adversarial_losses(images, rows, tools)
            adversarial = losses.mean()
            weight = config.adversarial_weight * self._adaptive_weight(diffusion, adversarial, player, tools)
            value = value + weight * adversarial
            binned, known = by_time({"adversarial": losses.detach()}, tools.grid[rows.start], "start")
            metrics |= {"adt/adversarial": adversarial.detach(), "adt/weight": torch.tensor(weight), **binned}
        if config.reward_weight:
            rewarded = judged(generated, rows.prompts, tools)
            value = value + config.reward_weight * rewarded.value
            metrics, known = {**metrics, **rewarded.metrics}, {**known, **rewarded.known}
        return Loss(value, metrics, known)

    def _adversarial_losses(self, images: Tensor, rows: ImageRows, tools: Tools) -> Tensor:
        """[N], of the policy. images: [N, 3, H, W], generated."""
        heads = self.networks[AVERAGE if self.config.discriminator_ema is not None else DISCRIMINATOR]
        fake, real, reference = self._features(images, rows, 0, tools), None, None
        if self.comparison.relative or self.comparison.paired:
            features, reference = self._real_features(rows, tools)
            real = self.comparison.score(heads, features, reference).detach()
        return self.comparison.policy_loss(real, self.comparison.score(heads, fake, reference))

    def _adaptive_weight(self, diffusion: Tensor | None, adversarial: Tensor, player: str, tools: Tools) -> float:
        """Measured on the first micro-batch of every `adaptive_every`-th step, and kept in between."""
        if not self.config.adaptive:
            return 1.0
        assert diffusion is not None
        _, measured = self.weight.tolist()
        if math.isnan(measured) or tools.step >= measured + self.config.adaptive_every:
            self.weight[0] = adaptive_weight(diffusion, adversarial, tools.parameters(player))
            self.weight[1] = tools.step
        return self.weight[0].item()

    def _discriminator_loss(self, rows: ImageRows, tools: Tools) -> Loss:
        heads, config = self.networks[DISCRIMINATOR], self.config
        inputs, reference = self._real_features(rows, tools)
        if config.r1_weight:
            inputs = [layer.requires_grad_() for layer in inputs]
        real = self.comparison.score(heads, inputs, reference)
        fake = self.comparison.score(heads, self._features(rows.generated, rows, 0, tools), reference)
        value = self.comparison.discriminator_loss(real, fake)
        apart = real.detach().mean(1) - fake.detach().mean(1)
        right, certain = (apart > 0).float(), (apart > CERTAIN).float()
        metrics, known = by_time({"accuracy": right}, tools.grid[rows.start], "start")
        metrics |= {"discriminator/accuracy": right.mean(), "discriminator/saturated": certain.mean()}
        if config.r1_weight:
            penalty = r1_penalty(real, inputs)
            value, metrics["discriminator/r1"] = value + config.r1_weight * penalty, penalty.detach()
        return Loss(value, metrics, known)

    def _real_features(self, rows: ImageRows, tools: Tools) -> tuple[list[Tensor], list[Tensor] | None]:
        """Features of the real images; and of another view of them, where the score is a comparison."""
        reference = self._features(rows.real, rows, 2, tools) if self.comparison.paired else None
        return self._features(rows.real, rows, 1, tools), reference

    def _features(self, images: Tensor, rows: ImageRows, view: int, tools: Tools) -> list[Tensor]:
        assert tools.features is not None
        return tools.features(apply_augmentation(images, rows.views[:, rows.turn, view], self.strengths))


def diffusion_loss(rows: ImageRows, player: str, tools: Tools) -> Tensor:
    """L_diff, the mean over rows and elements; without guidance, as diffusion models are trained."""
    x = tools.path.mix(rows.clean, rows.diffused, rows.t)
    prediction = tools.unguided(x, rows.t, rows.condition, player)
    return F.mse_loss(prediction.float(), tools.path.target(rows.clean, rows.diffused, rows.t).float())
