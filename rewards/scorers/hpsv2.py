"""Which of two pictures would people prefer for this caption? HPS v2 (Wu et al. 2023, arXiv 2306.09341): a CLIP ViT-H/14
tuned on human choices.

The score is the cosine of picture and caption, as `hpsv2.score` returns it. `hpsv2.evaluate` and the published tables show the
same number times 100. Real pictures lie close together, at 0.2 to 0.35: the weight of a mixture has to make up for that. Scores
of v2.0 and v2.1 are not comparable; nor are the package's own defaults, v2.0 in `score` and v2.1 in `evaluate`.

Two back ends on the same checkpoint, the same to float32 rounding:

* `transformers` (default) renames the checkpoint's tensors into a CLIPModel. It needs neither the package nor torchvision.
* `hpsv2` uses the package's model and tokenizer (version 1.2.0, through `compat`).

What differs from the package: pictures are tensors and carry a gradient; the checkpoint is read once, not at every call. With
`transformers`, captions are not repaired where they were decoded wrongly, as the package does with ftfy, but typographic quotes
are straightened and HTML entities resolved likewise.

Axes: B images, M of them in one forward pass, D common dimensions of image and text, L tokens.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.parts import compat
from rewards.parts.checkpoints import check_file, check_keys, check_tokenizer, local_file, read_checkpoint, tokenizer_folder
from rewards.scorers.clip_score import Dtype, in_dtype, in_micro_batches

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""{version: its file at the hub}"""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CACHED_PROMPTS = 65536
"""How many captions' features are kept in main memory: 256 MB at D = 1024."""

TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""{tensor in the checkpoint: in a CLIPModel, whose misspelling `pre_layrnorm` is}"""
TRANSPOSED = ("visual.proj", "text_projection")
TOWERS = {"visual.transformer.resblocks": "vision_model.encoder.layers", "transformer.resblocks": "text_model.encoder.layers"}
LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""{weight and bias of a layer in the checkpoint: in a CLIPModel}; and attn.in_proj_*, which are query, key and value in one."""


class HPSv2:
    """Cosine of image and caption features, in [-1, 1].

    Scores are independent of the batch to the last bit where no gradient is asked for: the network then always sees M images.
    With a gradient, neighbours count by float32 rounding. A caption is cut off after 77 tokens. The network moves to the
    images' device.
    """

    differentiable = True
    bounds = (-1.0, 1.0)
    licence = "Apache-2.0"
    weights_files = (FILES["v2.1"],)

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field("xswu/HPSv2", description="A local checkpoint (.pt or .safetensors), its folder, or a hub id.")
        version: Literal["v2.1", "v2.0"] = Field("v2.1", description="Which file of a folder or hub id is meant.")
        backend: Literal["transformers", "hpsv2"] = Field("transformers", description="Whose model and tokenizer are used.")
        tokenizer: str = Field(
            "openai/clip-vit-large-patch14",
            description="CLIP's vocabulary for the back end transformers: a local tokenizer folder or a hub id.",
        )
        antialias: bool = Field(True, description="Whether resizing averages; false is what torchvision before 0.17 did.")
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
        """Raises ValueError unless the checkpoint is a complete open_clip CLIP, and nothing else, that fits the tokenizer."""
        self.check(weights, version, backend, tokenizer, antialias, micro_batch)
        path = local_file("weights", weights, FILES[version])
        tensors = read_checkpoint(path)
        sizes = measure(path, tensors)
        self.label = label
        self.micro_batch = micro_batch
        self.preprocess = Preprocess(sizes.image, antialias)
        self.towers = _Transformers(tensors, sizes, tokenizer) if backend == "transformers" else _Package(tensors, sizes)
        self.dtype = getattr(torch, dtype)
        self.model = in_dtype(self.towers.model, self.dtype)
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
        return F.normalize(self.towers.image(self.preprocess(images).to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, text: str) -> Tensor:
        """One caption by itself, [D] of length 1 on the CPU."""
        if text not in self._texts:
            if len(self._texts) == CACHED_PROMPTS:
                self._texts.clear()
            self._texts[text] = F.normalize(self.towers.text(text)[0].float(), dim=-1).cpu()
        return self._texts[text]


class Preprocess:
    """What the package does to a picture: resize the shorter side, crop the middle, normalise. All of it on float tensors there
    too, so the two agree to the last bit; bicubic overshoot is not clipped."""

    def __init__(self, size: int, antialias: bool) -> None:
        self.size = size
        self.antialias = antialias
        self.mean = torch.tensor(MEAN)[:, None, None]
        self.std = torch.tensor(STD)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, 3, size, size], about normal."""
        images = middle_square(images, self.size, self.antialias)
        return (images - self.mean.to(images.device)) / self.std.to(images.device)


def middle_square(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """torchvision's Resize(size, bicubic) and CenterCrop(size) on float tensors: images [B, 3, H, W] -> [B, 3, size, size]."""
    height, width = images.shape[2:]
    if (short := min(height, width)) != size:
        target = (int(size * height / short), int(size * width / short))
        images = F.interpolate(images, target, mode="bicubic", antialias=antialias, align_corners=False)
    top, left = (round((side - size) / 2) for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


@dataclass(frozen=True)
class Sizes:
    """The architecture, read off the checkpoint's tensors. Numbers of heads are not in them; their rule is open_clip's."""

    embed: int
    """D"""
    image: int
    """pixels of a side"""
    patch: int
    vision_width: int
    vision_layers: int
    vision_hidden: int
    text_width: int
    text_layers: int
    text_hidden: int
    context: int
    """L"""
    words: int

    @property
    def vision_heads(self) -> int:
        """width / 64, but at most 16: so in open_clip's ViT from S to bigG, and in ViT-H, where a head has 80 dimensions."""
        return min(self.vision_width // 64, 16)

    @property
    def text_heads(self) -> int:
        return self.text_width // 64


def measure(path: Path, tensors: Mapping[str, Tensor]) -> Sizes:
    """The sizes of a checkpoint in open_clip's layout. Raises ValueError if a tensor is missing, unknown or misshapen."""
    first = [f"{tower}.0.mlp.c_fc.weight" for tower in TOWERS]
    if missing := [key for key in (*TENSORS, *first) if key not in tensors]:
        raise ValueError(f"weights {str(path)!r}: lack {len(missing)} of CLIP's tensors, for example {missing[0]}")
    sizes = Sizes(
        embed=tensors["visual.proj"].shape[-1],
        image=tensors["visual.conv1.weight"].shape[-1] * round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5),
        patch=tensors["visual.conv1.weight"].shape[-1],
        vision_width=len(tensors["visual.conv1.weight"]),
        vision_layers=_layers(tensors, "visual.transformer.resblocks"),
        vision_hidden=len(tensors[first[0]]),
        text_width=tensors["token_embedding.weight"].shape[-1],
        text_layers=_layers(tensors, "transformer.resblocks"),
        text_hidden=len(tensors[first[1]]),
        context=len(tensors["positional_embedding"]),
        words=len(tensors["token_embedding.weight"]),
    )
    check_keys(path, tensors, shapes(sizes), "CLIP")
    if sizes.vision_width % (64 if sizes.vision_width < 1024 else 16) or sizes.text_width % 64:
        raise ValueError(
            f"weights {str(path)!r}: towers {sizes.vision_width} and {sizes.text_width} wide do not fall into open_clip's heads"
        )
    return sizes


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """{tensor of open_clip's CLIP: shape}"""
    vision, text = sizes.vision_width, sizes.text_width
    found: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (vision,),
        "visual.conv1.weight": (vision, 3, sizes.patch, sizes.patch),
        "visual.positional_embedding": ((sizes.image // sizes.patch) ** 2 + 1, vision),
        "visual.proj": (vision, sizes.embed),
        "token_embedding.weight": (sizes.words, text),
        "positional_embedding": (sizes.context, text),
        "text_projection": (text, sizes.embed),
        "logit_scale": (),
        **{f"visual.{norm}.{kind}": (vision,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **{f"ln_final.{kind}": (text,) for kind in ("weight", "bias")},
    }
    towers = ((vision, sizes.vision_layers, sizes.vision_hidden), (text, sizes.text_layers, sizes.text_hidden))
    for tower, (width, layers, hidden) in zip(TOWERS, towers, strict=True):
        layer: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (hidden, width),
            "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (width, hidden),
            "mlp.c_proj.bias": (width,),
        }
        found |= {f"{tower}.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return found


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint in open_clip's layout -> the same weights by a CLIPModel's names."""
    converted = {}
    for key, tensor in tensors.items():
        if key in TENSORS:
            converted[TENSORS[key]] = tensor.T.contiguous() if key in TRANSPOSED else tensor
            continue
        tower, number, name = re.fullmatch(r"(.*resblocks)\.(\d+)\.(.*)", key).groups()  # type: ignore[union-attr]
        layer = f"{TOWERS[tower]}.{number}"
        if name.startswith("attn.in_proj_"):
            kind = name.removeprefix("attn.in_proj_")
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            module, kind = name.rsplit(".", 1)
            converted[f"{layer}.{LAYER[module]}.{kind}"] = tensor
    return converted


def clean(text: str) -> str:
    """A caption as open_clip's tokenizer prepares it, but for the repair of badly decoded text."""
    text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    return " ".join(html.unescape(html.unescape(text)).split())


class _Transformers:
    """The checkpoint as a frozen float32 CLIPModel. Any, because transformers' classes get their attributes at run time."""

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Sizes, tokenizer: str) -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        folder = tokenizer_folder(tokenizer, TOKENIZER_FILES)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(self.tokenizer) != sizes.words:
            raise ValueError(f"tokenizer {tokenizer!r}: knows {len(self.tokenizer)} tokens, the checkpoint {sizes.words}")
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
        """One caption -> [1, L] int64: start, words, end, zeros. The text tower looks back only, so zeros need no mask."""
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


def _layers(tensors: Mapping[str, Tensor], tower: str) -> int:
    return sum(re.fullmatch(rf"{re.escape(tower)}\.\d+\.mlp\.c_fc\.weight", key) is not None for key in tensors)
