"""`weights:` of an experiment to a generator, with a one-line ValueError for every way it can go wrong.

Light to import: `resolve` checks everything short of reading weights, for a dry run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generators.families import DEFAULT, FAMILIES
from generators.outline import Outline, read_outline
from inputs import hub_errors, is_hub_id, is_on_hub, nearest
from inputs.hub import ask_for_access

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

DTYPES = ("float32", "bfloat16")
_GLYPHS = Path(__file__).parent / "glyphs"
EMBEDDED = {"glyphs": _GLYPHS / "pipeline", "glyphs-clip": _GLYPHS / "clip", "glyphs-rewriter": _GLYPHS / "rewriter"}
"""{NAME of `embedded:NAME`: folder}: a generator, a CLIPModel for rewards, and a language model that writes prompts."""


def load(
    weights: str,
    *,
    family: str = DEFAULT,
    dtype: str = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    **options: Any,
) -> PipelineGenerator:
    """A frozen generator without adapters.

    weights: `embedded:NAME`, a local diffusers folder, or a hub id, which is downloaded.
    dtype: of the base, "float32" or "bfloat16"; adapters are float32 over both.
    gradient_checkpointing: store block inputs only, and recompute the blocks in backward.
    options: the family's own, described in its package, e.g. `generators.families.sd3`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: not known{nearest(dtype, DTYPES)}")
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: PyTorch sees no GPU (allowed: cpu)")
    return FAMILIES[family].load(
        download(weights, family, **options),
        dtype=getattr(torch, dtype),
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        **options,
    )


def outline(weights: str, family: str = DEFAULT) -> Outline:
    """The generator's sizes, layers and scheduler, for checks before anything heavy starts."""
    folder = resolve(weights, family)
    with hub_errors(weights):
        return read_outline(folder, FAMILIES[family], weights if is_on_hub(weights) else None)


def resolve(weights: str, family: str = DEFAULT) -> Path:
    """The local folder with the weights' model_index.json; for a hub model, without the weights themselves."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: not known{nearest(family, FAMILIES)}")
    if weights.startswith("embedded:"):
        folder = embedded(weights)
    elif (local := Path(weights).expanduser()).exists():
        folder = local
    elif is_hub_id(weights):
        folder = _hub_index(weights)
    else:
        raise ValueError(
            f"weights {weights!r}: there is no such folder "
            "(allowed: embedded:NAME, a local diffusers folder, or a hub id owner/name)"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"weights {weights!r}: not a diffusers pipeline folder (no model_index.json)")
    found, expected = json.loads(index.read_text()).get("_class_name"), FAMILIES[family].pipeline
    if found != expected:
        raise ValueError(f"weights {weights!r}: a {found}, but family {family} is a {expected}")
    return folder


def embedded(weights: str) -> Path:
    """The folder that `embedded:NAME` stands for."""
    name = weights.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise ValueError(f"weights {weights!r}: no such embedded model{nearest(name, EMBEDDED)}")
    return EMBEDDED[name]


def download(weights: str, family: str = DEFAULT, **options: Any) -> Path:
    """The local folder with everything that `load` reads; options: those of `load` that leave out a part, e.g. t5=False."""
    folder = resolve(weights, family)
    if not is_on_hub(weights):
        return folder
    from diffusers import DiffusionPipeline

    optional = FAMILIES[family].optional
    left_out = [component for option, parts in optional.items() if not options.get(option, True) for component in parts]
    with hub_errors(weights):
        return Path(DiffusionPipeline.download(weights, **dict.fromkeys(left_out)))


def weights_hash(path: Path) -> str:
    """sha256 over names and bytes of all weights and configs of a model folder, which determine its output; or of a file."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")):
        if part.suffix in (".safetensors", ".json", ".txt", ".model", ".pt", ".pth"):
            with part.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{part.relative_to(path).as_posix()} {own}\n".encode())
    return digest.hexdigest()


def _hub_index(hub_id: str) -> Path:
    """The folder of the cached snapshot; for a model that is not cached, the hub is asked once, without retries."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "model_index.json")
    if isinstance(cached, str):
        return Path(cached).parent
    with hub_errors(hub_id):
        ask_for_access(hub_id)
        return Path(hf_hub_download(hub_id, "model_index.json")).parent
