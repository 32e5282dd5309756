"""Model families: what differs between SD3 and the next one, a folder each. What they share is in generators/.

family.py      the record of a family, and the sizes of its latents
generator.py   what a loaded generator offers to generators/ itself
sd3/           Stable Diffusion 3 and 3.5: the record (light), and the pipeline (diffusers)

A new family is a folder whose `__init__` makes a `Family`, and a row of FAMILIES. Importing this package imports neither torch
nor diffusers; a family's `load` does.
"""

from generators.families.family import Family
from generators.families.sd3 import SD3

FAMILIES: dict[str, Family] = {family.name: family for family in (SD3,)}
DEFAULT = SD3.name
"""The family of the embedded teacher."""

__all__ = ["DEFAULT", "FAMILIES", "Family"]
