import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from diffusion.types import Prompt
from rewards.scorers.clip_score import CLIPScore
from rewards.scorers.pickscore import PickScore
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:4]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]
FACTOR = 90.0


@pytest.fixture(scope="module")
def folder(clip_folder, tmp_path_factory):
    """A CLIP whose factor is not transformers' initial one."""
    folder = shutil.copytree(clip_folder, tmp_path_factory.mktemp("pickscore") / "clip")
    tensors = load_file(folder / "model.safetensors") | {"logit_scale": torch.tensor(math.log(FACTOR))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return PickScore(str(folder))


@pytest.fixture
def images():
    return (render([parse(text) for text in TEXTS], seed=0) * 255).round() / 255


def test_equals_transformers(reward, folder, images):
    """Every image with every caption, as CLIPModel's own logits; captions padded to one length."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [(image * 255).byte().permute(1, 2, 0).numpy() for image in images], return_tensors="pt"
    ).pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image
    assert logits.std() > 1
    for shift in range(4):
        others = [(i + shift) % 4 for i in range(4)]
        scores = reward(images, [PROMPTS[i] for i in others]).total
        assert scores == pytest.approx(logits[range(4), others], abs=1e-4)


def test_is_the_factor_times_the_cosine(reward, folder, images):
    assert reward.factor == pytest.approx(FACTOR, rel=1e-6)
    assert reward(images, PROMPTS).total == pytest.approx(FACTOR * CLIPScore(str(folder))(images, PROMPTS).total, rel=1e-6)


def test_bfloat16_leaves_the_factor_alone(folder):
    """In bfloat16 CLIP's own 100 would be 98.9."""
    coarse = PickScore(str(folder), dtype="bfloat16")
    assert coarse.factor == pytest.approx(FACTOR, rel=1e-6)
    assert {p.dtype for p in coarse.cosine.model.parameters() if p.ndim > 0} == {torch.bfloat16}


def test_the_gradient_is_the_factor_times_the_cosine_s(reward, folder, images):
    def gradient(of):
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(of(leaf, PROMPTS).total.sum(), leaf)[0]

    cosine = gradient(CLIPScore(str(folder)))
    assert cosine.abs().max() > 0
    assert (gradient(reward) - FACTOR * cosine).abs().max() <= 1e-5 * FACTOR * cosine.abs().max()


def test_the_gradient_is_the_slope(reward, images):
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS).total.sum(), leaf)
    step = 1e-3 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    measured = (reward(images + step, PROMPTS).total - reward(images - step, PROMPTS).total) / 2
    assert measured == pytest.approx((gradient * step).sum((1, 2, 3)), rel=0.01)


def test_a_score_without_gradient_is_the_same_to_the_last_bit_in_any_batch(reward):
    images = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % 4] for i in range(11)]
    together = reward(images, prompts).total
    for rows in (slice(0, 1), slice(3, 5), slice(7, 11)):
        assert torch.equal(reward(images[rows], prompts[rows]).total, together[rows])


def test_its_network_is_frozen_and_in_evaluation_mode(reward):
    modules = list(reward.cosine.model.modules())
    assert len(modules) > 10
    assert not any(module.training for module in modules)
    assert not any(parameter.requires_grad for parameter in reward.cosine.model.parameters())


def test_image_features_have_length_1(reward, images):
    features = reward.image_features(images)
    assert features.shape == (4, 64)
    assert features.norm(dim=1) == pytest.approx(torch.ones(4), abs=1e-6)


def test_the_published_weights_are_the_default():
    assert PickScore.Config().weights == "yuvalkirstain/PickScore_v1"


def test_an_invalid_folder(tmp_path):
    for act in (lambda: PickScore(str(tmp_path)), lambda: PickScore.check(str(tmp_path), 8)):
        with pytest.raises(ValueError, match=r"^weights .*: not a transformers model folder \(no config\.json\)$"):
            act()
