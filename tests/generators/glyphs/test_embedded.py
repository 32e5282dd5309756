"""The networks in the package: small, readable by stock libraries, good enough to learn from, with room to improve."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer

from diffusion import SOLVERS, Prompt, guided, integrate, sample_noise
from generators import embedded, load
from generators.glyphs.train import CLIP_MEAN, CLIP_STD, tokenize
from rewards.scorers.glyph_match import GlyphMatch
from worlds.glyphs import HELDOUT_THINGS, caption, parse, random_scene, read_prompts, render

FOLDER = Path(__file__).parents[3] / "generators" / "glyphs"


@pytest.fixture(scope="module")
def teacher():
    return load("embedded:glyphs")


def draw(teacher, texts, steps=8):
    condition = teacher.encode(texts)
    noise = sample_noise(range(len(texts)), teacher.latent_shape())
    solve = integrate(guided(teacher, condition, adapter=None), noise, teacher.time_grid(steps), teacher.path, SOLVERS["euler"])
    return teacher.decode(solve.x[:, -1])


def test_under_20_mib_and_nothing_pickled():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20 * 2**20
    assert not [path for path in files if path.suffix in (".pt", ".bin", ".pkl", ".ckpt")]


def test_the_teacher_is_tiny(teacher):
    assert sum(p.numel() for p in teacher.transformer.parameters()) < 8e6
    assert teacher.latent_shape() == (8, 8, 8)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_euler_equals_the_stock_pipeline(teacher, guidance):
    texts = ["a red circle left of a blue seven", "a white cross", "a green two on the left"]
    stock = StableDiffusion3Pipeline.from_pretrained(embedded("embedded:glyphs"), text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    noise = sample_noise([0, 1, 2], teacher.latent_shape())
    expected = stock(
        texts,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=guidance,
        max_sequence_length=0,
        output_type="pt",
    ).images
    predict = guided(teacher, teacher.encode(texts), adapter=None, scale=guidance, negative=teacher.encode([""] * 3))
    with torch.no_grad():
        solve = integrate(predict, noise, teacher.time_grid(10), teacher.path, SOLVERS["euler"])
        images = teacher.decode(solve.x[:, -1])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_images_become_latents_and_images_again(teacher):
    scenes = [random_scene(np.random.default_rng(i), heldout=i % 2 == 1) for i in range(64)]
    images = render(scenes, seed=31)
    prompts = [Prompt(str(i), caption(scene)) for i, scene in enumerate(scenes)]
    with torch.no_grad():
        latents = teacher.encode_images(images)
        again = teacher.decode(latents)
    assert (again - images).square().mean() < 10**-3.3  # 33 dB
    assert GlyphMatch()(again, prompts).total.mean() > 0.98
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_the_teacher_is_good_but_not_perfect(teacher, name):
    texts = read_prompts(name)[:64]
    match = GlyphMatch()(draw(teacher, texts), [Prompt(text, text) for text in texts]).total.mean()
    assert 0.5 <= match <= 0.75


def test_the_prompt_matters(teacher):
    texts = read_prompts("heldout")[:64]
    images = draw(teacher, texts)
    own = GlyphMatch()(images, [Prompt(text, text) for text in texts]).total.mean()
    other = GlyphMatch()(images, [Prompt(text, text) for text in texts[1:] + texts[:1]]).total.mean()
    assert own > other + 0.2


def test_clip_ranks_the_right_caption_first_among_32_on_heldout_renders():
    rng = np.random.default_rng(21)
    scenes = [random_scene(rng, heldout=True) for _ in range(256)]
    assert all(HELDOUT_THINGS.intersection(parse(caption(scene)).things) for scene in scenes)
    model, tokenizer = (kind.from_pretrained(embedded("embedded:glyphs-clip")) for kind in (CLIPModel, CLIPTokenizer))
    pixels = (render(scenes, seed=22) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    ids = tokenize(tokenizer, [caption(scene) for scene in scenes])
    first = []
    with torch.no_grad():
        for image, text in zip(pixels.split(32), ids.split(32), strict=True):
            first.append(model(pixel_values=image, input_ids=text).logits_per_image.argmax(1) == torch.arange(32))
    assert torch.cat(first).float().mean() >= 0.9
