"""What learner processes that share one update exchange. Each rank is a complete learner on its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    def total(self, rows: int) -> int:
        """The rows of all ranks together, from the rows of this one: the denominator of the mean."""
        ...

    def passes(self, number: int) -> int:
        """The largest number of micro-batches of any rank; a rank with fewer repeats its last one with weight 0."""
        ...

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the ranks, in place."""
        ...


class OneRank:
    """One process."""

    def total(self, rows: int) -> int:
        return rows

    def passes(self, number: int) -> int:
        return number

    def add(self, gradients: Sequence[Tensor]) -> None:
        """The sum over one rank."""
