"""Files that a scorer's knobs name: found, downloaded, read. Every error is a one-line ValueError.

A *place*, the value of such a knob, is a local file, a local folder, or a hub id owner/name. Each `check_...` tests whether the
other function would find its files, and downloads nothing: the hub is only queried whether the download is allowed.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inputs.hub import ask_for_access, hub_errors, is_hub_id

SAFE_FILES = ("*.json", "*.txt", "*.safetensors")
"""What is downloaded of a model: no pickles, which could run code."""
SUFFIXES = (".pt", ".pth", ".safetensors", ".json")
"""A place with such a suffix is a file, and never looked up on the hub."""


def model_folder(weights: str, model_type: str) -> Path:
    """The local folder of a transformers model in safetensors; a hub id is downloaded unless it is in the cache.

    weights: the place. model_type: required value of that key in the folder's config.json.
    """
    if (folder := _local("weights", weights)) is None:
        folder = _download("weights", weights, ["config.json"], SAFE_FILES)
    _check_model_files(folder, weights, model_type)
    return folder


def check_model(weights: str, model_type: str) -> None:
    """Check that `model_folder` would succeed."""
    if (folder := _local("weights", weights)) is None:
        _check_access("weights", weights, ["config.json"])
    else:
        _check_model_files(folder, weights, model_type)


def local_file(key: str, place: str, name: str) -> Path:
    """The file `name` of a place, or the file that the place is; a hub id is downloaded unless it is in the cache.

    key: the knob that names the place, for errors.
    """
    if (path := _local_file(key, place, name)) is not None:
        return path
    from huggingface_hub import hf_hub_download

    _check_access(key, place, [name])
    with hub_errors(place, key):
        return Path(hf_hub_download(place, name))


def check_file(key: str, place: str, name: str) -> None:
    """Check that `local_file` would succeed."""
    if _local_file(key, place, name) is None:
        _check_access(key, place, [name])


def tokenizer_folder(place: str, names: Sequence[str]) -> Path:
    """The local folder of a transformers tokenizer; from the hub, only its text files are downloaded.

    names: a folder with any of these files is one.
    """
    if (folder := _local("tokenizer", place)) is None:
        folder = _download("tokenizer", place, names, [*names, "merges.txt", "tokenizer_config.json"])
    _check_tokenizer_files(folder, place, names)
    return folder


def check_tokenizer(place: str, names: Sequence[str]) -> None:
    """Check that `tokenizer_folder` would succeed."""
    if (folder := _local("tokenizer", place)) is None:
        _check_access("tokenizer", place, names)
    else:
        _check_tokenizer_files(folder, place, names)


def read_checkpoint(path: Path, key: str = "weights") -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, or of a torch.save file, bare or under "state_dict". Runs no code from it.

    key: the knob that names the file, for errors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError):
        raise ValueError(f"{key} {str(path)!r}: not a checkpoint of plain tensors, the only kind that is read") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{key} {str(path)!r}: not a mapping of names to tensors")
    return found


def check_keys(path: Path, found: Mapping[str, Tensor], needed: Mapping[str, Sequence[int]], model: str) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors of these names and shapes.

    needed: {key: shape}.
    """
    if missing := sorted(set(needed) - set(found)):
        raise ValueError(f"weights {str(path)!r}: {len(missing)} of {model}'s tensors are missing, for example {missing[0]}")
    if unexpected := sorted(set(found) - set(needed)):
        raise ValueError(f"weights {str(path)!r}: {len(unexpected)} tensors are not {model}'s, for example {unexpected[0]}")
    for key, shape in needed.items():
        if tuple(found[key].shape) != tuple(shape):
            raise ValueError(f"weights {str(path)!r}: {key} is {list(found[key].shape)}, where {model} has {list(shape)}")


def _local(key: str, place: str) -> Path | None:
    """The file or folder, or None for a hub id."""
    if (path := Path(place).expanduser()).exists():
        return path
    if is_hub_id(place) and path.suffix not in SUFFIXES:
        return None
    raise ValueError(f"{key} {place!r}: no such file or folder; allowed: a local one or a hub id owner/name")


def _local_file(key: str, place: str, name: str) -> Path | None:
    """The file, or None for a hub id."""
    if (path := _local(key, place)) is None or path.is_file():
        return path
    if not (path / name).is_file():
        raise ValueError(f"{key} {place!r}: no {name} in this folder")
    return path / name


def _check_model_files(folder: Path, weights: str, model_type: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: not a transformers model folder (no config.json)")
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != model_type:
        raise ValueError(f"weights {weights!r}: model_type in config.json is {found!r}; allowed: {model_type!r}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors file, the only format that is read")


def _check_tokenizer_files(folder: Path, place: str, names: Sequence[str]) -> None:
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"tokenizer {place!r}: not a folder of this tokenizer (no {' or '.join(names)})")


def _check_access(key: str, hub_id: str, names: Sequence[str]) -> None:
    """names: the model counts as downloaded if any of these files is in the cache."""
    with hub_errors(hub_id, key):
        ask_for_access(hub_id, *names)


def _download(key: str, hub_id: str, names: Sequence[str], patterns: Sequence[str]) -> Path:
    """The folder of the model's files that match the patterns."""
    from huggingface_hub import snapshot_download

    _check_access(key, hub_id, names)
    with hub_errors(hub_id, key):
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
