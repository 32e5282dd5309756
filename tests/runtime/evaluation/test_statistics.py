import pytest
import torch
from safetensors.torch import save_file

from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.statistics import distances


def test_diversity_is_the_mean_distance_inside_a_group():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert distances(features, 2).tolist() == [5.0, 0.0]
    assert distances(torch.tensor([[0.0], [1.0], [3.0]]), 3).item() == pytest.approx((1 + 3 + 2) / 3)


def test_an_evaluation_is_kept_whole_and_those_of_earlier_versions_can_be_read(tmp_path):
    scores, images = {"total": torch.tensor([0.1, 0.2])}, torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    Evaluated(scores, torch.tensor([1.0, 4.0]), images, 7, torch.ones(2, 5)).save(tmp_path / "new")
    new = Evaluated.load(tmp_path / "new")
    assert new.features.shape == (2, 5)
    assert new.images.shape == (1, 2, 2, 3)
    assert (new.distances.tolist(), new.diversity, new.nfe) == ([1.0, 4.0], 2.5, 7)
    assert new.scores["total"].tolist() == scores["total"].tolist()
    save_file({"scores/total": scores["total"], "pictures": images}, tmp_path / "old", {"diversity": "2.5", "nfe": "7"})
    old = Evaluated.load(tmp_path / "old")
    assert (old.diversity, old.features) == (2.5, None)
    assert old.images.shape == (1, 2, 2, 3)


def test_evaluations_of_several_samplers_join(tmp_path):
    def part(value, number):
        images = torch.zeros(number, 1, 1, 3, dtype=torch.uint8)
        return Evaluated({"total": torch.full((2 * number,), value)}, torch.full((number,), value), images, 3, torch.ones(2, 4))

    joined = Evaluated.cat([part(0.0, 10), part(1.0, 10)])
    assert joined.scores["total"].tolist() == [0.0] * 20 + [1.0] * 20
    assert joined.diversity == 0.5
    assert len(joined.images) == 16
    assert joined.nfe == 6
    assert joined.features.shape == (4, 4)
