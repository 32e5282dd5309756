"""Discriminators on the features of a frozen vision network: trained heads, adversarial losses and their weight.

The design of projected GANs (Sauer et al. 2021, arXiv 2111.01007), as ADD (2311.17042) uses it for distillation: the network
that sees the images is frozen and only small convolutional heads are trained. The heads get that network's features
(`diffusion.ImageFeatures`). `SiameseHeads` and `similarity` compare two images, as second-hand reports describe ADT
(2504.11423); the formula is ours.

Ours: the spectral norm is exact instead of one power iteration per call, so that the heads are a function of their parameters
alone: they have no buffers, and the loss depends neither on the number of calls nor on how a batch is split.

Axes: B images; L layers l of the frozen network with D_l channels on a grid [h, w]; N = sum over l of h w, the patches of an
image in all layers; E channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class SpectralNorm(nn.Module):
    """A weight [out, ...] over its largest singular value as a matrix [out, -1] (Miyato et al. 2018, arXiv 1802.05957)."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.matrix_norm(weight.flatten(1), 2)


def head(channels: int, width: int, out: int) -> nn.Sequential:
    """[B, channels, h, w] -> [B, out, h, w]: 1x1 convolution to `width` channels, LeakyReLU, 3x3 convolution."""
    convolutions = nn.Conv2d(channels, width, 1), nn.Conv2d(width, out, 3, padding=1)
    for convolution in convolutions:
        register_parametrization(convolution, "weight", SpectralNorm())
    return nn.Sequential(convolutions[0], nn.LeakyReLU(0.2), convolutions[1])


class Heads(nn.Module):
    """One head per layer, each with one logit per patch. A row of the output depends on no other row of the batch."""

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        """channels: D_l of every layer. width: of the heads."""
        super().__init__()
        self.heads = nn.ModuleList(head(size, width, 1) for size in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, D_l, h, w] for every layer -> logits [B, N], layer by layer, each row by row of its grid."""
        return torch.cat([one(layer).flatten(1) for one, layer in zip(self.heads, features, strict=True)], dim=1)


class SiameseHeads(nn.Module):
    """One head per layer, each with one embedding of length 1 per patch, for `similarity`."""

    def __init__(self, channels: Sequence[int], width: int = 64, embedding: int = 64) -> None:
        """channels: D_l of every layer. width: of the heads. embedding: E."""
        super().__init__()
        self.heads = nn.ModuleList(head(size, width, embedding) for size in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[B, D_l, h, w] for every layer -> [B, E, h, w] for every layer, of length 1 over E."""
        return [F.normalize(one(layer), dim=1) for one, layer in zip(self.heads, features, strict=True)]


def similarity(a: Sequence[Tensor], b: Sequence[Tensor], gamma: float) -> Tensor:
    """S(a, b) = gamma / L sum_l mean over patches of <a_l, b_l>, in [-gamma, gamma]. Ours.

    a, b: embeddings [B, E, h, w] of length 1 over E, for every layer -> [B].
    """
    layers = [(one * other).sum(1).mean((1, 2)) for one, other in zip(a, b, strict=True)]
    return gamma * torch.stack(layers).mean(0)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(x')), x real and x' generated (Lim & Ye 2017, arXiv 1705.02894). Any shapes -> []."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(x') (Lim & Ye 2017, arXiv 1705.02894). Any shape -> []."""
    return -fake.mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-D(x)) + E softplus(D(x')), cross entropy (Goodfellow et al. 2014, 1406.2661; in DMD2, 2405.14867) -> []."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def softplus_generator(fake: Tensor) -> Tensor:
    """E softplus(-D(x')), the non-saturating loss of the same papers. Any shape -> []."""
    return F.softplus(-fake).mean()


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-(D(x) - D(x'))) over pairs (Jolicoeur-Martineau 2018, arXiv 1807.00734). Two tensors of one shape -> []."""
    return F.softplus(fake - real).mean()


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(-(D(x') - D(x))) over pairs, the same with the roles exchanged. Two tensors of one shape -> []."""
    return F.softplus(real - fake).mean()


@dataclass(frozen=True)
class Comparison:
    """How a discriminator compares real images with generated ones: its heads, its scores and the two players' losses."""

    new_heads: Callable[[Sequence[int]], nn.Module]
    """D_l of every layer -> heads"""
    score: Callable[[nn.Module, Sequence[Tensor], Sequence[Tensor] | None], Tensor]
    """(heads, an image's features, a real image's features) -> scores [B, N]"""
    discriminator_loss: Callable[[Tensor, Tensor], Tensor]
    """(real, fake scores [B, N]) -> []"""
    policy_loss: Callable[[Tensor | None, Tensor], Tensor]
    """(real, fake scores [B, N]) -> [B]; real may be None unless `relative`"""
    paired: bool = False
    """The score needs the real image's features."""
    relative: bool = False
    """The policy's loss needs the real image's scores."""


def new_comparison(name: str, gamma: float) -> Comparison:
    """hinge, relativistic: logits of one image; siamese: the similarity with a real image, gamma its bound. Ours: the last."""

    def hinge_policy(real: Tensor | None, fake: Tensor) -> Tensor:
        return torch.vmap(hinge_generator)(fake)

    if name == "siamese":

        def compared(heads: nn.Module, features: Sequence[Tensor], real: Sequence[Tensor] | None) -> Tensor:
            return similarity(heads(features), heads(real), gamma)[:, None]

        return Comparison(SiameseHeads, compared, hinge_discriminator, hinge_policy, paired=True)

    def logits(heads: nn.Module, features: Sequence[Tensor], real: Sequence[Tensor] | None) -> Tensor:
        return heads(features)

    if name == "hinge":
        return Comparison(Heads, logits, hinge_discriminator, hinge_policy)
    assert name == "relativistic", name

    def relativistic_policy(real: Tensor | None, fake: Tensor) -> Tensor:
        assert real is not None
        return torch.vmap(relativistic_generator)(real, fake)

    return Comparison(Heads, logits, relativistic_discriminator, relativistic_policy, relative=True)


def adaptive_weight(
    loss: Tensor, adversarial: Tensor, at: Sequence[Tensor], bounds: tuple[float, float] = (0.01, 10.0)
) -> Tensor:
    """The factor of the adversarial loss that makes its gradient as large as the loss's: |dL/d at| / (|dA/d at| + 1e-4) -> [].

    VQGAN (Esser et al. 2021, arXiv 2012.09841), equation 7; bounds of CCM's public code. Both take the gradient at the weights
    of the last layer. Ours: at any tensors `at` of both graphs, such as the student's output or all parameters of an adapter.
    Detached; no .grad is written, and both graphs stay usable.
    """
    gradients = [torch.autograd.grad(value, list(at), retain_graph=True) for value in (loss, adversarial)]
    norms = [torch.stack([part.norm() for part in parts]).norm() for parts in gradients]
    return (norms[0] / (norms[1] + 1e-4)).clamp(*bounds).detach()


def r1_penalty(logits: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """1/2 E |d D(x) / d inputs|^2 (Mescheder et al. 2018, arXiv 1801.04406), D(x) the mean of a row of logits. Differentiable.

    logits [B, N]. inputs: what they were computed from, each [B, ...] with requires_grad, e.g. features of real images -> [].
    """
    gradients = torch.autograd.grad(logits.mean(1).sum(), list(inputs), create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0).mean() / 2
