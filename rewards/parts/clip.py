"""What scorers with a network of CLIP's kind share: preprocessing on tensors, micro-batches, dtypes, cached caption features.

Axes: B images, M of them in one forward pass, D dimensions of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffusion.types import Prompt

Dtype = Annotated[
    Literal["float32", "bfloat16"],
    Field(description="Of the frozen network; bfloat16 halves its memory. Images, features and scores stay float32."),
]
"""The knob of every scorer with a network, whose weights `in_dtype` converts. Images are preprocessed in float32 and
rounded as the network's input; its output is converted to float32 before it is normalised, and so is the images' gradient."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of red, green and blue."""
CACHED_CAPTIONS = 65536
"""How many captions' features are kept in main memory: 256 MB at D = 1024."""


class FolderPreprocess:
    """What the CLIPImageProcessor of a transformers folder does to an image, on tensors: resize, centre crop, normalise.

    Differentiable. transformers' own goes through 8-bit images and clips what bicubic resizing overshoots; where no resizing is
    needed, the two agree.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder whose processor does anything else."""
        from transformers import CLIPImageProcessorPil

        file = folder / "preprocessor_config.json"
        if not file.is_file():
            raise ValueError(f"{file}: no such file; it defines how images are preprocessed")
        config = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        steps = {
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,  # bicubic
        }
        for key, needed in steps.items():
            if getattr(config, key) != needed:
                raise ValueError(f"{file}: {key} {getattr(config, key)!r}; allowed: {needed!r}")
        if not config.size.shortest_edge:
            raise ValueError(f"{file}: size {dict(config.size)}; allowed: a shortest_edge")
        self.shortest_edge: int = config.size.shortest_edge
        self.crop: tuple[int, int] = (config.crop_size.height, config.crop_size.width)
        if max(self.crop) > self.shortest_edge:
            raise ValueError(f"{file}: crop_size {self.crop} exceeds size {self.shortest_edge}")
        self.mean, self.std = config.image_mean, config.image_std

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, *crop], roughly standard normal; bicubic overshoot is not clipped."""
        return normalized(center_crop(resize_shortest_edge(images, self.shortest_edge), self.crop), self.mean, self.std)


def resize_shortest_edge(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """images [B, 3, H, W] -> the shorter side `size` long, the other in proportion, rounded down. Bicubic."""
    height, width = images.shape[2:]
    short = min(height, width)
    if short == size:
        return images
    target = (int(size * height / short), int(size * width / short))
    return F.interpolate(images, target, mode="bicubic", antialias=antialias, align_corners=False)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The centre of images [B, 3, H, W], as transformers crops: half a pixel towards the top left where there is no centre."""
    height, width = size
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def center_square(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """torchvision's Resize(size, bicubic) and CenterCrop(size) on float tensors: images [B, 3, H, W] -> [B, 3, size, size]."""
    images = resize_shortest_edge(images, size, antialias)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def normalized(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """images [B, 3, H, W] minus the channels' mean, over their standard deviation."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def in_micro_batches(network: Callable[[Tensor], Tensor], images: Tensor, micro_batch: int) -> Tensor:
    """The network's outputs for images [B, 3, H, W], [B, ...], at most M of them in one call.

    Without a gradient every call has exactly M images, so that a score does not depend on the batch: a short batch is padded
    with its last image.
    """
    parts = []
    for part in images.split(micro_batch):
        if torch.is_grad_enabled() and images.requires_grad:
            parts.append(network(part))
        else:
            rows = torch.arange(micro_batch).clamp(max=len(part) - 1)
            parts.append(network(part[rows])[: len(part)])
    return torch.cat(parts)


def in_dtype(network: Any, dtype: torch.dtype) -> Any:
    """The network with its weights in this dtype, except scalars: CLIP's factor exp(logit_scale) would lose 1 %."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and tensor.ndim > 0:
            tensor.data = tensor.data.to(dtype)
    return network


class CaptionFeatures:
    """Features of captions, encoded one at a time without gradient and kept in main memory."""

    def __init__(self, encode: Callable[[str], Tensor]) -> None:
        """encode: one caption -> [D] of length 1."""
        self.encode = encode
        self._known: dict[str, Tensor] = {}

    def __call__(self, caption: str) -> Tensor:
        """[D] on the CPU."""
        if caption not in self._known:
            if len(self._known) == CACHED_CAPTIONS:
                self._known.clear()
            with torch.no_grad():
                self._known[caption] = self.encode(caption).cpu()
        return self._known[caption]

    def of(self, prompts: Sequence[Prompt]) -> Tensor:
        """[B, D] on the CPU."""
        return torch.stack([self(prompt.text) for prompt in prompts])


def load_clip(folder: Path) -> Any:
    """The frozen CLIPModel of a folder in float32. Any, because transformers' classes get their attributes at run time.

    Raises ValueError for incomplete files: transformers initialises missing weights at random.
    """
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise ValueError(f"{folder}: {len(missing)} of CLIPModel's weights are missing, for example {sorted(missing)[0]}")
    return model.requires_grad_(False).eval()
