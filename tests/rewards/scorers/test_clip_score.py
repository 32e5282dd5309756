import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

import rewards
from diffusion.types import Prompt
from rewards.parts.clip import center_crop, resize_shortest_edge
from rewards.scorers.clip_score import CLIPScore
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:4]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def reward(clip_folder):
    return CLIPScore(str(clip_folder))


@pytest.fixture
def copy(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


def eight_bit(images):
    return (images * 255).round().to(torch.uint8)


def pil(images):
    return [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in eight_bit(images)]


def transformers_cosine(folder, images):
    """transformers' own model, image processor and tokenizer, its normalised features."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pil(images), return_tensors="pt").pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return (out.image_embeds * out.text_embeds).sum(1)


def test_equals_transformers_where_no_resizing_is_needed(reward, clip_folder):
    images = eight_bit(render([parse(text) for text in TEXTS], seed=0)) / 255
    scores = reward(images, PROMPTS).total
    assert scores.std() > 0.01
    assert (scores - transformers_cosine(clip_folder, images)).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (70, 45), (24, 20)])
def test_close_to_transformers_with_resizing(reward, clip_folder, size):
    """On smooth images its rounding to 8 bits after each pass moves a pixel by one level, and the cosine by some 0.0002."""
    coarse = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = eight_bit(torch.nn.functional.interpolate(coarse, size, mode="bilinear")) / 255
    theirs = CLIPImageProcessorPil.from_pretrained(clip_folder)(pil(images), return_tensors="pt").pixel_values
    assert ((reward.preprocess(images) - theirs) * torch.tensor(reward.preprocess.std)[:, None, None]).abs().max() < 1.1 / 255
    assert (reward(images, PROMPTS).total - transformers_cosine(clip_folder, images)).abs().max() < 5e-4


def test_the_gradient_reaches_every_pixel_through_resizing(reward):
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).total.sum(), images)
    assert (gradient != 0).all()


def test_resizing_and_cropping():
    images = torch.rand(1, 3, 33, 50)
    assert resize_shortest_edge(images, 10).shape == (1, 3, 10, 15)
    assert resize_shortest_edge(images.mT, 10).shape == (1, 3, 15, 10)
    assert resize_shortest_edge(images, 33) is images
    assert torch.equal(center_crop(images, (32, 32)), images[:, :, 0:32, 9:41])


def test_a_score_without_gradient_is_the_same_to_the_last_bit_in_any_batch(reward):
    images = torch.rand(19, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[i % 4] for i in range(19)]
    together = reward(images, prompts).total
    for rows in (slice(0, 1), slice(3, 5), slice(5, 8), slice(7, 18), slice(18, 19)):
        assert torch.equal(reward(images[rows], prompts[rows]).total, together[rows])


def test_the_micro_batch_does_not_matter(clip_folder, reward):
    images = render([parse(text) for text in TEXTS], seed=0)
    by_ones = CLIPScore(str(clip_folder), micro_batch=1)(images, PROMPTS).total
    assert (by_ones - reward(images, PROMPTS).total).abs().max() < 1e-6


def test_a_caption_is_encoded_once(clip_folder, monkeypatch):
    reward = CLIPScore(str(clip_folder))
    asked = []
    encode = reward.captions.encode
    monkeypatch.setattr(reward.captions, "encode", lambda text: asked.append(text) or encode(text))
    for _ in range(2):
        reward(torch.rand(4, 3, 32, 32), [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert asked == TEXTS[:2]


def test_captions_kept_in_memory_are_bounded(clip_folder, monkeypatch):
    monkeypatch.setattr("rewards.parts.clip.CACHED_CAPTIONS", 2)
    reward = CLIPScore(str(clip_folder))
    first = reward(torch.full((4, 3, 32, 32), 0.3), PROMPTS).total
    assert len(reward.captions._known) == 2
    assert torch.equal(first, reward(torch.full((4, 3, 32, 32), 0.3), PROMPTS).total)


def test_bfloat16_halves_the_network_s_memory(clip_folder, reward):
    def size(model):
        return sum(parameter.nbytes for parameter in model.parameters())

    assert size(CLIPScore(str(clip_folder), dtype="bfloat16").model) == pytest.approx(size(reward.model) / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bf16", None])
def test_other_dtypes_are_refused(clip_folder, dtype):
    entry = {"name": "clip_score", "weights": str(clip_folder), "dtype": dtype}
    with pytest.raises(ValueError, match=r"^rewards\.0\.dtype = .*: Input should be 'float32' or 'bfloat16'$"):
        rewards.resolve([entry])


def test_a_long_caption_is_cut_off(reward):
    images = torch.rand(2, 3, 32, 32)
    prompts = [Prompt(str(n), "red " * n) for n in (10, 40)]  # with its start and end, 10 words fill the tower
    image = images[:1].expand(2, -1, -1, -1)
    scores = reward(image, prompts).total
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-6)


def refused(folder):
    with pytest.raises(ValueError, match=f"^{folder}") as error:
        CLIPScore(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_incomplete_folders(copy):
    """transformers would invent what is missing: random weights, a tokenizer without words, OpenAI's sizes."""
    weights = load_file(copy / "model.safetensors")
    left_out = "visual_projection.weight"
    save_file({k: v for k, v in weights.items() if k != left_out}, copy / "model.safetensors", {"format": "pt"})
    assert f"1 of CLIPModel's weights are missing, for example {left_out}" in refused(copy)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "tokenizer.json").unlink()
    assert "its tokenizer has" in refused(copy)
    (copy / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json: no such file" in refused(copy)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("do_center_crop", False, "do_center_crop False; allowed: True"),
        ("resample", 2, "resample 2; allowed: 3"),
        ("size", {"height": 32, "width": 32}, "allowed: a shortest_edge"),
        ("crop_size", {"height": 40, "width": 40}, "crop_size (40, 40) exceeds size 32"),
    ],
)
def test_another_image_processor(copy, key, value, said):
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert said in refused(copy)
