"""`weights:` of an experiment to a generator, with one clear line for each way it can go wrong.

Light to import: `resolve` checks everything short of reading weights, for a dry run. What people can get wrong is a ValueError.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from generators.outline import Outline, read_outline

if TYPE_CHECKING:
    from generators.families.sd3 import SD3Generator

FAMILIES = {"sd3": "StableDiffusion3Pipeline"}
"""{family: the diffusers pipeline its weights belong to}"""
DTYPES = ("float32", "bfloat16")
_GLYPHS = Path(__file__).parent / "glyphs"
EMBEDDED = {"glyphs": _GLYPHS / "pipeline", "glyphs-clip": _GLYPHS / "clip", "glyphs-rewriter": _GLYPHS / "rewriter"}
"""What `embedded:NAME` stands for: a generator, a CLIPModel for rewards, and a language model that writes prompts."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load(
    weights: str,
    *,
    family: str = "sd3",
    dtype: str = "float32",
    device: str = "cpu",
    gradient_checkpointing: bool = False,
    t5: bool = True,
    max_sequence_length: int | None = None,
) -> SD3Generator:
    """A frozen generator without adapters.

    weights: `embedded:NAME`, a local diffusers folder, or a hub id, which is downloaded.
    dtype: of the base, "float32" or "bfloat16"; adapters are float32 over both.
    t5, max_sequence_length: see `generators.families.sd3.load_sd3`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not allowed{_allowed(dtype, DTYPES)}")
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not there: this torch sees no GPU; allowed: cpu")
    folder = download(weights, family, t5=t5)
    from generators.families.sd3 import load_sd3

    return load_sd3(
        folder,
        dtype=getattr(torch, dtype),
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        t5=t5,
        max_sequence_length=max_sequence_length,
    )


def outline(weights: str, family: str = "sd3") -> Outline:
    """The generator's sizes, layers and scheduler, for whoever asks before the heavy part starts."""
    folder = resolve(weights, family)
    with _hub_errors(weights):
        return read_outline(folder, weights if _on_hub(weights) else None)


def family_class(family: str) -> type[SD3Generator]:
    """The class that generates for a family of FAMILIES."""
    from generators.families.sd3 import SD3Generator

    return {"sd3": SD3Generator}[family]


def resolve(weights: str, family: str = "sd3") -> Path:
    """The local folder with the weights' model_index.json, without the weights themselves where they are on the hub."""
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not known{_allowed(family, FAMILIES)}")
    if weights.startswith("embedded:"):
        folder = embedded(weights)
    elif (local := Path(weights).expanduser()).exists():
        folder = local
    elif _HUB_ID.fullmatch(weights):
        folder = _hub_index(weights)
    else:
        raise ValueError(
            f"weights {weights!r}: there is no such folder; "
            "allowed are embedded:NAME, a local diffusers folder, or a hub id owner/name"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"weights {weights!r}: no model_index.json there, so it is no diffusers pipeline folder")
    found = json.loads(index.read_text()).get("_class_name")
    if found != FAMILIES[family]:
        raise ValueError(f"weights {weights!r} are a {found}, but family {family} is a {FAMILIES[family]}")
    return folder


def embedded(weights: str) -> Path:
    """The folder that `embedded:NAME` stands for."""
    name = weights.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise ValueError(f"weights {weights!r} are not embedded here{_allowed(name, EMBEDDED)}")
    return EMBEDDED[name]


def download(weights: str, family: str = "sd3", t5: bool = True) -> Path:
    """The local folder with everything `load` needs; t5: False leaves the T5 where it is."""
    folder = resolve(weights, family)
    if not _on_hub(weights):
        return folder
    from diffusers import DiffusionPipeline

    from generators.families.sd3 import WITHOUT_T5

    with _hub_errors(weights):
        return Path(DiffusionPipeline.download(weights, **({} if t5 else WITHOUT_T5)))


def _on_hub(weights: str) -> bool:
    return not weights.startswith("embedded:") and not Path(weights).expanduser().exists()


def weights_hash(folder: Path) -> str:
    """sha256 over names and bytes of all weights and configs of a model folder, what its output depends on; or of a file."""
    if folder.is_file():
        with folder.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".pt", ".pth"):
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()} {own}\n".encode())
    return digest.hexdigest()


def _hub_index(hub_id: str) -> Path:
    """The cached snapshot's folder; a model that is not cached is asked for at the hub, once and without retries."""
    from huggingface_hub import auth_check, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "model_index.json")
    if isinstance(cached, str):
        return Path(cached).parent
    with _hub_errors(hub_id):
        # hf_hub_download alone would retry for half a minute when there is no network.
        auth_check(hub_id)
        return Path(hf_hub_download(hub_id, "model_index.json")).parent


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        problem = f"is gated: accept its licence at https://huggingface.co/{hub_id} and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "is neither a local folder nor found on the hub; if it is private, log in with `hf auth login`"
    except errors.RemoteEntryNotFoundError:
        problem = f"is no {', '.join(FAMILIES.values())} on the hub: a file of one is missing"
    except errors.HfHubHTTPError as error:
        problem = f"cannot be read from the hub: {str(error).splitlines()[0]}"
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError):
        problem = "is no local folder, not in the cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    else:
        return
    raise ValueError(f"weights {hub_id!r}: it {problem}")


def _allowed(word: str, allowed: Sequence[str] | dict) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f"; allowed: {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")
