"""ImageReward (Xu et al. 2023, arXiv 2304.05977): how much people like an image for a caption, through its package
image-reward 1.5. BLIP's text encoder attends to the image, and a linear head maps its output to one number.

The score is the package's: (head - 0.167) / 1.033, without limits, roughly standard normal on the images it was tuned on.

Deviations from the package:

* Images are tensors and carry a gradient. The package preprocesses PIL images, whose resizing rounds to 8 bits after each of
  its two passes; here values stay floats and are clipped to [0, 1], as bytes would be. A pixel then differs by about 1/255 on
  smooth images, and by up to 10/255 on noise. At 224 pixels on the shorter side nothing is resized, and the scores are equal.
* The checkpoint must hold exactly the network's weights: the package loads what fits and keeps random weights for the rest.
* Always in evaluation mode: the image tower drops whole layers in training.

Axes: B images, M of them in one forward pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts import compat
from rewards.parts.clip import Dtype, center_square, in_dtype, normalized
from rewards.parts.facts import Facts
from rewards.parts.files import check_file, check_keys, check_tokenizer, local_file, read_checkpoint, tokenizer_folder

WEIGHTS_FILE, CONFIG_FILE = "ImageReward.pt", "med_config.json"
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json")
TOKENS = 35
"""A caption is padded or truncated to this many."""
WIDTH = 768
"""Of the text encoder; the package's head requires it."""


class ImageReward:
    """A number without limits, higher is better.

    Without a gradient, a score is bit-equal in every batch: the network always gets M images. With a gradient, it depends on
    the batch by float32 rounding. The network moves to the images' device.
    """

    facts = Facts(differentiable=True, bounds=(-math.inf, math.inf), licence="Apache-2.0", packages=compat.IMAGE_REWARD)

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field(
            "THUDM/ImageReward", description="A local ImageReward.pt (or .safetensors), its folder, or a hub id."
        )
        med_config: str = Field(
            "",
            description="The text encoder's med_config.json: a local file, folder or hub id; empty: where the weights are.",
        )
        tokenizer: str = Field("google-bert/bert-base-uncased", description="A local BERT tokenizer folder or a hub id.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(weights: str, med_config: str, tokenizer: str, micro_batch: int, dtype: Dtype = "float32") -> None:
        compat.check_installed("image_reward", compat.IMAGE_REWARD)
        check_file("weights", weights, WEIGHTS_FILE)
        check_file("med_config", med_config or _same_place(weights), CONFIG_FILE)
        check_tokenizer(tokenizer, TOKENIZER_FILES)

    def __init__(
        self,
        weights: str = "THUDM/ImageReward",
        med_config: str = "",
        tokenizer: str = "google-bert/bert-base-uncased",
        micro_batch: int = 8,
        dtype: Dtype = "float32",
        label: str = "image_reward",
    ) -> None:
        """Raises ValueError unless the package is installed, and checkpoint, configuration and tokenizer fit each other."""
        self.check(weights, med_config, tokenizer, micro_batch)
        self.about = self.facts.about(label)
        self.micro_batch = micro_batch
        self.model, self.tokenizer, self.size = _load(
            local_file("weights", weights, WEIGHTS_FILE),
            local_file("med_config", med_config or _same_place(weights), CONFIG_FILE),
            tokenizer_folder(tokenizer, TOKENIZER_FILES),
        )
        self.dtype = getattr(torch, dtype)
        in_dtype(self.model.blip, self.dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        self.model.to(images.device)
        self.model.device = images.device
        scores = self.scores if torch.is_grad_enabled() and images.requires_grad else self._scores_padded
        texts = [prompt.text for prompt in prompts]
        starts = range(0, len(images), self.micro_batch)
        total = torch.cat([scores(images[i : i + self.micro_batch], texts[i : i + self.micro_batch]) for i in starts])
        return Scores(total, {self.about.label: total})

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B captions -> [B]"""
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        tokens = tokens.to(images.device)
        pixels = self.preprocess(images).to(self.dtype)
        return self.model.score_gard(tokens.input_ids, tokens.attention_mask, pixels)[:, 0]

    def _scores_padded(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The same for at most M images, in a batch of M that is padded with the last one."""
        rows = [min(i, len(images) - 1) for i in range(self.micro_batch)]
        return self.scores(images[rows], [texts[row] for row in rows])[: len(images)]

    def preprocess(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, 224, 224], roughly standard normal."""
        return normalized(center_square(images, self.size).clamp(0, 1))


def _same_place(weights: str) -> str:
    """The place of the configuration that belongs to the weights: the file's folder, or the same folder or hub id."""
    path = Path(weights).expanduser()
    return str(path.parent) if path.is_file() else weights


def _load(weights: Path, med_config: Path, tokenizer_files: Path) -> tuple[Any, Any, int]:
    """The frozen network in float32, its tokenizer, and the side of its images in pixels.

    The image tower has the sizes of the checkpoint: 24 layers 1024 wide, 16 heads, 224 pixels in the real one.
    """
    tensors = read_checkpoint(weights)
    _check_med_config(med_config)
    with compat.importing_image_reward():
        from ImageReward import ImageReward as Network
        from ImageReward.models.BLIP import blip_pretrain, med
        from ImageReward.models.BLIP.vit import VisionTransformer
    compat.complete_bert(med.BertPreTrainedModel)
    tokenizer = _tokenizer(tokenizer_files)
    patches = _tensor(weights, tensors, "blip.visual_encoder.patch_embed.proj.weight", 4)
    places = _tensor(weights, tensors, "blip.visual_encoder.pos_embed", 3)
    words = _tensor(weights, tensors, "blip.text_encoder.embeddings.word_embeddings.weight", 2)
    if len(tokenizer) != len(words):
        raise ValueError(f"tokenizer {str(tokenizer_files)!r}: has {len(tokenizer)} tokens; the checkpoint needs {len(words)}")
    width, _, _, patch = patches.shape
    size = patch * round((places.shape[1] - 1) ** 0.5)
    layers = sum(key.startswith("blip.visual_encoder.blocks.") and key.endswith(".norm1.weight") for key in tensors)
    tower = VisionTransformer(img_size=size, patch_size=patch, embed_dim=width, depth=layers, num_heads=max(width // 64, 1))
    with compat.built_from(blip_pretrain, tokenizer, tower, width):
        network = Network(med_config=str(med_config))
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    check_keys(weights, tensors, shapes, "ImageReward")
    network.load_state_dict(tensors)
    network.mlp.register_forward_pre_hook(lambda _, features: features[0].float())  # as the package's `score` does
    return network.float().requires_grad_(False).eval(), tokenizer, size


def _tensor(weights: Path, tensors: Mapping[str, Tensor], key: str, axes: int) -> Tensor:
    """A tensor that defines sizes."""
    if key not in tensors or tensors[key].ndim != axes:
        raise ValueError(f"weights {str(weights)!r}: not a checkpoint of ImageReward (no {key} of {axes} axes)")
    return tensors[key]


def _check_med_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"med_config {str(path)!r}: not JSON") from None
    for key, needed in {"hidden_size": WIDTH, "add_cross_attention": True}.items():
        if not isinstance(config, dict) or config.get(key) != needed:
            found = config.get(key) if isinstance(config, dict) else None
            raise ValueError(f"med_config {str(path)!r}: {key} is {found!r}; allowed: {needed!r}")


def _tokenizer(folder: Path) -> Any:
    """BERT's, with BLIP's two tokens appended."""
    from transformers import BertTokenizer

    tokenizer: Any = BertTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer
