"""An adapter's weights as one flat buffer with a manifest and a digest, the form in which processes exchange them.

One buffer is several times faster to publish and apply than a dictionary of tensors. The receiver checks the manifest against
its own adapter and the digest against the bytes, because a wrongly loaded adapter fails silently: with zeros or with half of
the layers, images still look plausible.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """The place of one tensor in the buffer."""

    key: str
    shape: tuple[int, ...]
    offset: int
    """In elements, not bytes."""


Manifest = tuple[Entry, ...]


@dataclass(frozen=True)
class AdapterWeights:
    buffer: Tensor
    """[N] on the CPU, contiguous, in the adapter's own dtype"""
    manifest: Manifest
    """In the order of the buffer, without gaps."""
    alpha: float
    """Not a weight, but the same weights with another alpha make another adapter."""
    digest: str
    """sha256 of everything above, hexadecimal."""

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], alpha: float) -> AdapterWeights:
        """A copy of the tensors, which share a dtype, in their order."""
        buffer = torch.cat([tensor.detach().flatten() for tensor in tensors.values()]).cpu()
        manifest = manifest_of(tensors)
        return AdapterWeights(buffer, manifest, alpha, digest_of(buffer, manifest, alpha))

    def tensors(self) -> dict[str, Tensor]:
        """Views into the buffer by key."""
        sizes = [torch.Size(entry.shape).numel() for entry in self.manifest]
        parts = self.buffer.split(sizes)
        return {entry.key: part.view(entry.shape) for entry, part in zip(self.manifest, parts, strict=True)}

    def check_for(self, manifest: Manifest, alpha: float, dtype: torch.dtype) -> None:
        """Raises ValueError unless these are undamaged weights of an adapter with this manifest, alpha and dtype."""
        if self.manifest != manifest:
            theirs, ours = ({entry.key: entry.shape for entry in entries} for entries in (self.manifest, manifest))
            raise ValueError(f"weights of another adapter: {difference(theirs, ours) or 'the order differs'}")
        if self.alpha != alpha or self.buffer.dtype != dtype:
            raise ValueError(
                f"weights of another adapter: alpha {self.alpha} in {self.buffer.dtype}, expected alpha {alpha} in {dtype}"
            )
        if (digest := digest_of(self.buffer, manifest, alpha)) != self.digest:
            raise ValueError(f"damaged weights: digest {digest[:12]}..., expected {self.digest[:12]}...")


def manifest_of(tensors: Mapping[str, Tensor]) -> Manifest:
    entries, offset = [], 0
    for key, tensor in tensors.items():
        entries.append(Entry(key, tuple(tensor.shape), offset))
        offset += tensor.numel()
    return tuple(entries)


def digest_of(buffer: Tensor, manifest: Manifest, alpha: float) -> str:
    digest = hashlib.sha256(json.dumps([float(alpha), str(buffer.dtype), manifest]).encode())
    digest.update(buffer.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """How {key: shape} differs from the expected one, with the first keys of each kind; "" if only the order may differ."""
    common = [key for key in shapes if key in expected and shapes[key] != expected[key]]
    kinds = {
        "unexpected": [key for key in shapes if key not in expected],
        "missing": [key for key in expected if key not in shapes],
        "of another shape": [f"{key} {shapes[key]}, expected {expected[key]}" for key in common],
    }
    parts = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' * (len(keys) > 3)})" for kind, keys in kinds.items() if keys]
    return "; ".join(parts)
