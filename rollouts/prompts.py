"""Prompt sets, and the prompts of each step.

| source                             | one prompt is | its text                        |
| ---------------------------------- | ------------- | ------------------------------- |
| `embedded:glyphs/train`            | a line        | the line                        |
| `FILE.txt`                         | a line        | the line                        |
| `FILE.jsonl`, `FILE.parquet`       | a line, a row | `text`, or else `prompt`        |
| `FOLDER`, saved by `save_to_disk`  | a row         | `text`, or else `prompt`        |
| `FOLDER` of images                 | an image      | its caption; see images.py      |
| `FILE.tar`, `FOLDER` of .tar files | an image      | its caption; see images.py      |
| `hf:[OWNER/]NAME[:SPLIT][:COLUMN]` | a row         | COLUMN, or as above; of `train` |

A column `id` gives the ids, as strings; without it, ids are the numbers of lines or rows, from 1, which do not change when
lines are added at the end; in a folder of images they are the files' paths. All other columns become `meta`, except images and
bytes. Blank lines are counted and skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.types import Prompt
from inputs import nearest
from rollouts import tables
from rollouts.images import folder_rows, is_image_folder
from worlds import glyphs

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

TEXT_COLUMNS = ("text", "prompt")
EMBEDDED = {f"glyphs/{name}": name for name in glyphs.PROMPT_SETS}

Rows = Iterable[tuple[int, Mapping[str, Any]]]
"""(number of a line or row, from 1; its columns)"""


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a source, in its order. See the table above.

    Raises ValueError, with the source and the line, for a source that cannot be read, is empty, has no text or a repeated id.
    """
    rows, columns = _open(source)
    unit = "line" if source.endswith((".txt", ".jsonl")) else "row"
    prompts: dict[str, Prompt] = {}
    for number, row in rows:
        where = f"prompts {source}, {unit} {number}"
        prompt = _prompt(number, row, columns, where)
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} is already that of an earlier prompt")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"prompts {source}: contains no prompt")
    return list(prompts.values())


def prompts_of_step(prompts: Sequence[Prompt], step: int, number: int, seed: int) -> list[Prompt]:
    """The prompts of step 1, 2, ...: the next `number` of an endless sequence, in which every pass through the set is shuffled.

    A pure function, so no state is saved or restored. A prompt may occur twice in a step in which one pass ends and the next
    begins.
    """
    places = range((step - 1) * number, step * number)
    passes = {place // len(prompts) for place in places}
    order = {one: np.random.default_rng([seed, one]).permutation(len(prompts)) for one in passes}
    return [prompts[order[place // len(prompts)][place % len(prompts)]] for place in places]


def passes_of_step(prompts: Sequence[Prompt], step: int, number: int) -> list[int]:
    """The pass through the set, 0, 1, ..., to which each of the prompts of `prompts_of_step` belongs."""
    return [place // len(prompts) for place in range((step - 1) * number, step * number)]


def _prompt(number: int, row: Mapping[str, Any], columns: Sequence[str], where: str) -> Prompt:
    column = next((name for name in columns if name in row), None)
    if column is None:
        raise ValueError(f"{where}: no column {' or '.join(columns)} (columns: {', '.join(row) or 'none'})")
    text, key = row[column], row.get("id", number)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {column} {text!r} is not a text")
    if not isinstance(key, (str, int)):
        raise ValueError(f"{where}: id {key!r} is neither a string nor an integer")
    return Prompt(str(key), text, {name: value for name, value in row.items() if name not in (column, "id")})


def _open(source: str) -> tuple[Rows, Sequence[str]]:
    """A source's rows, and the columns that may contain the text."""
    if source.startswith("embedded:"):
        return _embedded(source), TEXT_COLUMNS
    if source.startswith("hf:"):
        name, split, column = tables.hub_source(source)
        return _rows(tables.hub_dataset(source, name, split)), (column,) if column else TEXT_COLUMNS
    path = Path(source).expanduser()
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
    if is_image_folder(path):
        return folder_rows(source, path), TEXT_COLUMNS
    if tables.is_web_dataset(path):
        return tables.web_rows(tables.web_dataset(source, path)), (tables.WEB_TEXT, *TEXT_COLUMNS)
    if tables.is_saved_dataset(path):
        return _rows(tables.saved_dataset(source, path)), TEXT_COLUMNS
    if path.is_file() and path.suffix in readers:
        return readers[path.suffix](source, path), TEXT_COLUMNS
    problem = "there is no such file or folder"
    if path.is_file():
        problem = "unknown file format"
    elif path.is_dir():
        problem = "the folder has neither images nor a data set"
    raise ValueError(
        f"prompts {source}: {problem} (allowed: {', '.join(readers)} files, a folder of images with captions, a WebDataset "
        "(.tar), a folder written by datasets' save_to_disk, hf:[OWNER/]NAME[:SPLIT][:COLUMN], "
        f"{', '.join('embedded:' + name for name in EMBEDDED)})"
    )


def _rows(table: Dataset) -> Rows:
    """Without images and other media, which would be decoded and become part of `meta`."""
    return enumerate(tables.without_media(table), 1)


def _embedded(source: str) -> Rows:
    name = source.removeprefix("embedded:")
    if name not in EMBEDDED:
        raise ValueError(f"prompts {source}: no such embedded prompt set{nearest(name, EMBEDDED)}")
    return [(number, {"text": text}) for number, text in enumerate(glyphs.read_prompts(EMBEDDED[name]), 1)]


def _text(source: str, path: Path) -> Rows:
    return [(number, {"text": line}) for number, line in _lines(source, path)]


def _jsonl(source: str, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in _lines(source, path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts {source}, line {number}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(f"prompts {source}, line {number}: not a JSON object: {line}")
        yield number, row


def _lines(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank; only a line feed ends a line: JSON strings may contain Unicode's other separators."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {source}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _parquet(source: str, path: Path) -> Rows:
    """Without columns of bytes, which images are and prompts are not."""
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        table = parquet.read_table(path, columns=[field.name for field in schema if not _has_bytes(field.type)])
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"prompts {source}: not a Parquet file: {str(error).splitlines()[0]}") from None
    return enumerate(table.to_pylist(), 1)


def _has_bytes(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    return types.is_binary(kind) or types.is_large_binary(kind)
