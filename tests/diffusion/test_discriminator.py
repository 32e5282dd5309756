"""Heads, similarity, adversarial losses, the adaptive weight and R1: by hand, and on a toy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from diffusion.augment import Strengths, augment
from diffusion.discriminator import (
    Heads,
    SiameseHeads,
    SpectralNorm,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    r1_penalty,
    relativistic_discriminator,
    relativistic_generator,
    similarity,
    softplus_discriminator,
    softplus_generator,
)
from diffusion.protocols import ImageFeatures

CHANNELS = (5, 3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def features(batch=4):
    return [torch.randn(batch, 5, 4, 3), torch.randn(batch, 3, 2, 2)]


def constant(value):
    return torch.full((2, 3), float(value))


def test_the_spectral_norm_of_a_diagonal_matrix():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.diag(torch.tensor([4.0, -1.0]))
    register_parametrization(linear, "weight", SpectralNorm())
    torch.testing.assert_close(linear.weight, torch.diag(torch.tensor([1.0, -0.25])))


def test_heads_by_hand():
    """One channel each: every spectral norm is the absolute value, or the length of the 3x3 kernel, here 5."""
    heads = Heads([1], width=1)
    first, _, second = heads.heads[0]
    first.parametrizations.weight.original.data.fill_(-7)
    first.bias.data.fill_(1)
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1], kernel[0, 0, 1, 2] = 3, 4
    second.parametrizations.weight.original.data = kernel
    second.bias.data.fill_(0.25)
    logits = heads([torch.tensor([[[[2.0, -1.0], [0.0, 1.0]]]])])
    # 1 - x is -1, 2, 1, 0; LeakyReLU makes -0.2, 2, 1, 0; then 0.6 of itself and 0.8 of its right neighbour.
    torch.testing.assert_close(logits, torch.tensor([[-0.12 + 1.6, 1.2, 0.6, 0.0]]) + 0.25)


def test_the_logits_are_ordered_by_layer_and_patch():
    heads = Heads(CHANNELS, width=8)
    logits = heads(features())
    assert logits.shape == (4, 4 * 3 + 2 * 2)
    given = features()
    torch.testing.assert_close(heads(given)[:, 12:], heads.heads[1](given[1]).flatten(1))


@pytest.mark.parametrize("kind", [Heads, SiameseHeads])
def test_a_row_depends_on_no_other_row_and_on_no_earlier_call(kind):
    heads, given = kind(CHANNELS, width=8), features()
    changed = [torch.cat([layer[:1], 10 * layer[1:]]) for layer in given]
    once, again, other = heads(given), heads(given), heads(changed)
    if kind is Heads:
        once, again, other = [once], [again], [other]
    for layer, same, beside_others in zip(once, again, other, strict=True):
        assert torch.equal(layer, same)
        torch.testing.assert_close(layer[:1], beside_others[:1])
        assert not torch.allclose(layer[1:], beside_others[1:])
    assert not list(heads.buffers())


def test_siamese_embeddings_have_length_1():
    for layer, grid in zip(SiameseHeads(CHANNELS, width=8, embedding=6)(features()), [(4, 3), (2, 2)], strict=True):
        assert layer.shape == (4, 6, *grid)
        torch.testing.assert_close(layer.norm(dim=1), torch.ones(4, *grid))


def test_similarity_by_hand():
    """Two layers: one patch with cosine 0.6, and two patches with cosines 1 and -1."""
    a = [torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1), torch.tensor([[1.0, 1.0]]).reshape(1, 1, 1, 2)]
    b = [torch.tensor([0.6, 0.8]).reshape(1, 2, 1, 1), torch.tensor([[1.0, -1.0]]).reshape(1, 1, 1, 2)]
    torch.testing.assert_close(similarity(a, b, 2.0), torch.tensor([0.6]))


def test_similarity_is_symmetric_and_bounded():
    heads, gamma = SiameseHeads(CHANNELS, width=8, embedding=6), 3.0
    a, b = heads(features()), heads(features())
    assert torch.equal(similarity(a, b, gamma), similarity(b, a, gamma))
    torch.testing.assert_close(similarity(a, a, gamma), torch.full((4,), gamma))
    torch.testing.assert_close(similarity(a, [-layer for layer in a], gamma), torch.full((4,), -gamma))
    assert similarity(a, b, gamma).abs().max() < gamma


def test_hinge_values():
    assert hinge_discriminator(constant(1), constant(-1.5)).item() == 0
    assert hinge_discriminator(constant(0), constant(0)).item() == 2
    assert hinge_discriminator(torch.tensor([0.5, 3.0]), torch.tensor([-3.0, 1.0])).item() == 0.25 + 1
    assert hinge_generator(torch.tensor([1.0, -4.0])).item() == 1.5


def test_softplus_values():
    """softplus(0) = log 2, softplus(log 3) = log 4, softplus(-log 3) = log 4/3."""
    three = constant(math.log(3))
    assert softplus_discriminator(constant(0), constant(0)).item() == pytest.approx(2 * math.log(2))
    assert softplus_discriminator(three, -three).item() == pytest.approx(2 * math.log(4 / 3))
    assert softplus_generator(three).item() == pytest.approx(math.log(4 / 3))
    assert softplus_generator(-three).item() == pytest.approx(math.log(4))


def test_relativistic_values():
    """Only the differences count, here log 3."""
    real, fake = constant(5 + math.log(3)), constant(5)
    assert relativistic_discriminator(real, fake).item() == pytest.approx(math.log(4 / 3), rel=1e-5)
    assert relativistic_generator(real, fake).item() == pytest.approx(math.log(4), rel=1e-5)
    assert relativistic_discriminator(fake, fake).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("factor", "bounds", "expected"),
    [
        (4.0, (0.01, 10.0), 0.25),
        (1e-3, (0.01, 10.0), 10.0),
        (1e3, (0.01, 10.0), 0.01),
        (4.0, (0.5, 2.0), 0.5),
        (0.0, (0.01, 1e6), 5e4),  # 5 over the 1e-4 of the denominator
    ],
)
def test_the_adaptive_weight_of_linear_losses_is_the_ratio_of_their_slopes(factor, bounds, expected):
    """Both losses are linear in x with slopes (3, 4) and factor times (4, 3), of length 5 and 5 factor."""
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    x = 2 * parameter
    loss, adversarial = (x * torch.tensor([3.0, 4.0])).sum(), factor * (x * torch.tensor([4.0, 3.0])).sum()
    weight = adaptive_weight(loss, adversarial, [x], bounds)
    assert weight.item() == pytest.approx(expected, rel=1e-4)
    assert not weight.requires_grad
    assert parameter.grad is None
    (loss + weight * adversarial).backward()
    expected_gradient = 2 * (torch.tensor([3.0, 4.0]) + expected * factor * torch.tensor([4.0, 3.0]))
    torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-4, atol=1e-4)


def test_the_adaptive_weight_leaves_the_gradients_of_the_heads_alone():
    heads = Heads(CHANNELS, width=8)
    at = torch.randn(2, 5, 2, 2, requires_grad=True)
    fake = heads([at, at[:, :3]])
    for parameter in heads.parameters():
        parameter.grad = torch.ones_like(parameter)
    adaptive_weight(at.square().mean(), hinge_generator(fake), [at])
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in heads.parameters())


def test_r1_of_linear_logits():
    """D(x) is the mean of two logits with slopes (1, 3) and (3, 1) and of the sum over b: slopes (2, 2) and 1 in each of 4."""
    a, b = torch.randn(2, 2, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    weight = torch.tensor([[1.0, 3.0], [3.0, 1.0]], requires_grad=True)
    penalty = r1_penalty(a @ weight + b.sum(1, keepdim=True), [a, b])
    assert penalty.item() == pytest.approx((8 + 4) / 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, torch.ones(2, 2))  # of 1/2 |row means|^2: half of a row mean, 2 / 2


class Pixels:
    """Frozen: the colours of 2x2 blocks, and their squares, of the size that features of vision transformers have."""

    channels = (3, 3)

    def __call__(self, images):
        means = 8 * F.avg_pool2d(images - 0.5, 2)
        return [means, means.square()]


def images(red, batch=16):
    """[B, 3, 4, 4], noise around a mean colour; red may be a tensor [] with gradient."""
    means = torch.tensor([0.0, 0.5, 0.5]) + red * torch.tensor([1.0, 0.0, 0.0])
    return means[:, None, None] + 0.1 * torch.randn(batch, 3, 4, 4)


class Toy:
    """Heads on `Pixels` with a hinge loss and augmentation."""

    def __init__(self, strengths):
        self.strengths = strengths
        self.network, self.rng = Pixels(), torch.Generator().manual_seed(0)
        assert isinstance(self.network, ImageFeatures)
        self.heads = Heads(self.network.channels, width=16)
        self.optimizer = torch.optim.Adam(self.heads.parameters(), lr=0.02, betas=(0.0, 0.99))

    def logits(self, images):
        return self.heads(self.network(augment(images, self.rng, self.strengths)))

    def step(self, real, fake):
        loss = hinge_discriminator(self.logits(real), self.logits(fake))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def loss_after_training(real, fake, strengths):
    """The mean loss of steps 51 to 60; 2 is chance."""
    toy = Toy(strengths)
    return sum([toy.step(images(real), images(fake)) for _ in range(60)][-10:]) / 10


def test_heads_tell_two_distributions_apart():
    """Augmented ones less well: patches that were cut out are equal, and colours may vanish."""
    none = Strengths(0, 0, 0, 0, 0)
    assert loss_after_training(0.9, 0.3, none) < 0.1
    assert loss_after_training(0.9, 0.3, Strengths()) < 1.2
    assert loss_after_training(0.5, 0.5, none) > 1.9


def test_a_generator_learns_through_frozen_features():
    """The generator's only parameter is a colour, 0.1, and real images have 0.9."""
    toy, red = Toy(Strengths()), torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.Adam([red], lr=0.02, betas=(0.0, 0.99))
    for _ in range(100):
        toy.step(images(0.9), images(red).detach())
        (red.grad,) = torch.autograd.grad(hinge_generator(toy.logits(images(red))), red)
        optimizer.step()
    assert red.item() == pytest.approx(0.9, abs=0.1)
