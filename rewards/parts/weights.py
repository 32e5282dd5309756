"""`weights:` of a scorer to a local folder, with one clear line for each way it can go wrong. Every error is a ValueError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ("*.json", "*.txt", "*.safetensors")
"""What is downloaded of a model: no pickles, which could run code."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_folder(weights: str, model_type: str) -> Path:
    """The local folder of a transformers model in safetensors; a hub id is downloaded unless it is in the cache.

    weights: a local folder or a hub id.
    model_type: what the folder's config.json must say it is.
    """
    if (folder := _local(weights)) is None:
        _check_hub(weights)
        from huggingface_hub import snapshot_download

        with hub_errors(weights):
            folder = Path(snapshot_download(weights, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    _check_folder(folder, weights, model_type)
    return folder


def check_model(weights: str, model_type: str) -> None:
    """Would `model_folder` find it? Downloads nothing: the hub is only asked whether it may be had."""
    if (folder := _local(weights)) is None:
        _check_hub(weights)
    else:
        _check_folder(folder, weights, model_type)


def _check_hub(hub_id: str) -> None:
    """A model that is not in the cache is asked for once; the download alone would retry for half a minute without network."""
    from huggingface_hub import auth_check, try_to_load_from_cache

    with hub_errors(hub_id):
        if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            auth_check(hub_id)


def is_on_hub(place: str) -> bool:
    """Is it a hub id, and no local file or folder?"""
    return not Path(place).expanduser().exists() and HUB_ID.fullmatch(place) is not None


def hub_revision(hub_id: str) -> str:
    """The commit of a model that loading it gets: the hub's newest, or the cached one where the hub cannot be asked."""
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.file_download import repo_folder_name

    with hub_errors(hub_id):
        try:
            return str(HfApi().model_info(hub_id, timeout=10).sha)
        except (errors.HTTPError, ConnectionError):  # no network, or told to stay offline
            head = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="model"), "refs", "main")
            if not head.is_file():
                raise
            return head.read_text().strip()


def _local(weights: str) -> Path | None:
    """The folder, or None for a hub id."""
    if (local := Path(weights).expanduser()).exists():
        return local
    if HUB_ID.fullmatch(weights):
        return None
    raise ValueError(f"weights {weights!r}: there is no such folder; allowed are a local folder or a hub id owner/name")


def _check_folder(folder: Path, weights: str, model_type: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: no config.json there, so it is no transformers model folder")
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != model_type:
        raise ValueError(f"weights {weights!r}: its config.json says model_type {found!r}, where {model_type!r} is needed")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors there, the only format that is read")


@contextmanager
def hub_errors(hub_id: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        problem = f"is gated: accept its licence at https://huggingface.co/{hub_id} and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "is neither a local folder nor found on the hub; if it is private, log in with `hf auth login`"
    except errors.HfHubHTTPError as error:
        problem = f"cannot be read from the hub: {str(error).splitlines()[0]}"
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError):
        problem = "is no local folder, not in the cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    else:
        return
    raise ValueError(f"weights {hub_id!r}: it {problem}")
