"""A generator's configs, sizes, and the names and shapes of its weights, read before it is loaded.

Imports neither torch nor diffusers, and neither reads nor downloads weights: names and shapes come from the headers of the
safetensors files. So mistakes in an experiment are found within moments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from generators.families import Family
from generators.families.family import Configs, Geometry

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""diffusers' names of a network's weights, and of the list of its files where there are several."""
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Outline:
    family: Family
    configs: Configs
    """Of the components that the family's geometry reads, and of the scheduler."""
    shapes: Mapping[str, tuple[int, ...]]
    """{tensor of the network: its shape}"""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """{layer: (inputs, outputs)}: `Adapters.linear` in another order. All matrices of a network are linear layers."""
        matrices = {name: shape for name, shape in self.shapes.items() if name.endswith(".weight") and len(shape) == 2}
        return {name.removesuffix(".weight"): (inputs, outputs) for name, (outputs, inputs) in matrices.items()}

    @property
    def geometry(self) -> Geometry:
        return self.family.geometry(self.configs)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The shape of one image's latents, without batch axis; see `Geometry.latent_shape`."""
        return self.geometry.latent_shape(height, width)

    def tokens(self, height: int | None = None, width: int | None = None) -> int:
        """The number of image tokens of one image; see `Geometry.tokens`."""
        return self.geometry.tokens(height, width)

    def check_grid(self, shift: float | None, even: bool) -> None:
        """Raises ValueError for options of the generator's `time_grid` that its scheduler does not support."""
        self.family.check_grid(self.configs["scheduler"], shift, even)


def read_outline(folder: Path, family: Family, hub_id: str | None = None) -> Outline:
    """The outline of a diffusers folder. Raises ValueError if something is missing or broken.

    hub_id: the hub model that what is missing in the folder is read from; None for a local folder.
    """
    files = {component: f"{component}/config.json" for component in family.keys} | {"scheduler": SCHEDULER}
    configs = {component: json.loads(_file(folder, name, hub_id).read_text()) for component, name in files.items()}
    for component, keys in family.keys.items():
        if missing := [key for key in keys if key not in configs[component]]:
            raise ValueError(f"weights {str(folder)!r}: {files[component]} has no {missing[0]}")
    return Outline(family, configs, _shapes(folder, family.network, hub_id))


def _file(folder: Path, name: str, hub_id: str | None) -> Path:
    if (folder / name).is_file():
        return folder / name
    if hub_id is None:
        raise ValueError(f"weights {str(folder)!r}: {name} is missing")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub_id, name))


def _shapes(folder: Path, network: str, hub_id: str | None) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for name in _weight_files(folder, network, hub_id):
        if (folder / name).is_file():
            try:
                with safe_open(folder / name, framework="numpy") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"weights {str(folder)!r}: {name} is not a complete safetensors file: {error}") from None
        elif hub_id is not None:
            from huggingface_hub import parse_safetensors_file_metadata

            tensors = parse_safetensors_file_metadata(hub_id, name).tensors
            shapes |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        else:
            raise ValueError(f"weights {str(folder)!r}: {name} is missing")
    return shapes


def _weight_files(folder: Path, network: str, hub_id: str | None) -> list[str]:
    """The network's weight files: those that its index lists, or else the only one."""
    single, index = f"{network}/{WEIGHTS}", f"{network}/{INDEX}"
    if hub_id is not None and not (folder / single).is_file():
        from huggingface_hub import file_exists

        sharded = (folder / index).is_file() or file_exists(hub_id, index)
    else:
        sharded = (folder / index).is_file()
    if not sharded:
        return [single]
    listed = json.loads(_file(folder, index, hub_id).read_text())["weight_map"]
    return sorted({f"{network}/{name}" for name in listed.values()})
