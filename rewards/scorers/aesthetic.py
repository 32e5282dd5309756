"""LAION's aesthetic predictor, version 2: how pleasing an image is, by a small head on the image features of CLIP ViT-L/14.

    score = L5(L4(L3(L2(L1(e))))),    L_i(x) = W_i x + b_i,    e = the image's features, of length 1

Source: github.com/christophschuhmann/improved-aesthetic-predictor; its file sac+logos+ava1-l14-linearMSE.pth is the head, with
widths 768-1024-128-64-16-1. It was fitted to people's ratings between 1 and 10 by squared error, so scores are roughly on
that scale, but not limited to it. There is no activation between the layers and dropout is active in training only: the head is
one affine function of e, kept in layers because the file has them.

Captions are ignored. Images are preprocessed as in clip_score.

Axes: B images, M of them in one forward pass, D dimensions of the features, 768 for ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffusion.types import Prompt, Scores
from rewards.parts.clip import Dtype, FolderPreprocess, in_dtype, in_micro_batches, load_clip
from rewards.parts.facts import Facts
from rewards.parts.files import check_model, model_folder, read_checkpoint

CLIP = "openai/clip-vit-large-patch14"
LAYERS = (0, 2, 4, 6, 7)
"""Indices of the file's linear layers in `layers`; dropout has the indices between."""
KEYS = [f"layers.{place}.{kind}" for place in LAYERS for kind in ("weight", "bias")]


class Aesthetic:
    """The predicted mean rating of an image, roughly from 1 to 10; higher is more pleasing.

    Without a gradient, a score is bit-equal in every batch, as clip_score's are. The networks move to the images' device.
    """

    facts = Facts(differentiable=True, bounds=(-float("inf"), float("inf")), licence="Apache-2.0 (head), MIT (CLIP)")

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        head: str = Field(description="The predictor's file, sac+logos+ava1-l14-linearMSE.pth, or its tensors as .safetensors.")
        weights: str = Field(CLIP, description="The CLIPModel it was fitted to: a local transformers folder or a hub id.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(head: str, weights: str, micro_batch: int, dtype: Dtype = "float32") -> None:
        read_head(head)
        check_model(weights, "clip")

    def __init__(
        self, head: str, weights: str = CLIP, micro_batch: int = 8, dtype: Dtype = "float32", label: str = "aesthetic"
    ) -> None:
        """head: a local file, always used in float32. weights: a local folder or a hub id.

        Raises ValueError if they are incomplete or do not fit.
        """
        self.head = read_head(head)
        folder = model_folder(weights, "clip")
        clip = load_clip(folder)
        width, needed = clip.visual_projection.out_features, self.head[0].in_features
        if width != needed:
            raise ValueError(f"head {head!r}: needs features of {needed} dimensions; weights {weights!r} give {width}")
        self.about = self.facts.about(label)
        self.micro_batch = micro_batch
        self.preprocess = FolderPreprocess(folder)
        self.dtype = getattr(torch, dtype)
        self.tower, self.projection = (in_dtype(part, self.dtype) for part in (clip.vision_model, clip.visual_projection))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        for network in (self.tower, self.projection, self.head):
            network.to(images.device)
        total = in_micro_batches(lambda part: self.head(self.image_features(part))[:, 0], images, self.micro_batch)
        return Scores(total, {self.about.label: total})

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D] of length 1."""
        pooled = self.tower(pixel_values=self.preprocess(images).to(self.dtype)).pooler_output
        return F.normalize(self.projection(pooled).float(), dim=-1)


def read_head(head: str) -> nn.Sequential:
    """The file's five linear layers, frozen, in float32, [B, D] -> [B, 1]; their widths are the file's.

    Raises ValueError unless its tensors are weights [out, in] and biases [out] of consecutive layers.
    """
    file = Path(head).expanduser()
    if not file.is_file():
        raise ValueError(f"head {head!r}: no such file; the original is sac+logos+ava1-l14-linearMSE.pth")
    tensors = read_checkpoint(file, "head")
    for problem, keys in (("lacks", set(KEYS) - set(tensors)), ("has the unexpected", set(tensors) - set(KEYS))):
        if keys:
            raise ValueError(f"head {head!r}: {problem} {', '.join(sorted(map(str, keys))[:3])}; allowed: {', '.join(KEYS)}")
    layers: list[nn.Linear] = []
    for place in LAYERS:
        weight, bias = (tensors[f"layers.{place}.{kind}"] for kind in ("weight", "bias"))
        for name, tensor, axes in (("weight", weight, 2), ("bias", bias, 1)):
            if not tensor.is_floating_point() or tensor.ndim != axes:
                raise ValueError(f"head {head!r}: layers.{place}.{name} is {_kind(tensor)}, not floating point in {axes} axes")
        wide = layers[-1].out_features if layers else weight.shape[1]
        out = 1 if place == LAYERS[-1] else weight.shape[0]
        if weight.shape != (out, wide) or bias.shape != (out,):
            raise ValueError(
                f"head {head!r}: layers.{place} has weight {list(weight.shape)} and bias {list(bias.shape)}, "
                f"where [{out}, {wide}] and [{out}] are needed"
            )
        layer = nn.Linear(wide, out)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False).eval()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
