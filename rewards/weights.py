"""`weights:` of a scorer to a local folder, with one clear line for each way it can go wrong. Every error is a ValueError."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = ("*.json", "*.txt", "*.safetensors")
"""What is downloaded of a model: no pickles, which could run code."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_folder(weights: str, model_type: str) -> Path:
    """The local folder of a transformers model in safetensors; a hub id is downloaded unless it is in the cache.

    weights: a local folder or a hub id.
    model_type: what the folder's config.json must say it is.
    """
    local = Path(weights).expanduser()
    if local.exists():
        folder = local
    elif _HUB_ID.fullmatch(weights):
        folder = _download(weights)
    else:
        raise ValueError(f"weights {weights!r}: there is no such folder; allowed are a local folder or a hub id owner/name")
    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: no config.json there, so it is no transformers model folder")
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != model_type:
        raise ValueError(f"weights {weights!r}: its config.json says model_type {found!r}, where {model_type!r} is needed")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors there, the only format that is read")
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import auth_check, snapshot_download, try_to_load_from_cache

    with _hub_errors(hub_id):
        if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            # Asked once, because the download alone would retry for half a minute when there is no network.
            auth_check(hub_id)
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES), ignore_patterns=["*/*"]))


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
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
