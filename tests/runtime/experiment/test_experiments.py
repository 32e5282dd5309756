"""Every shipped experiment passes the checks of `--dry-run`; those with real weights on a folder of the same layout."""

import json
import struct
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from generators.load import EMBEDDED, load
from generators.lora_file import save_lora
from runtime.experiment.checks import check_inputs, shape_of_adapter
from runtime.experiment.yaml import read_experiment
from runtime.run.plan import plan_text

EXPERIMENTS = sorted(
    path for path in (Path(__file__).parents[3] / "experiments").glob("*.yaml") if path.stem != "prompt_policy"
)
SD35 = [path for path in EXPERIMENTS if "sd35" in path.stem]


@pytest.fixture(scope="module")
def sd35_medium(tmp_path_factory):
    """The configs of Stable Diffusion 3.5 medium, with weights of which only the header is stored: the file is sparse."""
    folder = tmp_path_factory.mktemp("sd35-medium")
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_config(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    header, end = {}, 0
    for name, tensor in transformer.state_dict().items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    encoded = json.dumps(header).encode()
    with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def test_experiments_of_each_kind_exist():
    names = {path.stem for path in EXPERIMENTS}
    assert {
        f"{method}_{what}"
        for method in ("drtune", "refl", "draft")
        for what in ("symmetry_glyphs", "clip_glyphs", "sd35_hpsv2")
    } < names
    assert {
        *(f"{method}_glyphs" for method in ("ccm", "consistency", "reflow", "pcm", "dmd2", "ccm_reward", "ccm_then_grpo")),
        "ccm_sd35",
        *(f"adt_{what}" for what in ("glyphs", "distill_glyphs", "symmetry_glyphs", "sd35")),
    } < names


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A LoRA where an experiment expects the export of another run."""
    generator = load("embedded:glyphs")
    generator.adapters.add("policy", rank=4, alpha=4, targets="all-linear")
    file = tmp_path_factory.mktemp("distilled") / "pytorch_lora_weights.safetensors"
    save_lora(generator.adapters, "policy", file, {})
    return file


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if path not in SD35], ids=lambda path: path.stem)
def test_an_experiment_on_the_glyph_world_is_valid(path, distilled):
    raw = yaml.safe_load(path.read_text())
    after_another = [f"lora.start_from={distilled}"] if "start_from" in raw.get("lora", {}) else []
    experiment = read_experiment(path, after_another)
    train, _, generator = check_inputs(experiment, "ray")
    assert experiment.name == path.stem
    assert len(train) > 100
    assert "network evaluations" in plan_text(experiment, "ray", generator)


@pytest.mark.parametrize("path", SD35, ids=lambda path: path.stem)
def test_an_experiment_on_sd35_is_valid(path, sd35_medium, tmp_path):
    checkpoint = tmp_path / "HPS_v2.1_compressed.pt"
    checkpoint.touch()
    from_hub = {
        "generator.weights": sd35_medium,
        "prompts.train": "embedded:glyphs/train",
        "prompts.heldout": "embedded:glyphs/heldout",
        "rewards.train.0.weights": checkpoint,
        "rewards.train.0.tokenizer": EMBEDDED["glyphs"] / "tokenizer",
        "rewards.heldout.0.weights": EMBEDDED["glyphs-clip"],
    }
    if path.stem == "adt_sd35":
        from_hub["objective.features"] = "embedded:glyphs-clip"
    experiment = read_experiment(path, [f"{key}={here}" for key, here in from_hub.items()])
    _, _, generator = check_inputs(experiment, "inline")
    assert experiment.name == path.stem
    assert generator.parameters == 2_469_663_936, "2.24 billion parameters, and a table of positions"
    rank, layers = shape_of_adapter(experiment, generator)
    expected_rank, evaluations = {"ccm_sd35": (64, "1,920"), "adt_sd35": (32, "640")}.get(path.stem, (32, "1,600"))
    assert rank == expected_rank
    assert len(layers) == 24 * 8 - 1 + 13 * 4, "joint attention, without the last context output, and the image-only one"
    assert f"at most {evaluations} network evaluations without gradient" in plan_text(experiment, "inline", generator)
