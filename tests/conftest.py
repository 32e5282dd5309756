"""Before any test imports diffusers or transformers; see there."""

from rewards.parts.compat import ensure_torchvision

ensure_torchvision()
