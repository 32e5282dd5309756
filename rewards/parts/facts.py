"""What is known of a scorer's class before the scorer is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffusion.types import About


@dataclass(frozen=True)
class Facts:
    """The class attribute `facts` of every scorer."""

    differentiable: bool
    """Whether a gradient reaches the images."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest score possible."""
    licence: str = "Odeon's"
    """Of the code and weights that make the score."""
    packages: Sequence[str] = ()
    """Modules it needs beyond the core dependencies; `make rewards` installs them."""
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """{knob: file names}: which files of the knob's default hub id are read, where the usual names do not say it."""

    def about(self, label: str) -> About:
        """What a scorer with these facts states about itself."""
        return About(label, self.differentiable, self.bounds)
