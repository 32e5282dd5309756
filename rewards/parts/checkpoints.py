"""Single files and tokenizers that a scorer's knobs name: found, downloaded, read. Every error is a ValueError of one line.

A *place* is a local file, a local folder, or a hub id owner/name; in the last two the scorer knows the file's name.
`weights.py` does the same for whole transformers folders.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.parts.weights import HUB_ID, hub_errors

SUFFIXES = (".pt", ".pth", ".safetensors", ".json")
"""A place that ends like this is meant as a file, and never asked for on the hub."""


def local_file(key: str, place: str, name: str) -> Path:
    """The file `name` of a place, or the file that the place is; from the hub unless it is in the cache.

    key: the knob that says the place, as errors name it.
    """
    if (path := _local_file(key, place, name)) is not None:
        return path
    from huggingface_hub import hf_hub_download

    _check_hub(key, place, [name])
    with _blamed(key, place):
        return Path(hf_hub_download(place, name))


def check_file(key: str, place: str, name: str) -> None:
    """Would `local_file` find it? Downloads nothing: the hub is only asked whether it may be had."""
    if _local_file(key, place, name) is None:
        _check_hub(key, place, [name])


def tokenizer_folder(place: str, names: Sequence[str]) -> Path:
    """The local folder of a transformers tokenizer; from the hub, only its text files are downloaded.

    names: any of these files makes it one.
    """
    if (folder := _local_tokenizer(place, names)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    _check_hub("tokenizer", place, names)
    with _blamed("tokenizer", place):
        folder = Path(snapshot_download(place, allow_patterns=[*names, "merges.txt", "tokenizer_config.json"]))
    _check_tokenizer_files(folder, place, names)
    return folder


def check_tokenizer(place: str, names: Sequence[str]) -> None:
    """Would `tokenizer_folder` find it? Downloads nothing."""
    if _local_tokenizer(place, names) is None:
        _check_hub("tokenizer", place, names)


def read_checkpoint(path: Path, key: str = "weights") -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, or of a torch.save file, bare or under "state_dict". Runs no code from it.

    key: the knob that says the file, as errors name it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError):
        raise ValueError(f"{key} {str(path)!r}: no checkpoint of plain tensors, the only kind that is read") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{key} {str(path)!r}: holds no tensors by name")
    return found


def check_keys(path: Path, found: Mapping[str, Tensor], needed: Mapping[str, Sequence[int]], model: str) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors of these names and shapes.

    needed: {key: shape}.
    """
    if missing := sorted(set(needed) - set(found)):
        raise ValueError(f"weights {str(path)!r}: lack {len(missing)} of {model}'s tensors, for example {missing[0]}")
    if unexpected := sorted(set(found) - set(needed)):
        raise ValueError(f"weights {str(path)!r}: {len(unexpected)} tensors are not {model}'s, for example {unexpected[0]}")
    for key, shape in needed.items():
        if tuple(found[key].shape) != tuple(shape):
            raise ValueError(f"weights {str(path)!r}: {key} is {list(found[key].shape)}, where {model} has {list(shape)}")


def _local_file(key: str, place: str, name: str) -> Path | None:
    """The file, or None for a hub id."""
    if (path := _local(key, place)) is None or path.is_file():
        return path
    if not (path / name).is_file():
        raise ValueError(f"{key} {place!r}: no {name} in this folder")
    return path / name


def _local_tokenizer(place: str, names: Sequence[str]) -> Path | None:
    if (folder := _local("tokenizer", place)) is not None:
        _check_tokenizer_files(folder, place, names)
    return folder


def _local(key: str, place: str) -> Path | None:
    """The file or folder, or None for a hub id."""
    if (path := Path(place).expanduser()).exists():
        return path
    if HUB_ID.fullmatch(place) and path.suffix not in SUFFIXES:
        return None
    raise ValueError(f"{key} {place!r}: there is no such file or folder; allowed are a local one or a hub id owner/name")


def _check_tokenizer_files(folder: Path, place: str, names: Sequence[str]) -> None:
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"tokenizer {place!r}: no {' or '.join(names)} there, so it is no folder of the tokenizer")


def _check_hub(key: str, hub_id: str, names: Sequence[str]) -> None:
    """Is one of the files in the cache, or the hub willing? Without network a download alone would retry for half a minute."""
    from huggingface_hub import auth_check, try_to_load_from_cache

    with _blamed(key, hub_id):
        if not any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names):
            auth_check(hub_id)


@contextmanager
def _blamed(key: str, hub_id: str) -> Iterator[None]:
    """What the hub says about `weights`, said about this knob."""
    try:
        with hub_errors(hub_id):
            yield
    except ValueError as error:
        raise ValueError(str(error).replace("weights", key, 1)) from None
