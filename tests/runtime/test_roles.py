import pytest
import torch

from runtime.roles import diversity


def test_diversity_is_the_mean_distance_inside_groups():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert diversity(features, 2) == pytest.approx(2.5)
    assert diversity(features[2:], 2) == 0
    assert diversity(torch.tensor([[0.0], [1.0], [3.0]]), 3) == pytest.approx((1 + 3 + 2) / 3)
