"""What is known of a model family before any of its weights is loaded. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generators.families.generator import PipelineGenerator

Configs = Mapping[str, Mapping[str, Any]]
"""{pipeline component: its config}"""


@dataclass(frozen=True)
class Geometry:
    """The sizes of an image: in pixels, of its latents, and in tokens of the network."""

    channels: int
    factor: int
    """Pixels per side of a latent."""
    patch: int
    """Latents per side of a token."""
    default: int
    """Pixels per side of the images that the model was made for."""
    limit: int
    """Pixels per side of the largest image."""

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image in pixels; None is the default size.

        Raises ValueError for a size that the patches do not cover or that exceeds the limit.
        """
        step = self.factor * self.patch
        size = {"height": self.default if height is None else height, "width": self.default if width is None else width}
        for side, pixels in size.items():
            if pixels % step or not 0 < pixels <= self.limit:
                raise ValueError(f"{side} {pixels}: not allowed here (allowed: multiples of {step} up to {self.limit})")
        return self.channels, size["height"] // self.factor, size["width"] // self.factor

    def tokens(self, height: int | None = None, width: int | None = None) -> int:
        """The number of image tokens of the network for an image in pixels. Raises ValueError as `latent_shape` does."""
        _, h, w = self.latent_shape(height, width)
        return (h // self.patch) * (w // self.patch)


@dataclass(frozen=True)
class Family:
    """One model family; the generators of a family differ in weights and sizes only."""

    name: str
    """As `family:` of an experiment names it."""
    pipeline: str
    """Its diffusers pipeline, the `_class_name` of a model_index.json."""
    network: str
    """The pipeline's component that predicts and carries the adapters, e.g. "transformer"."""
    short_names: Mapping[str, str]
    """{word allowed in `targets`: pattern of layer names}"""
    keys: Mapping[str, Sequence[str]]
    """{component: keys of its config that `geometry` reads}"""
    geometry: Callable[[Configs], Geometry]
    """The sizes, from the configs of the components in `keys`."""
    check_grid: Callable[[Mapping[str, Any], float | None, bool], None]
    """(scheduler config, shift, even): raises ValueError for options of `time_grid` that the scheduler does not support."""
    load: Callable[..., PipelineGenerator]
    """(local folder, *, dtype, device, gradient_checkpointing, options of the family)"""
    optional: Mapping[str, Sequence[str]]
    """{option of `load`: components that are neither downloaded nor loaded where it is False}"""


def check_shift(scheduler: Mapping[str, Any], shift: float | None, even: bool) -> None:
    """The `check_grid` of families whose scheduler may have a shift.

    Raises ValueError for a shift where the scheduler has none, and for even times where the scheduler does not accept times.
    """
    kind = scheduler.get("_class_name", "scheduler")
    if shift is not None and "shift" not in scheduler:
        raise ValueError(f"shift {shift}: a {kind} has no shift (allowed: null)")
    if even and kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"spacing 'even': a {kind} does not accept times (allowed: scheduler)")
