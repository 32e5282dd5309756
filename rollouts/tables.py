"""Data sets of Hugging Face's `datasets`, as prompt sets and image sets read them: saved folders, the hub, WebDatasets.

A WebDataset is one or more .tar files, in which the files KEY.jpg and KEY.txt (or KEY.json) are an image and its caption.
`datasets` keeps a copy of a WebDataset, of a Parquet file that is opened for its images, and of downloads in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inputs import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset

TAR = ".tar"
WEB_TEXT = "txt"
"""The column of a WebDataset that holds KEY.txt."""


def is_web_dataset(path: Path) -> bool:
    """A .tar file, or a folder with some."""
    return path.suffix == TAR if path.is_file() else path.is_dir() and any(path.glob(f"*{TAR}"))


def web_dataset(source: str, path: Path) -> Dataset:
    import tarfile

    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    files = [path] if path.is_file() else sorted(path.glob(f"*{TAR}"))
    if broken := [file for file in files if not tarfile.is_tarfile(file)]:
        raise ValueError(f"prompts {source}: {broken[0].name} is not a tar file, or damaged")
    try:
        return load_dataset("webdataset", data_files={"train": [str(file.absolute()) for file in files]}, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"prompts {source}: not a WebDataset: {str(cause).splitlines()[0]}") from None


def web_rows(table: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, columns) with those of KEY.json, and without the keys and paths of the archives, which may be moved."""
    for number, row in enumerate(without_media(table), 1):
        plain = {name: value for name, value in row.items() if not name.startswith("__") and name != "json"}
        yield number, {**plain, **(row.get("json") or {})}


def saved_dataset(source: str, path: Path) -> Dataset:
    """A folder written by `save_to_disk`."""
    from datasets import load_from_disk

    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(child.parent.name for child in path.glob("*/state.json")))
        raise ValueError(f"prompts {source}: contains several splits; choose the folder of one (allowed: {splits})")
    return load_from_disk(str(path))


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def hub_source(source: str) -> tuple[str, str, str | None]:
    """hf:[OWNER/]NAME[:SPLIT][:COLUMN] -> (name, split, column)"""
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"prompts {source}: not the name of a dataset (allowed: hf:[OWNER/]NAME[:SPLIT][:COLUMN])")
    split, column = [*rest, "", ""][:2]
    return name, split or "train", column or None


def hub_dataset(source: str, name: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        with hub_errors(f"datasets/{name}", key="hub repository"):
            return load_dataset(name, split=split)
    except DatasetNotFoundError:
        problem = "not found on the hub; if it is private, log in with `hf auth login`"
    except ValueError as error:  # of the hub; or an unknown split, or one of several configurations has to be chosen
        problem = str(error).splitlines()[0]
    raise ValueError(f"prompts {source}: {problem}")


def image_columns(table: Dataset) -> list[str]:
    """The columns that hold images: the declared ones, and bytes with a path, as Parquet files from elsewhere have them."""
    from datasets import Image

    return [
        name
        for name, feature in table.features.items()
        if isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())
    ]


def without_media(table: Dataset) -> Dataset:
    """The table without columns of images, audio and bytes, which are no part of a prompt and would be decoded row by row."""
    from datasets import Audio, Image, Value, Video

    heavy = {
        name
        for name, feature in table.features.items()
        if isinstance(feature, (Image, Audio, Video))
        or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary"))
    }
    return table.remove_columns(sorted({*heavy, *image_columns(table)}))
