import pytest
import torch
from safetensors.torch import save_file

from runtime.roles.build import Evaluated, distances


def test_diversity_is_the_mean_distance_inside_a_group():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert distances(features, 2).tolist() == [5.0, 0.0]
    assert distances(torch.tensor([[0.0], [1.0], [3.0]]), 3).item() == pytest.approx((1 + 3 + 2) / 3)


def test_an_evaluation_is_kept_whole_and_one_of_old_can_still_be_read(tmp_path):
    scores, pictures = {"total": torch.tensor([0.1, 0.2])}, torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    Evaluated(scores, torch.tensor([1.0, 4.0]), pictures, 7).save(tmp_path / "new")
    new = Evaluated.load(tmp_path / "new")
    assert (new.distances.tolist(), new.diversity, new.nfe) == ([1.0, 4.0], 2.5, 7)
    assert new.scores["total"].tolist() == scores["total"].tolist()
    save_file({"scores/total": scores["total"], "pictures": pictures}, tmp_path / "old", {"diversity": "2.5", "nfe": "7"})
    assert Evaluated.load(tmp_path / "old").diversity == 2.5
