"""The outline of a generator agrees with the loaded generator."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

from generators import lora_file, outline
from generators.families import FAMILIES
from generators.load import load
from generators.outline import read_outline

SINGLE = "transformer/diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"


def check(seen, generator):
    assert seen.linear == generator.adapters.linear
    assert seen.parameters == sum(parameter.numel() for parameter in generator.transformer.parameters()) + sum(
        buffer.numel() for name, buffer in generator.transformer.named_buffers() if name in seen.shapes
    )
    for size in [(None, None), (24, 16)]:
        assert seen.latent_shape(*size) == generator.latent_shape(*size)
        assert seen.tokens(*size) == generator.tokens(*size)
    for kind in (seen, generator):
        with pytest.raises(ValueError, match="height 33: not allowed here"):
            kind.latent_shape(33, None)


def test_the_embedded_teacher():
    check(outline("embedded:glyphs"), load("embedded:glyphs"))


def test_dual_attention_and_norms(folder):
    check(outline(str(folder)), load(str(folder)))


def test_sharded_weights(folder, tmp_path):
    whole = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).is_file()
    assert outline(str(tmp_path)).shapes == outline(str(folder)).shapes
    next((tmp_path / "transformer").glob("*-00001-of-*")).unlink()
    with pytest.raises(ValueError, match=r"transformer/.*-00001-of-.* is missing"):
        outline(str(tmp_path))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_model_is_asked_for_configs_and_headers_only(folder, tmp_path, monkeypatch, sharded):
    """The requests to a hub that holds the fixture's folder; tests never reach the real one."""
    remote = Path(folder)
    if sharded:
        whole = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        whole.save_pretrained(remote := tmp_path / "remote", max_shard_size="40KB")
    downloaded = []

    def download(hub_id, name):
        downloaded.append(name)
        return str(remote / name)

    def header(hub_id, name):
        from safetensors import safe_open

        with safe_open(remote / name, framework="numpy") as file:
            keys = list(file.keys())
            return SimpleNamespace(tensors={k: SimpleNamespace(shape=file.get_slice(k).get_shape()) for k in keys})

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", header)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda hub_id, name: (remote / name).is_file())
    seen, local = read_outline(tmp_path / "empty", FAMILIES["sd3"], "owner/name"), outline(str(folder))
    assert (seen.shapes, seen.configs["scheduler"]) == (local.shapes, local.configs["scheduler"])
    assert seen.latent_shape(24, 16) == local.latent_shape(24, 16)
    assert all(name.endswith(".json") for name in downloaded)
    assert (INDEX in downloaded) == sharded


def test_what_is_missing_is_named(folder, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    with pytest.raises(ValueError, match=r"scheduler/scheduler_config\.json is missing"):
        outline(str(tmp_path))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "UniPCMultistepScheduler"}))
    with pytest.raises(ValueError, match=f"{SINGLE} is missing"):
        outline(str(tmp_path))


def test_a_broken_header_or_config_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / SINGLE).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        outline(str(tmp_path / "copy"))
    (tmp_path / "copy" / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vae/config\.json has no block_out_channels"):
        outline(str(tmp_path / "copy"))


def test_options_of_the_time_grid_that_the_scheduler_lacks(folder):
    seen = outline(str(folder))
    seen.check_grid(3.0, even=True)
    seen = replace(seen, configs={**seen.configs, "scheduler": {"_class_name": "DDIMScheduler"}})
    seen.check_grid(None, even=False)
    with pytest.raises(ValueError, match=r"shift 3: a DDIMScheduler has no shift \(allowed: null\)"):
        seen.check_grid(3, even=False)
    with pytest.raises(ValueError, match=r"spacing 'even': a DDIMScheduler does not accept times \(allowed: scheduler\)"):
        seen.check_grid(None, even=True)


def test_names_of_diffusers():
    assert lora_file.FILE_NAME == LORA_WEIGHT_NAME_SAFE
    assert lora_file.METADATA_KEY == LORA_ADAPTER_METADATA_KEY
