"""Distances between sets of images, against closed forms."""

import pytest
import torch

from runtime.evaluation.distribution import cmmd, frechet_distance, recall


def test_frechet_distance_of_known_covariances():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert frechet_distance(corners, corners) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(corners, corners + torch.tensor([3.0, 4.0])) == pytest.approx(25)
    # Covariances 4/3 I and 4/3 diag(9, 1): tr = 4/3 (1 + 9 - 2 * 3) in the first direction, 0 in the second.
    assert frechet_distance(corners, corners * torch.tensor([3.0, 1.0])) == pytest.approx(16 / 3)


def test_cmmd():
    a = torch.tensor([[2.0, 0.0], [5.0, 0.0]])
    b = torch.tensor([[0.0, 1.0]])
    assert cmmd(a, a) == 0
    expected = 1000 * (2 - 2 * torch.tensor(-2 / 200, dtype=torch.float64).exp())
    assert cmmd(a, b) == pytest.approx(expected.item()), "unit vectors at a squared distance of 2"


def test_recall_counts_real_images_near_a_generated_one():
    line = torch.arange(10.0)[:, None]
    assert recall(line, line) == 1
    assert recall(line, line[:5], neighbors=1) == pytest.approx(0.6), "0..4, and 5 at distance 1 of 4"
    assert recall(line, line[:5] * 0 + 100, neighbors=1) == 0
