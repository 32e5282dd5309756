"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): which image people pick for a caption, predicted by a CLIP ViT-H/14 that
was fine-tuned on their choices.

    s(image, caption) = exp(logit_scale) * cos(image features, caption features)

The network, the preprocessing of images and the encoding of captions are clip_score's; only the weights and the factor differ.
The source is the example in github.com/yuvalkirstain/PickScore: of two images for one caption, people pick the first with
probability sigmoid(s_1 - s_2), so a difference of 1 means 73 to 27. Scores of different captions are hardly comparable.

The published network's factor is about 100 and its scores of ordinary images lie around 20. Many training codes divide by 26
to bring them below 1; that number comes from these codes, not from the authors, and can be given as the mixture's weight here.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.clip import Dtype
from rewards.parts.facts import Facts
from rewards.scorers.clip_score import CLIPScore


class PickScore:
    """exp(logit_scale) times the cosine of image and caption features, in [-100, 100], usually around 20.

    The factor is in the weights; 100 is the largest that CLIP is trained with. Batches, devices and long captions are handled
    as in clip_score.
    """

    facts = Facts(differentiable=True, bounds=(-100.0, 100.0), licence="MIT (code), none stated (weights)")

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field("yuvalkirstain/PickScore_v1", description="A CLIPModel: a local transformers folder or a hub id.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(weights: str, micro_batch: int, dtype: Dtype = "float32") -> None:
        CLIPScore.check(weights, micro_batch)

    def __init__(
        self,
        weights: str = "yuvalkirstain/PickScore_v1",
        micro_batch: int = 8,
        dtype: Dtype = "float32",
        label: str = "pickscore",
    ) -> None:
        """weights: a local folder or a hub id. Raises ValueError unless it is a complete CLIPModel with its two processors."""
        self.about = self.facts.about(label)
        self.cosine = CLIPScore(weights, micro_batch, dtype)
        self.factor: float = self.cosine.model.logit_scale.exp().item()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        total = self.factor * self.cosine(images, prompts).total
        return Scores(total, {self.about.label: total})

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D] of length 1."""
        return self.cosine.image_features(images)
