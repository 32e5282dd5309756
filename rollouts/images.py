"""Real images with captions: the sources that have some, and the `Source` that hands their latents to a learner.

| `prompts.train`                     | an image is                  | its caption                                     |
| ----------------------------------- | ---------------------------- | ----------------------------------------------- |
| `embedded:glyphs/train`             | a render of the caption      | the line                                        |
| FOLDER, with folders inside         | a file                       | NAME.txt beside it; or `text` in metadata.jsonl |
| FILE.tar, FOLDER of .tar files      | KEY.jpg, .png, .webp ...     | KEY.txt, or `text` in KEY.json                  |
| FILE.parquet, `save_to_disk` folder | in the first column of images that has one | `text`, or else `prompt`          |
| `hf:[OWNER/]NAME[:SPLIT][:COLUMN]`  | the same                     | COLUMN, or as above                             |

metadata.jsonl is that of Hugging Face's imagefolder: a line {"file_name": ..., "text": ...} for each file.

Axes: B images.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.protocols import Generator
from diffusion.types import Drawn, Group, Plan, Prompt, Rollout, Trajectory
from inputs.images import SUFFIXES, ImageError, read_image
from rollouts import tables
from rollouts.records import RecordStore, key_of
from worlds import glyphs

METADATA = "metadata.jsonl"


class ImageSet(Protocol):
    """The images of a prompt set."""

    def __call__(self, prompt: Prompt) -> tuple[str, bytes]:
        """A name for errors, and the content of the image file of this prompt, one of the set's. Raises ImageError."""
        ...


def open_images(source: str, prompts: Sequence[Prompt]) -> ImageSet:
    """The images of a source that `read_prompts` has read. Raises ValueError for a source without images."""
    path = Path(source).expanduser()
    if source.startswith("embedded:glyphs/"):
        return rendered
    if is_image_folder(path):
        return FolderImages(path)
    if source.startswith("hf:"):
        name, split, _ = tables.hub_source(source)
        table = tables.hub_dataset(source, name, split)
    elif tables.is_web_dataset(path):
        table = tables.web_dataset(source, path)
    elif tables.is_saved_dataset(path):
        table = tables.saved_dataset(source, path)
    elif path.suffix == ".parquet":
        from datasets import Dataset

        table = Dataset.from_parquet(str(path))
    else:
        raise ValueError(
            f"prompts {source}: has no images, only texts (allowed: a folder of images, a WebDataset (.tar), a "
            "data set with a column of images, embedded:glyphs/train)"
        )
    return TableImages(source, table, prompts)


def rendered(prompt: Prompt) -> tuple[str, bytes]:
    """The glyph world's render of a caption, always the same one for a line; as a PNG file."""
    image = glyphs.render([glyphs.parse(prompt.text)], seed=int(prompt.id))[0]
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return f"of {prompt.text!r}", file.getvalue()


class FolderImages:
    """Files below a folder; a prompt's id is its file's path there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, prompt: Prompt) -> tuple[str, bytes]:
        file = self.folder / prompt.id
        try:
            return str(file), file.read_bytes()
        except OSError as error:
            raise ImageError(f"image {file}: {error.strerror}") from None


class TableImages:
    """The images of a data set: of each row, that of the first image column that has one."""

    def __init__(self, source: str, table: Any, prompts: Sequence[Prompt]) -> None:
        """prompts: of the same source, in its order, one for each row."""
        from datasets import Image

        self.source, self.columns = source, tables.image_columns(table)
        if not self.columns:
            raise ValueError(f"prompts {source}: has no column of images (columns: {', '.join(table.column_names)})")
        self.table = table.select_columns(self.columns)
        for column in self.columns:
            self.table = self.table.cast_column(column, Image(decode=False))
        self.rows = {prompt.id: row for row, prompt in enumerate(prompts)}

    def __call__(self, prompt: Prompt) -> tuple[str, bytes]:
        row = self.rows[prompt.id]
        name = f"{self.source}, row {row + 1}"
        value = next((value for value in self.table[row].values() if value is not None), None)
        if value is None:
            raise ImageError(f"image {name}: there is none in column {' or '.join(self.columns)}")
        if value["bytes"] is not None:
            return name, value["bytes"]
        try:
            return name, Path(value["path"]).read_bytes()
        except OSError as error:
            raise ImageError(f"image {name}: {value['path']}: {error.strerror}") from None


def is_image_folder(path: Path) -> bool:
    """A folder of images, not one of a data set."""
    if not path.is_dir() or tables.is_saved_dataset(path) or tables.is_web_dataset(path):
        return False
    return (path / METADATA).is_file() or next(_image_files(path), None) is not None


def folder_rows(source: str, folder: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of a folder as a prompt set: (number, {id: path below the folder, text, ...}), in the order of the paths.

    Raises ValueError for a file without a caption, and a line of the metadata without a file.
    """
    metadata = _metadata(source, folder)
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, file in enumerate(sorted(_image_files(folder)), 1):
        name, beside = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
        if name in metadata:
            row = metadata.pop(name)
        elif beside.is_file():
            row = {"text": " ".join(beside.read_text(encoding="utf-8", errors="replace").split())}
        else:
            raise ValueError(f"prompts {source}: {name} has no caption, neither in {METADATA} nor in {beside.name} beside it")
        rows.append((number, {**row, "id": name}))
    if metadata:
        raise ValueError(f"prompts {source}, {METADATA}: {min(metadata)} is not in the folder, or is no image")
    return rows


def _metadata(source: str, folder: Path) -> dict[str, dict[str, Any]]:
    """{path below the folder: the other columns}"""
    file, found = folder / METADATA, {}
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row.pop("file_name")
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"prompts {source}, {METADATA}, line {number}: not a JSON object with file_name: {line}"
                ) from None
            found[Path(name).as_posix()] = row
    return found


def _image_files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


class Images:
    """The `Source` of plans whose source is images: latents of real images as trajectories of one state, at t = 0.

    Each image is cropped at its centre to the model's aspect ratio, resized, and encoded by itself, so that its latents do not
    depend on the rest of a batch. With a store it is encoded once.
    """

    def __init__(
        self,
        generator: Generator,
        images: ImageSet,
        size: tuple[int, int],
        store: RecordStore | None,
        identity: Mapping[str, Any],
    ) -> None:
        """size: (height, width) in pixels. identity: of the autoencoder, as JSON values; part of the keys in the store."""
        self.generator = generator
        self.images = images
        self.size = size
        self.store = store
        self.identity = {"kind": "image", "size": list(size), **identity}

    @torch.no_grad()
    def take(self, groups: Sequence[Group], plan: Plan) -> Drawn:
        """One image for each group -> its latents; no network evaluation. Raises ImageError for a file that cannot be read."""
        assert plan.source == "images", "other plans have other sources"
        assert plan.group_size == 1, "a real image is one sample"
        assert not plan.scored, "a real image is not scored"
        files = [self.images(group.prompt) for group in groups]
        keys = [key_of({**self.identity, "sha256": hashlib.sha256(data).hexdigest()}) for _, data in files]
        found = {} if self.store is None else self.store.read(keys)
        new: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for key, group, (name, data) in zip(keys, groups, files, strict=True):
            if key not in found:
                image = fitted(read_image(data, name), self.size).to(self.generator.device)
                found[key] = {"x": self.generator.encode_images(image[None])[0].cpu()}
                new[key] = found[key], {"prompt": group.prompt.text, "image": name, **self.identity}
        if new and self.store is not None:
            self.store.write(new)
        rollout = Rollout(
            prompts=[group.prompt for group in groups],
            condition=self.generator.encode([group.prompt.text for group in groups]),
            group=torch.arange(len(groups)),
            seeds=torch.tensor([seed for group in groups for seed in group.seeds]),
            trajectory=Trajectory(torch.stack([found[key]["x"] for key in keys])[:, None], torch.zeros(1, dtype=torch.float64)),
        )
        return Drawn(rollout.to(self.generator.device), None, nfe=0)


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image of any size -> [3, height, width] float32 in [0, 1]: the largest centred part of this aspect ratio."""
    height, width = size
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
