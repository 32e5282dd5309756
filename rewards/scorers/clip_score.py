"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718), with any CLIPModel: how well the caption describes the image.

The paper's score is 2.5 max(cos, 0). This one is the cosine itself: the maximum would have no gradient for the images that need
it most, and the factor can be given as the mixture's weight.

Axes: B images, M of them in one forward pass, D common dimensions of image and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.clip import CaptionFeatures, Dtype, FolderPreprocess, in_dtype, in_micro_batches, load_clip
from rewards.parts.facts import Facts
from rewards.parts.files import check_model, model_folder


class CLIPScore:
    """Cosine of image and caption features, in [-1, 1].

    Without a gradient, a score is bit-equal in every batch: the network always gets M images. With a gradient, padding would
    cost too much, and a score depends on the batch by float32 rounding. A caption is truncated to the text tower's context. The
    network moves to the images' device.
    """

    facts = Facts(differentiable=True, bounds=(-1.0, 1.0), licence="the model's")

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field(description="A CLIPModel: embedded:glyphs-clip, a local transformers folder, or a hub id.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(weights: str, micro_batch: int, dtype: Dtype = "float32") -> None:
        check_model(weights, "clip")

    def __init__(self, weights: str, micro_batch: int = 8, dtype: Dtype = "float32", label: str = "clip_score") -> None:
        """weights: a local folder or a hub id. Raises ValueError unless it is a complete CLIPModel with its two processors."""
        folder = model_folder(weights, "clip")
        self.about = self.facts.about(label)
        self.micro_batch = micro_batch
        self.preprocess = FolderPreprocess(folder)
        self.dtype = getattr(torch, dtype)
        self.model = in_dtype(load_clip(folder), self.dtype)
        self.tokenizer = _load_tokenizer(folder, self.model)
        self.captions = CaptionFeatures(self._encode)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        self.model.to(images.device)
        image = in_micro_batches(self.image_features, images, self.micro_batch)
        total = (image * self.captions.of(prompts).to(images.device)).sum(1)
        return Scores(total, {self.about.label: total})

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D] of length 1."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images).to(self.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _encode(self, text: str) -> Tensor:
        """One caption -> [D] of length 1."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(pooled)[0].float(), dim=-1)


def _load_tokenizer(folder: Path, model: Any) -> Any:
    """Raises ValueError for missing files: transformers then makes a tokenizer without a vocabulary."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != model.config.text_config.vocab_size:
        words = model.config.text_config.vocab_size
        raise ValueError(f"{folder}: its tokenizer has {len(tokenizer)} tokens; its text tower needs {words}")
    return tokenizer
