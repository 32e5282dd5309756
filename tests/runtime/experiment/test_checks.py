"""Invalid experiments are refused before a network is loaded, with one line."""

import hashlib
from pathlib import Path

import pytest

from diffusion import Prompt
from generators import embedded, load, weights_hash
from generators.export import export_diffusers
from runtime.experiment.checks import check_inputs, digest, files_of, shape_of_adapter
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("generator.weights=no/such/folder", "no/such/folder"),
        ("generator.height=33", "generator: height 33: not allowed here (allowed: multiples of 8 up to 64)"),
        ("lora.targets=atn", "lora: target 'atn': matches no linear layer; did you mean 'attn'"),
        ("lora.start_from=no/such/lora", "lora: LoRA 'no/such/lora': there is no"),
        ("rewards.heldout=[{name: clip_score, weights: no/such/clip}]", "no/such/clip"),
        ("rewards.heldout=[{name: clip_score, weights: 'embedded:glyph-clip'}]", "did you mean 'glyphs-clip'"),
        ("rewards.heldout=[{name: clip_score, weights: 'embedded:glyphs'}]", "no config.json"),
        ("run.trackers=[wandb]", "run.trackers = 'wandb': the package wandb is not installed"),
        ("run.device=cuda:3", "run: device 'cuda:3': torch finds no GPU"),
        ("prompts.train=no/such.txt", "no/such.txt"),
        ("prompts.heldout=ONE", "has one prompt; at least 2 are needed"),
        ("prompts.train=OTHER", "rewards: reward glyph_match, prompt 'a portrait of a cat': "),
        ("prompts.heldout=OTHER", "rewards: reward glyph_match, prompt 'a portrait of a cat': "),
    ],
)
def test_an_error_is_one_line_that_names_the_key(override, words, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.run.tracking.find_spec", lambda name: None if name == "wandb" else name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "one.txt").write_text("a red circle")
    (tmp_path / "other.txt").write_text("a red circle\na portrait of a cat")
    override = override.replace("ONE", str(tmp_path / "one.txt")).replace("OTHER", str(tmp_path / "other.txt"))
    experiment = read_experiment(QUICKSTART, [override])
    with pytest.raises(InputError) as caught:
        check_inputs(experiment, "inline")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_checks_return_prompts_and_outline(tmp_path):
    train, heldout, outline = check_inputs(read_experiment(QUICKSTART), "inline")
    assert (len(train), len(heldout)) == (2000, 200)
    rank, layers = shape_of_adapter(read_experiment(QUICKSTART, ["lora.targets=attn"]), outline)
    assert rank == 16
    assert "transformer_blocks.0.attn.to_q" in layers
    assert all(".attn." in layer for layer in layers)

    whole = load("embedded:glyphs")
    whole.adapters.add("policy", rank=2, alpha=4, targets="attn")
    for parameter in whole.adapters.parameters("policy"):
        parameter.data.fill_(0.01)
    file = export_diffusers(whole, "policy", tmp_path, {})
    started = read_experiment(QUICKSTART, [f"lora.start_from={file}"])
    *_, outline = check_inputs(started, "inline")
    rank, layers = shape_of_adapter(started, outline)
    assert (rank, set(layers)) == (2, set(whole.adapters.lora("policy").modules))


def test_the_files_of_a_run(tmp_path):
    (tmp_path / "head.pth").write_bytes(b"x")
    judge = "{name: vlm_judge, url: 'http://localhost:8000/v1', model: docs, max_requests: 1}"
    rewards = f"rewards.heldout=[{{name: clip_score, weights: 'embedded:glyphs-clip'}}, {judge}]"
    start = f"lora.start_from={tmp_path}"
    assert files_of(read_experiment(QUICKSTART, [rewards, start])) == {
        "embedded:glyphs": embedded("embedded:glyphs"),
        "embedded:glyphs-clip": embedded("embedded:glyphs-clip"),
        str(tmp_path): tmp_path,
    }
    (tmp_path / "mine.py").write_text("")
    code = f"python:{tmp_path}/mine.py:f"
    found = files_of(read_experiment(QUICKSTART, [f"rewards.heldout=[{{name: '{code}'}}]"], allow_code=True))
    assert found[code] == tmp_path / "mine.py"
    assert weights_hash(tmp_path / "head.pth") == hashlib.sha256(b"x").hexdigest()


def test_the_digest_depends_on_text_order_and_columns():
    one, other = Prompt("1", "a", {"wish": 1}), Prompt("2", "b", {})
    assert digest([one, other]) != digest([other, one])
    assert digest([one]) != digest([Prompt("1", "a", {"wish": 2})])
    assert digest([one]) == digest([Prompt("1", "a", {"wish": 1})])


def test_warnings_about_shared_prompts_and_undetectable_hacking(capsys):
    check_inputs(read_experiment(QUICKSTART, ["prompts.heldout=embedded:glyphs/train", "rewards.heldout=[]"]), "ray")
    printed = capsys.readouterr().err
    assert "2000 prompts are in both prompts.train and prompts.heldout" in printed
    assert "only diversity is watched for reward hacking" in printed
