"""HPS v2 (Wu et al. 2023, arXiv 2306.09341): which image people prefer for a caption, predicted by a CLIP ViT-H/14 that was
fine-tuned on human choices.

The score is the cosine of image and caption features, as `hpsv2.score` returns it. `hpsv2.evaluate` and the published tables
show 100 times that number. Scores of ordinary images lie close together, at 0.2 to 0.35: the weight in a mixture has to make up
for that. Scores of v2.0 and v2.1 are not comparable; the package's own defaults differ, v2.0 in `score` and v2.1 in `evaluate`.

Two back ends on the same checkpoint, equal up to float32 rounding:

* `transformers` (default) renames the checkpoint's tensors into a CLIPModel. It needs neither the package nor torchvision.
* `hpsv2` uses the package's model and tokenizer (version 1.2.0, through `compat`).

Deviations from the package: images are tensors and carry a gradient; the checkpoint is read once, not at every call. With
`transformers`, captions with decoding errors are not repaired, as the package does with ftfy; typographic quotes are
straightened and HTML entities resolved as there.

Axes: B images, M of them in one forward pass, D common dimensions of image and text, L tokens.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts import compat
from rewards.parts.clip import CaptionFeatures, Dtype, center_square, in_dtype, in_micro_batches, normalized
from rewards.parts.facts import Facts
from rewards.parts.files import check_file, check_tokenizer, local_file, read_checkpoint, tokenizer_folder
from rewards.parts.open_clip import Sizes, measure, to_transformers

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""{version: its file on the hub}"""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class HPSv2:
    """Cosine of image and caption features, in [-1, 1].

    Without a gradient, a score is bit-equal in every batch: the network always gets M images. With a gradient, it depends on
    the batch by float32 rounding. A caption is truncated after 77 tokens. The network moves to the images' device.
    """

    facts = Facts(differentiable=True, bounds=(-1.0, 1.0), licence="Apache-2.0", files={"weights": (FILES["v2.1"],)})

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field("xswu/HPSv2", description="A local checkpoint (.pt or .safetensors), its folder, or a hub id.")
        version: Literal["v2.1", "v2.0"] = Field("v2.1", description="Which file of a folder or hub id is used.")
        backend: Literal["transformers", "hpsv2"] = Field("transformers", description="Whose model and tokenizer are used.")
        tokenizer: str = Field(
            "openai/clip-vit-large-patch14",
            description="CLIP's vocabulary, for backend transformers: a local tokenizer folder or a hub id.",
        )
        antialias: bool = Field(True, description="Whether resizing is antialiased; torchvision before 0.17 did not.")
        micro_batch: int = Field(8, ge=1, description="M, images in one forward pass of the network.")
        dtype: Dtype = "float32"

    @staticmethod
    def check(
        weights: str,
        version: str,
        backend: str,
        tokenizer: str,
        antialias: bool,
        micro_batch: int,
        dtype: Dtype = "float32",
    ) -> None:
        if backend == "transformers":
            check_tokenizer(tokenizer, TOKENIZER_FILES)
        else:
            compat.check_installed(f"backend {backend!r}", compat.HPSV2)
        check_file("weights", weights, FILES[version])

    def __init__(
        self,
        weights: str = "xswu/HPSv2",
        version: Literal["v2.1", "v2.0"] = "v2.1",
        backend: Literal["transformers", "hpsv2"] = "transformers",
        tokenizer: str = "openai/clip-vit-large-patch14",
        antialias: bool = True,
        micro_batch: int = 8,
        dtype: Dtype = "float32",
        label: str = "hpsv2",
    ) -> None:
        """Raises ValueError unless the checkpoint is exactly an open_clip CLIP, and fits the tokenizer."""
        self.check(weights, version, backend, tokenizer, antialias, micro_batch)
        path = local_file("weights", weights, FILES[version])
        tensors = read_checkpoint(path)
        sizes = measure(path, tensors)
        self.about = self.facts.about(label)
        self.micro_batch = micro_batch
        self.preprocess = Preprocess(sizes.image, antialias)
        self.towers = _Transformers(tensors, sizes, tokenizer) if backend == "transformers" else _Package(tensors, sizes)
        self.dtype = getattr(torch, dtype)
        self.model = in_dtype(self.towers.model, self.dtype)
        self.captions = CaptionFeatures(lambda text: F.normalize(self.towers.text(text)[0].float(), dim=-1))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B."""
        self.model.to(images.device)
        image = in_micro_batches(self.image_features, images, self.micro_batch)
        total = (image * self.captions.of(prompts).to(images.device)).sum(1)
        return Scores(total, {self.about.label: total})

    def image_features(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, D] of length 1."""
        return F.normalize(self.towers.image(self.preprocess(images).to(self.dtype)).float(), dim=-1)


class Preprocess:
    """The package's preprocessing: resize the shorter side, crop the centre, normalise. The package works on float tensors too,
    so both are bit-equal; bicubic overshoot is not clipped."""

    def __init__(self, size: int, antialias: bool) -> None:
        self.size = size
        self.antialias = antialias

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size], roughly standard normal."""
        return normalized(center_square(images, self.size, self.antialias))


def clean(text: str) -> str:
    """A caption as open_clip's tokenizer prepares it, except that decoding errors are not repaired."""
    text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    return " ".join(html.unescape(html.unescape(text)).split())


class _Transformers:
    """The checkpoint as a frozen float32 CLIPModel. Any, because transformers' classes get their attributes at run time."""

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Sizes, tokenizer: str) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        folder = tokenizer_folder(tokenizer, TOKENIZER_FILES)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(self.tokenizer) != sizes.words:
            raise ValueError(f"tokenizer {tokenizer!r}: has {len(self.tokenizer)} tokens; the checkpoint needs {sizes.words}")
        self.context = sizes.context
        config = CLIPConfig(
            projection_dim=sizes.embed,
            vision_config={
                "image_size": sizes.image,
                "patch_size": sizes.patch,
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_hidden,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "projection_dim": sizes.embed,
                "hidden_act": "gelu",
            },
            text_config={
                "vocab_size": sizes.words,
                "max_position_embeddings": sizes.context,
                "hidden_size": sizes.text_width,
                "intermediate_size": sizes.text_hidden,
                "num_hidden_layers": sizes.text_layers,
                "num_attention_heads": sizes.text_heads,
                "projection_dim": sizes.embed,
                "hidden_act": "gelu",
                "bos_token_id": self.tokenizer.bos_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
            },
        )
        self.model: Any = CLIPModel.from_pretrained(
            None, config=config, state_dict=to_transformers(tensors), dtype=torch.float32
        )
        self.model.requires_grad_(False).eval()

    def image(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, D]"""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text(self, text: str) -> Tensor:
        """One caption -> [1, D]"""
        ids = self.tokens(text).to(self.model.device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)

    def tokens(self, text: str) -> Tensor:
        """One caption -> [1, L] int64: start, words, end, zeros. The text tower is causal, so the zeros need no mask."""
        ids = self.tokenizer(clean(text), truncation=True, max_length=self.context).input_ids
        return torch.tensor([ids + [0] * (self.context - len(ids))])


class _Package:
    """The checkpoint as the package's own frozen float32 model."""

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Sizes) -> None:
        with compat.importing_hpsv2():
            from hpsv2.src.open_clip import CLIP, tokenize

        self.context = sizes.context
        self.tokenize = tokenize
        self.model: Any = CLIP(
            embed_dim=sizes.embed,
            vision_cfg={
                "layers": sizes.vision_layers,
                "width": sizes.vision_width,
                "head_width": sizes.vision_width // sizes.vision_heads,
                "mlp_ratio": sizes.vision_hidden / sizes.vision_width,
                "patch_size": sizes.patch,
                "image_size": sizes.image,
            },
            text_cfg={
                "context_length": sizes.context,
                "vocab_size": sizes.words,
                "width": sizes.text_width,
                "heads": sizes.text_heads,
                "layers": sizes.text_layers,
            },
        )
        self.model.load_state_dict(tensors)
        self.model.requires_grad_(False).eval()

    def image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def text(self, text: str) -> Tensor:
        return self.model.encode_text(self.tokens(text).to(self.model.positional_embedding.device))

    def tokens(self, text: str) -> Tensor:
        return self.tokenize([text], self.context)
