"""Conversion of tensors for Ray's object store."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class _Stored:
    """A tensor as a numpy array, which Ray shares without copies; bfloat16, which numpy lacks, as int16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        plain = tensor.detach().cpu().contiguous()
        self.array: np.ndarray = (plain.view(torch.int16) if self.dtype == torch.bfloat16 else plain).numpy()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def tensor(self) -> Tensor:
        # A copy: the array is in the store's memory, which other processes read.
        tensor = torch.from_numpy(self.array.copy())
        return tensor.view(torch.bfloat16) if self.dtype == torch.bfloat16 else tensor


def to_store(value: Any) -> Any:
    """The value with its tensors as numpy arrays, recursively in dataclasses, dicts, lists and tuples."""
    return _mapped(value, Tensor, _Stored)


def from_store(value: Any) -> Any:
    """The inverse of `to_store`; its tensors are writable copies."""
    return _mapped(value, _Stored, _Stored.tensor)


def bytes_of(value: Any) -> int:
    """The bytes of a value's tensors, before or after `to_store`."""
    sizes: list[int] = []

    def add(tensor: Tensor | _Stored) -> Tensor | _Stored:
        sizes.append(tensor.nbytes if isinstance(tensor, Tensor) else tensor.array.nbytes)
        return tensor

    _mapped(value, (Tensor, _Stored), add)
    return sum(sizes)


def _mapped(value: Any, kind: type | tuple[type, ...], change: Any) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_mapped(item, kind, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), kind, change) for f in fields(value)})
    return value
