"""A content-addressed store of tensors in a folder, which several processes and runs read and write at once.

A shard is a safetensors file NAME.safetensors with an index NAME.parquet beside it, one row for each record: its key, the
checksum of its tensors, and what it is. Both are written under a temporary name and renamed, the index last, so a shard without
an index does not exist for readers, and a process killed at any moment leaves at most files that nobody reads. Nothing is
changed in place and there are no locks: two writers of one key write the same content. Every read is checked; a damaged record
is missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

OPEN_SHARDS = 64
"""Shards kept open, each with a file descriptor and a memory map."""
LEFTOVER_AGE = 86400.0
"""Seconds after which a temporary file belongs to a process that no longer exists."""
FULL = (errno.ENOSPC, errno.EDQUOT)
SUFFIXES = (".safetensors", ".parquet")


@dataclass(frozen=True)
class Entry:
    """A row of an index."""

    key: str
    checksum: str
    about: Mapping[str, Any]
    """{kind, prompt, ...}: what the record is, for people; nothing depends on it"""
    shard: str
    """The shard's name, without suffix."""
    size: int
    """bytes of the record's tensors"""


class RecordStore:
    """{key: {name: tensor}} in a folder."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """limit: bytes at which the store takes no more records; None: no limit."""
        self.folder = folder
        self.limit = limit
        self._entries: dict[str, list[Entry]] = {}
        """All records of a key, since it may have been written twice or again after damage."""
        self._indices: set[str] = set()
        self._open: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._reported: set[str] = set()

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """The records that exist and are intact. Damaged ones are reported once on stderr, and can be written again."""
        if any(not self._entries.get(key) for key in keys):
            self._scan()
        found = {}
        for key in dict.fromkeys(keys):
            entries = self._entries.get(key, [])
            while entries and key not in found:
                tensors = self._tensors(entries[-1])
                if tensors is None or checksum(tensors) != entries[-1].checksum:
                    shard = entries.pop().shard
                    self._report(shard, f"{self.folder / shard}.safetensors: damaged; its records are drawn again")
                else:
                    found[key] = tensors
        return found

    def write(self, records: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> bool:
        """{key: (tensors, about)} as one new shard. Returns False if the store is at its limit or the disk is full.

        The reason is then printed once on stderr. Other errors of the file system are raised.
        """
        if self.limit is not None and (size := self._bytes()) >= self.limit:
            self._report("limit", f"{self.folder}: has {size:,} bytes, its limit (teacher.store_limit) is {self.limit:,}")
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        name = uuid.uuid4().hex
        tensors = {
            f"{key}/{part}": value.detach().cpu().contiguous()
            for key, (parts, _) in records.items()
            for part, value in parts.items()
        }
        entries = []
        for key, (parts, about) in records.items():
            own = {part: tensors[f"{key}/{part}"] for part in parts}
            entries.append(Entry(key, checksum(own), about, name, sum(value.nbytes for value in own.values())))
        try:
            with self._renamed(name, ".safetensors") as temporary:
                save_file(tensors, temporary)
            with self._renamed(name, ".parquet") as temporary:
                write_index(entries, temporary)
        except (OSError, SafetensorError) as error:
            with suppress(FileNotFoundError):
                (self.folder / f"{name}.safetensors").unlink()
            if not is_full(error):
                raise
            self._report("full", f"{self.folder}: the disk is full; trajectories are no longer stored")
            return False
        self._indices.add(f"{name}.parquet")
        self._add(entries)
        return True

    def entries(self) -> list[Entry]:
        """One for each key in the indices, damaged ones included."""
        self._scan()
        return [entries[-1] for entries in self._entries.values() if entries]

    def _bytes(self) -> int:
        sizes = 0
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # another process's temporary file
                    sizes += entry.stat().st_size
        return sizes

    def _scan(self) -> None:
        """Read the indices that are new."""
        if not self.folder.is_dir():
            return
        names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".parquet"))
        for name in names:
            if name in self._indices or name.startswith("."):
                continue
            self._indices.add(name)
            try:
                entries = read_index(self.folder / name)
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._report(name, f"{self.folder / name}: not an index of this store ({reason}); its records are drawn again")
                continue
            self._add(entries)

    def _add(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._entries.setdefault(entry.key, []).append(entry)

    def _tensors(self, entry: Entry) -> dict[str, Tensor] | None:
        """A record's tensors, copied out of the memory map; None where the shard is not readable or lacks it."""
        try:
            shard = self._shard(entry.shard)
            names = [name for name in shard.keys() if name.startswith(f"{entry.key}/")]  # noqa: SIM118
            return {name.removeprefix(f"{entry.key}/"): shard.get_tensor(name).clone() for name in names} or None
        except (OSError, SafetensorError):
            return None

    def _shard(self, name: str) -> Any:
        file = self.folder / f"{name}.safetensors"
        size = file.stat().st_size
        if name in self._open:
            opened, size_at_opening = self._open[name]
            if size != size_at_opening:  # reading beyond the end of a mapped file would end the process
                raise OSError(f"{file}: its size has changed")
            self._open.move_to_end(name)
            return opened
        opened = safe_open(file, framework="pt")
        self._open[name] = opened, size
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened

    @contextmanager
    def _renamed(self, name: str, suffix: str) -> Any:
        """A temporary file that gets its name when it is complete and on the disk."""
        temporary = self.folder / f".{name}{suffix}.{os.getpid()}.tmp"
        try:
            yield temporary
            os.chmod(temporary, 0o644)  # safetensors creates files that only their owner can read
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{name}{suffix}")
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for file in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > LEFTOVER_AGE:
                    file.unlink()

    def _report(self, what: str, message: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            print(f"odeon: {message}", file=sys.stderr)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_full(error: Exception) -> bool:
    """Whether the disk or quota is full; safetensors reports the system's error as text."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"os error {code}" in str(error) for code in FULL)


def write_index(entries: Sequence[Entry], file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"key": e.key, "checksum": e.checksum, "about": json.dumps(e.about), "shard": e.shard, "bytes": e.size} for e in entries
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def read_index(file: Path) -> list[Entry]:
    """Raises ValueError (pyarrow's errors are) or KeyError for a file that is not an index."""
    from pyarrow import parquet

    rows = parquet.read_table(file).to_pylist()
    return [Entry(row["key"], row["checksum"], json.loads(row["about"]), row["shard"], row["bytes"]) for row in rows]


def key_of(content: Mapping[str, Any]) -> str:
    """sha256 of the content as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
