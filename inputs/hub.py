"""Models on the Hugging Face hub by their id, and every way the hub can fail in one line. Every error is a ValueError."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(place: str) -> bool:
    """Whether it is spelled like a hub id, owner/name."""
    return HUB_ID.fullmatch(place) is not None


def is_on_hub(place: str) -> bool:
    """Whether it is a hub id, and no local file or folder."""
    return not Path(place).expanduser().exists() and is_hub_id(place)


def hub_revision(hub_id: str) -> str:
    """The commit that loading a model gets: the hub's newest, or the cached one where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.file_download import repo_folder_name

    with hub_errors(hub_id):
        try:
            return str(HfApi().model_info(hub_id, timeout=10).sha)
        except (errors.HTTPError, ConnectionError):  # no network, or HF_HUB_OFFLINE is set
            head = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=hub_id, repo_type="model"), "refs", "main")
            if not head.is_file():
                raise
            return head.read_text().strip()


def ask_for_access(hub_id: str, *files: str) -> None:
    """Ask the hub once whether a model may be downloaded, unless one of the files is in the cache.

    The download alone would retry for half a minute without network.
    """
    from huggingface_hub import auth_check, try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files):
        auth_check(hub_id)


@contextmanager
def hub_errors(hub_id: str, key: str = "weights") -> Iterator[None]:
    """Errors of huggingface_hub inside the block as ValueErrors of one line. key: what names the model in an experiment."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        problem = f"is gated: accept its licence at https://huggingface.co/{hub_id} and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "is neither a local folder nor found on the hub; if it is private, log in with `hf auth login`"
    except errors.RemoteEntryNotFoundError as error:
        problem = f"lacks a file on the hub: {str(error).splitlines()[0]}"
    except errors.HfHubHTTPError as error:
        problem = f"cannot be read from the hub: {str(error).splitlines()[0]}"
    except (errors.HTTPError, ConnectionError, errors.LocalEntryNotFoundError):
        problem = (
            "is not a local folder, not in the cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
        )
    else:
        return
    raise ValueError(f"{key} {hub_id!r}: it {problem}")
