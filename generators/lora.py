"""LoRA adapters over one frozen network (Hu et al. 2021, arXiv 2106.09685); only this module adds and switches them.

Every role (policy, EMA, old policy, fake score) is the same base network under a named adapter; the teacher is the network
with all adapters off. peft builds the layers, y = W x + (alpha / rank) B A x, with three differences:

* peft's `set_adapter` and `enable_adapters` toggle `requires_grad`: a prediction under another adapter, or under none, would
  freeze the policy. `using` sets the two flags that a layer's forward reads, and nothing else.
* peft casts a new adapter to the base's dtype. Here adapters stay float32 over a bfloat16 base, because bfloat16 is too coarse
  for an optimiser: the next number above 1 is 1.008.
* peft initialises from the global random state. Here A comes from a seed, so that all processes start with equal adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from generators.adapter_weights import AdapterWeights, manifest_of
from generators.targets import match
from inputs import nearest

DTYPE = torch.float32


@dataclass(frozen=True)
class Lora:
    """An adapter's shape."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Full names of the adapted linear layers, in the network's order."""


class Adapters:
    """The named adapters of one network, which is frozen. `active` is the adapter that predicts; None: all are off."""

    def __init__(self, network: nn.Module, short_names: Mapping[str, str]) -> None:
        """short_names: {short name: pattern of module names}, the words that a family allows in `targets`."""
        network.requires_grad_(False)
        self.network = network
        self.active: str | None = None
        self._short_names = short_names
        self.linear = {
            name: (module.in_features, module.out_features)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
        }
        """{full name: (inputs, outputs)} of the layers that can be adapted"""
        self._layers: list[LoraLayer] = []
        self._loras: dict[str, Lora] = {}
        self._tensors: dict[str, dict[str, nn.Parameter]] = {}

    def add(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        targets: str | Sequence[str] = "attn",
        seed: int = 0,
        trainable: bool = True,
    ) -> Lora:
        """Add an adapter that changes nothing yet: A uniform in +-1 / sqrt(inputs), B zero. Does not switch to it.

        targets: see `match`. Raises ValueError for a name that exists already, a rank below 1, an alpha that is not positive,
        and targets that match nothing.
        """
        if name in self._loras:
            raise ValueError(f"adapter {name!r}: exists already")
        if "." in name:
            raise ValueError(f"adapter {name!r}: the name has a dot")
        if rank < 1 or not alpha > 0:
            raise ValueError(f"adapter {name!r}: rank {rank}, alpha {alpha} (allowed: rank >= 1, alpha > 0)")
        lora = Lora(rank, alpha, self.match(targets))
        config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": "|".join(map(re.escape, lora.modules))}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            # On the meta device, so that peft neither initialises nor allocates tensors that are replaced below.
            inject_adapter_in_model(LoraConfig(**config), self.network, name, low_cpu_mem_usage=True)
        self._loras[name] = lora
        self._tensors[name] = dict(self._initial_parameters(name, seed, trainable))
        self._layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        self._set_flags()
        return lora

    def _initial_parameters(self, name: str, seed: int, trainable: bool) -> Iterator[tuple[str, nn.Parameter]]:
        rng = torch.Generator().manual_seed(seed)
        lora = self._loras[name]
        for module in lora.modules:
            layer: Any = self.network.get_submodule(module)
            inputs, outputs = self.linear[module]
            bound = inputs**-0.5
            a = torch.empty(lora.rank, inputs, dtype=DTYPE).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(outputs, lora.rank, dtype=DTYPE)
            for part, value in {"lora_A": a, "lora_B": b}.items():
                parameter = nn.Parameter(value.to(layer.weight.device), requires_grad=trainable)
                getattr(layer, part)[name].weight = parameter
                yield f"{module}.{part}.weight", parameter

    def match(self, targets: str | Sequence[str]) -> tuple[str, ...]:
        """The linear layers that match any of the targets; see `generators.targets.match`."""
        return match(targets, self.linear, self._short_names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loras)

    def lora(self, name: str) -> Lora:
        self._check_known(name)
        return self._loras[name]

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """{module.lora_A.weight: [rank, inputs], module.lora_B.weight: [outputs, rank], ...}, float32, in a fixed order."""
        self._check_known(name)
        return dict(self._tensors[name])

    def parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.named_parameters(name).values())

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Predict under this adapter (None: under none) inside the block; the previous one returns after it. Nests."""
        previous = self.active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(previous)

    def checkpoint(self, module: nn.Module, *inputs: object) -> object:
        """Activation checkpointing that recomputes under the adapter of the forward pass.

        The recomputation runs in backward, when another adapter may be active; the gradient would then be silently wrong.
        For diffusers' `enable_gradient_checkpointing`.
        """
        name = self.active

        def run(*inputs: object) -> object:
            with self.using(name):
                return module(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)

    def read(self, name: str) -> AdapterWeights:
        """A copy of the adapter as one flat buffer."""
        return AdapterWeights.pack(self.named_parameters(name), self.lora(name).alpha)

    @torch.no_grad()
    def write(self, name: str, weights: AdapterWeights) -> None:
        """Overwrite the adapter in place, so that optimisers keep their parameters.

        Raises ValueError, and changes nothing, for weights of an adapter of another shape and for damaged ones.
        """
        own = self.named_parameters(name)
        weights.check_for(manifest_of(own), self.lora(name).alpha, DTYPE)
        for parameter, value in zip(own.values(), weights.tensors().values(), strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Overwrite adapter `target` in place with `source`. Raises ValueError unless rank, alpha and layers are equal."""
        if self.lora(source) != self.lora(target):
            raise ValueError(f"adapters {source!r} and {target!r}: rank, alpha or targets differ")
        for parameter, value in zip(self.parameters(target), self.parameters(source), strict=True):
            parameter.copy_(value)

    def _check_known(self, name: str) -> None:
        if name not in self._loras:
            raise ValueError(f"adapter {name!r}: does not exist{nearest(name, self._loras)}")

    def _switch(self, name: str | None) -> None:
        if name is not None:
            self._check_known(name)
        if name != self.active:
            self.active = name
            self._set_flags()

    def _set_flags(self) -> None:
        for layer in self._layers:
            layer._disable_adapters = self.active is None
            layer._active_adapter = [] if self.active is None else [self.active]
