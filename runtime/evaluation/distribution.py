"""Distances between two sets of images, measured on features of a frozen network. Axes: A and B images, D features."""

from __future__ import annotations

import torch
from torch import Tensor

BANDWIDTH = 10.0
SCALE = 1000.0
"""CMMD's kernel bandwidth and factor, for CLIP features of unit length."""
NEIGHBORS = 3


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of Gaussians fitted to features [A, D] and [B, D]; in float64.

    Heusel et al. 2017, arXiv 1706.08500, eq. 6. The trace of the root is the sum of the roots of the eigenvalues of C_a C_b,
    which are those of the symmetric C_a^1/2 C_b C_a^1/2.
    """
    a, b = a.double(), b.double()
    c_a, c_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(c_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + c_a.trace() + c_b.trace() - 2 * cross)


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): 1000 times the squared MMD with an RBF kernel of bandwidth 10.

    features [A, D] and [B, D], normalised here to unit length; the biased estimate, as in the public code.
    """
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-(torch.cdist(x, y) ** 2) / (2 * BANDWIDTH**2)).exp().mean()

    return float(SCALE * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)))


def recall(real: Tensor, generated: Tensor, neighbors: int = NEIGHBORS) -> float:
    """The share of real features [A, D] that lie within the `neighbors`-th nearest distance of a generated one [B, D].

    Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 2.
    """
    real, generated = real.double(), generated.double()
    # The smallest distance is that of each image to itself.
    radius = torch.cdist(generated, generated).kthvalue(neighbors + 1, dim=1).values
    return float((torch.cdist(real, generated) <= radius).any(dim=1).double().mean())
