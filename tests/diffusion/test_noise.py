import pytest
import torch

from diffusion import sample_noise, sample_seed


def test_seed_has_its_known_values():
    assert sample_seed(0, 0, "glyphs/train/0", 0) == 3577306353437976059


def test_seed_depends_on_every_argument_and_on_their_boundaries():
    seeds = [
        sample_seed(0, 0, "a", 0),
        sample_seed(1, 0, "a", 0),
        sample_seed(0, 1, "a", 0),
        sample_seed(0, 0, "b", 0),
        sample_seed(0, 0, "a", 1),
        sample_seed(1, 23, "a", 0),
        sample_seed(12, 3, "a", 0),
        sample_seed(0, 0, 'a", 1', 0),
    ]
    assert len(set(seeds)) == len(seeds)


def test_seed_fits_an_int64():
    seeds = torch.tensor([sample_seed(0, 0, "a", i) for i in range(1000)])
    assert seeds.dtype == torch.int64
    assert seeds.min() >= 0
    assert seeds.max() > 2**62


def test_noise_has_its_known_values():
    torch.testing.assert_close(
        sample_noise([1], [4]), torch.tensor([[0.661352, 0.266924, 0.061677, 0.621317]]), atol=1e-4, rtol=0
    )


def test_noise_belongs_to_the_sample():
    together = sample_noise([7, 8, 9], (4, 8, 8))
    assert torch.equal(sample_noise([8], (4, 8, 8))[0], together[1])
    assert torch.equal(sample_noise(torch.tensor([9, 7]), (4, 8, 8)), together[[2, 0]])


def test_noise_does_not_use_the_global_rng():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    sample_noise([1, 2], (5,))
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_of_another_dtype_is_the_same_noise(dtype):
    noise = sample_noise([1, 2], (3, 5), dtype=dtype)
    assert noise.dtype == dtype
    assert torch.equal(noise, sample_noise([1, 2], (3, 5)).to(dtype))


def test_noise_is_standard_and_independent_between_samples():
    noise = sample_noise([sample_seed(0, 0, "a", i) for i in range(64)], (4096,))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    correlation = noise @ noise.T / 4096 - torch.eye(64)
    assert correlation.abs().max() < 0.1  # standard error 1/64 (2/64 times sqrt(1/2) on the diagonal), 4,096 pairs
