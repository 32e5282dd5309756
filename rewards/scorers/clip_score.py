"""How well does the caption describe the picture? CLIPScore (Hessel et al. 2021, arXiv 2104.08718) with any CLIPModel.

The paper's score is 2.5 max(cos, 0). This one is the cosine itself: the maximum would take the gradient from the pictures that
need it most, and the factor is the mixture's business.

Pictures are prepared in torch, so that the gradient reaches them, by the numbers in the folder's preprocessor_config.json.
transformers' own way goes through 8-bit pictures and clips what bicubic resizing overshoots; where no resizing is needed,
the two agree.

Axes: B images, M of them in one forward pass, D common dimensions of image and text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts.weights import check_model, model_folder

Dtype = Annotated[
    Literal["float32", "bfloat16"],
    Field(description="Of the frozen network; bfloat16 halves its memory. Pictures, features and scores stay float32."),
]
"""The knob of every scorer with a network, whose weights `in_dtype` converts. Pictures are prepared in float32 and rounded on
their way in; what comes out is float32 again before it is normalised, and so is the pictures' gradient."""
CACHED_PROMPTS = 65536
"""How many captions' features are kept in main memory: 256 MB at D = 1024."""


class CLIPScore:
    """Cosine of image and caption features, in [-1, 1].

    Scores are independent of the batch to the last bit where no gradient is asked for: the network then always sees M images.
    With a gradient, filling up would cost too much, and neighbours count by float32 rounding. A caption is cut off where the
    text tower ends. The network moves to the images' device.
    """

    differentiable = True
    bounds = (-1.0, 1.0)

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field(description="A CLIPModel: embedded:glyphs-clip, a local transformers folder, or a hub id.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(weights: str, micro_batch: int, dtype: Dtype = "float32") -> None:
        check_model(weights, "clip")

    def __init__(self, weights: str, micro_batch: int = 8, dtype: Dtype = "float32", label: str = "clip_score") -> None:
        """weights: a local folder or a hub id. Raises ValueError if it is no complete CLIPModel with its two processors."""
        folder = model_folder(weights, "clip")
        self.label = label
        self.micro_batch = micro_batch
        self.preprocess = Preprocess(folder)
        self.dtype = getattr(torch, dtype)
        self.model = in_dtype(load_network(folder), self.dtype)
        self.tokenizer = _load_tokenizer(folder, self.model)
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        self.model.to(images.device)
        image = in_micro_batches(self.image_features, images, self.micro_batch)
        text = torch.stack([self.text_features(prompt.text) for prompt in prompts]).to(images.device)
        total = (image * text).sum(1)
        return Scores(total, {self.label: total})

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D] of length 1."""
        pooled = self.model.vision_model(pixel_values=self.preprocess(images).to(self.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def text_features(self, text: str) -> Tensor:
        """One caption by itself, [D] of length 1 on the CPU."""
        if text not in self._texts:
            if len(self._texts) == CACHED_PROMPTS:
                self._texts.clear()
            self._texts[text] = self._encode(text).cpu()
        return self._texts[text]

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        pooled = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(pooled)[0].float(), dim=-1)


class Preprocess:
    """What the folder's CLIPImageProcessor does to a picture, on tensors: resize, centre crop, normalise."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder whose processor does anything else."""
        from transformers import CLIPImageProcessorPil

        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(f"{folder}: no preprocessor_config.json there, which says how its pictures are prepared")
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
                raise ValueError(f"{folder}/preprocessor_config.json: {key} {getattr(config, key)!r}; allowed: {needed!r}")
        if not config.size.shortest_edge:
            raise ValueError(f"{folder}/preprocessor_config.json: size {dict(config.size)}; allowed: a shortest_edge")
        self.shortest_edge: int = config.size.shortest_edge
        self.crop: tuple[int, int] = (config.crop_size.height, config.crop_size.width)
        if max(self.crop) > self.shortest_edge:
            raise ValueError(f"{folder}/preprocessor_config.json: crop_size {self.crop} exceeds size {self.shortest_edge}")
        self.mean = torch.tensor(config.image_mean)[:, None, None]
        self.std = torch.tensor(config.image_std)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, *crop], about normal; bicubic overshoot is not clipped."""
        images = center_crop(resize_shortest_edge(images, self.shortest_edge), self.crop)
        return (images - self.mean.to(images.device)) / self.std.to(images.device)


def resize_shortest_edge(images: Tensor, size: int) -> Tensor:
    """images [B, 3, H, W] -> the shorter side `size` long, the other in proportion, rounded down. Bicubic, antialiased."""
    height, width = images.shape[2:]
    short = min(height, width)
    if short == size:
        return images
    target = (int(size * height / short), int(size * width / short))
    return F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images [B, 3, H, W]; half a pixel towards the top left where there is no middle."""
    height, width = size
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def in_micro_batches(network: Callable[[Tensor], Tensor], images: Tensor, micro_batch: int) -> Tensor:
    """What the network makes of images [B, 3, H, W], [B, ...], at most M of them at once.

    Where no gradient is asked for, it sees M of them always: the last image of a batch that is too short fills it up.
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
    """The network with its weights in this dtype. Single numbers stay: CLIP's factor exp(logit_scale) would lose 1 %."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and tensor.ndim > 0:
            tensor.data = tensor.data.to(dtype)
    return network


def load_network(folder: Path) -> Any:
    """The frozen CLIPModel in float32. Any, because transformers' classes get their attributes at run time.

    Raises ValueError for incomplete files: transformers makes up random weights for what is not there.
    """
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise ValueError(f"{folder}: its weights lack {len(missing)} of CLIPModel's, for example {sorted(missing)[0]}")
    return model.requires_grad_(False).eval()


def _load_tokenizer(folder: Path, model: Any) -> Any:
    """Checked as well: where its files are not there, transformers makes up one that knows no word."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != model.config.text_config.vocab_size:
        words = model.config.text_config.vocab_size
        raise ValueError(f"{folder}: its tokenizer files know {len(tokenizer)} tokens, its text tower {words}")
    return tokenizer
