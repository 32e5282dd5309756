"""Speed and memory of every scorer, with networks of their real size.

    python benchmarks/reward_speed.py [NAME ...] [--images 4] [--size 512] [--gradient] [--dtype float32] [--threads 2]
                                      [--markdown]
    python benchmarks/reward_speed.py [NAME ...] --parity [--threads 2]

A network's weights are random, in the published checkpoint's layout: written to a temporary folder, and loaded by the scorer
itself. Neither time nor memory depends on their values. Captions are encoded once, in a first call that is not timed. Each
scorer has a fresh process, whose peak memory is its resident set, including Python, torch and the pages of the checkpoint; on a
GPU, what torch has allocated there. vlm_judge is excluded, because its speed is its server's.

--parity compares, at 224 pixels, scores and the images' gradient with bfloat16's, and with the packages' own networks if
`make rewards` has installed them.

Prints a table (with --markdown as in docs/rewards.md), then one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# torch is imported only in the processes that measure: a child's peak memory starts at its parent's.

COMMON = {"image": 224, "patch": 14, "context": 77, "words": 49408}
VIT_L = COMMON | {
    "embed": 768,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_hidden": 4096,
    "text_width": 768,
    "text_layers": 12,
    "text_hidden": 3072,
}
VIT_H = COMMON | {
    "embed": 1024,
    "vision_width": 1280,
    "vision_layers": 32,
    "vision_hidden": 5120,
    "text_width": 1024,
    "text_layers": 24,
    "text_hidden": 4096,
}
BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
"""ImageReward's med_config.json."""
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "aesthetic": {"bfloat16": {"dtype": "bfloat16"}},
    "clip_score": {"bfloat16": {"dtype": "bfloat16"}},
    "hpsv2": {"bfloat16": {"dtype": "bfloat16"}, "the package's network": {"backend": "hpsv2"}, "open_clip": {}},
    "image_reward": {"bfloat16": {"dtype": "bfloat16"}, "the package's score": {}},
    "pickscore": {"bfloat16": {"dtype": "bfloat16"}},
}
"""{scorer: {what it is compared with: knobs}}"""
PACKAGES = {"the package's network": "hpsv2", "open_clip": "open_clip"}


def write(name: str, folder: Path) -> tuple[dict[str, Any], int]:
    """Write the files that the scorer loads to this folder -> the knobs that name them, and the number of weights.

    Raises ValueError if a package that the scorer needs is missing.
    """
    from rewards.parts import compat

    compat.ensure_torchvision()
    if name == "hpsv2":
        return write_hpsv2(folder)
    if name == "image_reward":
        return write_image_reward(folder)
    if name in ("clip_score", "pickscore"):
        return {"weights": str(folder)}, write_clip(folder, VIT_L if name == "clip_score" else VIT_H)
    if name == "aesthetic":
        number = write_clip(folder, VIT_L)
        return {"head": str(folder / "head.pth"), "weights": str(folder)}, number + write_head(folder / "head.pth")
    return {}, 0


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """{key: shape} -> float32 weights large enough for every input to matter."""
    import torch

    torch.manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
        tensors[key] = torch.randn(shape).mul_(0.8 * fan_in**-0.5)
        if key.endswith("weight") and len(shape) == 1:  # of a norm
            tensors[key] += 1
    return tensors


def number_of(tensors: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def write_clip(folder: Path, sizes: dict[str, int]) -> int:
    """A transformers folder of a CLIPModel, with CLIP's factor of 100."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPImageProcessorPil

    from rewards.parts.open_clip import Sizes, shapes, to_transformers

    write_clip_tokenizer(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    towers = {
        f"{tower}_config": {
            "hidden_size": sizes[f"{tower}_width"],
            "intermediate_size": sizes[f"{tower}_hidden"],
            "num_hidden_layers": sizes[f"{tower}_layers"],
            "num_attention_heads": heads,
            "hidden_act": "gelu" if sizes is VIT_H else "quick_gelu",
        }
        for tower, heads in (("vision", 16), ("text", sizes["text_width"] // 64))
    }
    towers["vision_config"]["patch_size"] = sizes["patch"]
    CLIPConfig(projection_dim=sizes["embed"], **towers).save_pretrained(folder)
    tensors = to_transformers(random_tensors(shapes(Sizes(**sizes))))
    tensors["logit_scale"] = torch.tensor(100.0).log()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return number_of(tensors)


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's real vocabulary if open_clip, which contains it, is installed; else its letters, and words that never occur."""
    from transformers import CLIPTokenizer

    from rewards.parts import compat

    merges = []
    if find_spec("open_clip") is not None:
        merges = gzip.decompress(compat.open_clip_vocabulary().read_bytes()).decode().split("\n")[1:48895]
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *(merge.replace(" ", "") for merge in merges)]
    words += [f"never{i}" for i in range(49406 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocabulary, [tuple(merge.split()) for merge in merges]).save_pretrained(folder)


def write_head(file: Path) -> int:
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    for place, (wide, out) in zip((0, 2, 4, 6, 7), pairwise((768, 1024, 128, 64, 16, 1)), strict=True):
        shapes |= {f"layers.{place}.weight": (out, wide), f"layers.{place}.bias": (out,)}
    tensors = random_tensors(shapes)
    torch.save(tensors, file)
    return number_of(tensors)


def write_hpsv2(folder: Path) -> tuple[dict[str, Any], int]:
    import torch

    from rewards.parts.open_clip import Sizes, shapes
    from rewards.scorers.hpsv2 import FILES

    write_clip_tokenizer(folder)
    tensors = random_tensors(shapes(Sizes(**VIT_H)))
    torch.save({"state_dict": tensors}, folder / FILES["v2.1"])
    return {"weights": str(folder), "tokenizer": str(folder)}, number_of(tensors)


def write_image_reward(folder: Path) -> tuple[dict[str, Any], int]:
    """The tensors' names and shapes are those of the package's network."""
    import torch

    from rewards.parts import compat

    compat.check_installed("image_reward", compat.IMAGE_REWARD)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    words += [f"never{i}" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "med_config.json").write_text(json.dumps(BERT))
    network = package_image_reward(folder, None)
    tensors = random_tensors({key: tuple(tensor.shape) for key, tensor in network.state_dict().items()})
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(tensors, folder / "ImageReward.pt")
    return {"weights": str(folder), "tokenizer": str(folder)}, number_of(tensors)


def package_image_reward(folder: Path, tokenizer: Any) -> Any:
    """The package's network for images of 224 pixels, before weights are loaded."""
    from rewards.parts import compat

    with compat.importing_image_reward():
        from ImageReward import ImageReward
        from ImageReward.models.BLIP import blip_pretrain, med
    compat.complete_bert(med.BertPreTrainedModel)
    with compat.built_from(blip_pretrain, tokenizer, *blip_pretrain.create_vit("large", 224)):
        return ImageReward(med_config=str(folder / "med_config.json"))


def sample_images(name: str, number: int, size: int) -> tuple[Any, list[Any]]:
    """8-bit images [N, 3, size, size] of their captions: glyphs, enlarged, or a sign for ocr."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image, ImageDraw, ImageFont

    from diffusion.types import Prompt
    from worlds.glyphs import parse, read_prompts, render

    known = read_prompts("evaluation")
    texts = [known[i % len(known)] for i in range(number)]
    images = render([parse(text) for text in texts], seed=0)
    if size != images.shape[2]:
        images = F.interpolate(images, (size, size), mode="bilinear")
    images = (images * 255).round() / 255
    if name == "ocr":
        texts = [f'a sign that says "OPEN {i}"' for i in range(number)]
        for i, image in enumerate(images):
            sign = Image.new("RGB", (size, size), "white")
            ImageDraw.Draw(sign).text((size // 8, size // 3), f"OPEN {i}", "black", ImageFont.load_default(size // 6))
            image.copy_(torch.from_numpy(np.array(sign)).permute(2, 0, 1) / 255)
    return images, [Prompt(str(i), text) for i, text in enumerate(texts)]


def built(name: str, knobs: Mapping[str, Any]) -> Any:
    """The scorer, checked and built as in an experiment."""
    import rewards
    from rewards.parts import compat

    compat.ensure_torchvision()
    rewards.check(rewards.resolve([{"name": name, **knobs}]))
    return rewards.scorer(name)(**knobs)


def measure(name: str, files: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Images per second and peak memory in GB of 10^9 bytes. Raises ValueError if the scorer cannot run here."""
    import torch

    import rewards

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"micro_batch": min(options.images, 8), "dtype": options.dtype}
    own = {key: value for key, value in chosen.items() if key in rewards.knobs(name).model_fields}
    reward = built(name, files | own)
    number, size = options.images, 32 if name == "glyph_match" else options.size
    images, prompts = sample_images(name, number, size)
    images = images.to(device)
    found: dict[str, Any] = {"size": size}

    def forward() -> None:
        with torch.no_grad():
            reward(images, prompts)

    def backward() -> None:
        tracked = images.clone().requires_grad_()
        torch.autograd.grad(reward(tracked, prompts).total.sum(), tracked)

    for key, call in {"forward": forward, "gradient": backward}.items():
        if key == "gradient" and not (options.gradient and reward.about.differentiable):
            continue
        found[f"{key}_images_per_s"] = number / seconds(call, torch.cuda.synchronize if device == "cuda" else lambda: None)
        found[f"{key}_peak_gb"] = (torch.cuda.max_memory_allocated() if device == "cuda" else resident()) / 1e9
    return found


def seconds(call: Callable[[], None], wait: Callable[[], None]) -> float:
    """Median of repeated calls for about 3 seconds; the first one is not counted."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < 3 and len(taken) < 100):
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def resident() -> int:
    """Peak main memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(threads: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpus": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def side(name: str, other: str, knobs: dict[str, Any], file: Path, threads: int) -> None:
    """Scores and gradient of two images by one implementation, into a file."""
    import torch

    torch.set_num_threads(threads)
    images, prompts = sample_images(name, 2, 224)
    images = images.to("cuda" if torch.cuda.is_available() else "cpu")
    if other == "the package's score":
        scores, gradient = package_scores(Path(knobs["weights"]), images, prompts), None
    else:
        images.requires_grad_()
        total = with_open_clip(knobs, images, prompts) if other == "open_clip" else built(name, knobs)(images, prompts).total
        (gradient,) = torch.autograd.grad(total.sum(), images)
        scores = total.detach()
    torch.save((scores, gradient), file)


def package_scores(folder: Path, images: Any, prompts: list[Any]) -> Any:
    """image-reward's own `score`, of PIL images."""
    import torch
    from PIL import Image

    from rewards.parts import compat

    compat.ensure_torchvision()
    from transformers import BertTokenizer

    from rewards.parts.files import read_checkpoint

    network = package_image_reward(folder, BertTokenizer.from_pretrained(folder))
    network.load_state_dict(read_checkpoint(folder / "ImageReward.pt"))
    network.eval().to(images.device)
    network.device = images.device
    eight_bit = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with torch.no_grad():
        return torch.tensor(
            [network.score(prompt.text, Image.fromarray(array)) for prompt, array in zip(prompts, eight_bit, strict=True)]
        ).to(images.device)


def with_open_clip(knobs: dict[str, Any], images: Any, prompts: list[Any]) -> Any:
    from rewards.parts import compat
    from rewards.parts.files import read_checkpoint
    from rewards.scorers.hpsv2 import FILES, Preprocess

    compat.ensure_torchvision()
    import open_clip

    model = open_clip.create_model("ViT-H-14").eval().requires_grad_(False)
    model.load_state_dict(read_checkpoint(Path(knobs["weights"]) / FILES["v2.1"]))
    model.to(images.device)
    tokens = open_clip.get_tokenizer("ViT-H-14")([prompt.text for prompt in prompts]).to(images.device)
    seen = model.encode_image(Preprocess(224, antialias=True)(images), normalize=True)
    return (seen * model.encode_text(tokens, normalize=True)).sum(1)


def difference(ours: Path, theirs: Path) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    (scores, gradient), (other, other_gradient) = (torch.load(file, weights_only=True) for file in (ours, theirs))
    found = {"score": (scores - other).abs().max().item(), "apart": (scores[0] - scores[1]).abs().item()}
    if other_gradient is not None:
        found["gradient"] = ((gradient - other_gradient).norm() / gradient.norm()).item()
        found["cosine"] = F.cosine_similarity(gradient.flatten(1), other_gradient.flatten(1)).min().item()
    return found


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, computed in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    from rewards import REWARDS

    names = [name for name in REWARDS if name != "vlm_judge"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all of them by default")
    parser.add_argument("--images", type=int, default=4, help="in one call; at most 8 of them in one forward pass")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels; glyph_match: always 32")
    parser.add_argument("--gradient", action="store_true", help="also forward and backward, for differentiable rewards")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--parity", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown scorer: {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")

    show_header(options)
    rows = []
    for name in options.names or names:
        if options.parity and name not in SIDES:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"name": name}
            try:
                files, number = fresh(write, name, Path(folder))
                row["parameters_m"] = round(number / 1e6, 1)
                if options.parity:
                    row["parity"] = parity(name, files, Path(folder), options.threads)
                else:
                    row |= fresh(measure, name, files, options)
            except ValueError as error:
                row = {"name": name, "skipped": str(error)}
        show(row, options)
        rows.append(row)
    kept = ("images", "dtype", "parity")
    print(json.dumps({"rows": rows, **{k: vars(options)[k] for k in kept}, "machine": fresh(machine, options.threads)}))


def parity(name: str, files: dict[str, Any], folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """{what it is compared with: differences}, one network at a time."""
    files = files | {"micro_batch": 1}  # as the packages do
    fresh(side, name, "", files, folder / "ours.parity", threads)
    found = {}
    for other, own in SIDES[name].items():
        if other in PACKAGES and find_spec(PACKAGES[other]) is None:
            continue
        fresh(side, name, other, files | own, folder / "theirs.parity", threads)
        found[other] = fresh(difference, folder / "ours.parity", folder / "theirs.parity")
    return found


def show_header(options: argparse.Namespace) -> None:
    if options.parity:
        titles = ["reward", "against", "score differs by", "two scores apart", "gradient differs by", "its cosine"]
    else:
        titles = ["reward", "million weights", "forward, images/s", "peak GB", "and backward, images/s", "peak GB"]
    show_line(titles, options)
    if options.markdown:
        print("| " + " | ".join("---" for _ in titles) + " |", flush=True)


def show(row: dict[str, Any], options: argparse.Namespace) -> None:
    if "skipped" in row:
        show_line([row["name"], f"skipped: {row['skipped']}"], options)
    elif options.parity:
        for other, found in row["parity"].items():
            shown = [f"{found[key]:.2g}" if key in found else "-" for key in ("score", "apart", "gradient")]
            show_line([row["name"], other, *shown, f"{found['cosine']:.6f}" if "cosine" in found else "-"], options)
    else:
        keys = [f"{kind}_{what}" for kind in ("forward", "gradient") for what in ("images_per_s", "peak_gb")]
        weights = f"{row['parameters_m']:.1f}" if row["parameters_m"] else "-"
        show_line([row["name"], weights, *(readable(row[key]) if key in row else "-" for key in keys)], options)


def readable(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:#.2g}"


def show_line(cells: list[str], options: argparse.Namespace) -> None:
    print("| " + " | ".join(cells) + " |" if options.markdown else "".join(f"{cell:24}" for cell in cells).rstrip(), flush=True)


if __name__ == "__main__":
    main()
