"""The recipe, shortened to seconds: it resumes exactly, and stock libraries load its output."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer

from generators.glyphs import networks, train
from generators.glyphs.train import Schedule, fit
from worlds.glyphs import parse, read_prompts

SCHEDULE = Schedule(scenes=0, steps=6, batch=4, lr=0.1, ema=0.5, warmup=2, checkpoint_every=2)


class Interrupted(Exception):
    pass


def regression(work, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss_of(rng):
        if stop_at is not None and (work / "toy.pt").exists() and torch.load(work / "toy.pt")["step"] == stop_at:
            raise Interrupted
        x = torch.from_numpy(rng.standard_normal((4, 3))).float()
        return {"mse": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    return fit("toy", model, loss_of, SCHEDULE, seed=0, work=work)


def test_an_interrupted_run_continues_bit_for_bit(tmp_path):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    whole.mkdir()
    interrupted.mkdir()
    expected = regression(whole)
    with pytest.raises(Interrupted):
        regression(interrupted, stop_at=4)
    continued = regression(interrupted)
    assert torch.equal(continued.weight, expected.weight)
    assert not torch.equal(continued.weight, torch.load(interrupted / "toy.pt")["model"]["weight"])  # the EMA, not the last


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    regression(tmp_path)
    with pytest.raises(ValueError, match=r"toy\.pt: made with seed=0 .*, this run has seed=1 .*; choose another --work folder"):
        fit("toy", torch.nn.Linear(3, 1), lambda rng: {}, SCHEDULE, seed=1, work=tmp_path)


def test_an_unknown_stage_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "vea"])
    with pytest.raises(SystemExit):
        train.main()
    assert "stage 'vea': not known; did you mean 'vae'? (allowed: clip, teacher, vae)" in capsys.readouterr().err


def test_learning_rate_warms_up_and_ends_at_zero():
    schedule = Schedule(scenes=0, steps=100, batch=1, lr=1.0, warmup=10)
    assert schedule.lr_at(0) == pytest.approx(0.1)
    assert schedule.lr_at(50) == pytest.approx(0.5)
    assert schedule.lr_at(100) == pytest.approx(0.0)


def test_every_word_is_one_token_and_the_longest_caption_fits(tmp_path):
    tokenizer = networks.write_tokenizer(tmp_path)
    for line in read_prompts("train")[:300] + read_prompts("heldout"):
        ids = tokenizer(line).input_ids
        assert len(ids) == len(line.split()) + 2 <= networks.MAX_TOKENS
        assert ids == CLIPTokenizer.from_pretrained(tmp_path)(line).input_ids
    assert tokenizer.decode(tokenizer("an orange dog", add_special_tokens=False).input_ids) == "an orange dog"


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("a red circle left of a blue seven", "a blue seven right of a red circle", True),
        ("a red circle above a blue seven", "a blue seven below a red circle", True),
        ("a red circle", "a red circle on the left", True),
        ("a red circle left of a blue seven", "a red circle right of a blue seven", False),
        ("a red circle", "a red square", False),
    ],
)
def test_captions_that_one_image_satisfies_are_not_negatives(text, other, same):
    assert (train.canonical(parse(text)) == train.canonical(parse(other))) is same


def test_two_steps_of_every_stage_write_folders_that_stock_libraries_load(tmp_path):
    schedule = Schedule(scenes=16, steps=2, batch=4, lr=1e-3, checkpoint_every=2)
    train.train_vae(schedule, 0, tmp_path, tmp_path / "pipeline")
    train.train_teacher(schedule, 0, tmp_path, tmp_path / "pipeline")
    train.train_clip(schedule, 0, tmp_path, tmp_path / "clip")
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red circle", num_inference_steps=2, max_sequence_length=0, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    latents = pipe.vae.encode(torch.rand(8, 3, 32, 32)).latent_dist.mean
    assert latents.shape == (8, 8, 8, 8)
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    ids = CLIPTokenizer.from_pretrained(tmp_path / "clip")(["a red circle"], return_tensors="pt").input_ids
    assert clip(input_ids=ids, pixel_values=torch.rand(2, 3, 32, 32)).logits_per_image.shape == (2, 1)
    assert (tmp_path / "teacher_000002.png").exists()
    assert not [path for path in tmp_path.rglob("*.json") if str(tmp_path) in path.read_text()]
