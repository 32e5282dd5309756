"""What is known of a generator without loading it is what it turns out to be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

from generators import lora_file, outline
from generators.load import load
from generators.outline import INDEX, SINGLE, latent_shape, read_outline


def check(seen, generator):
    assert seen.linear == generator.adapters.linear
    assert seen.parameters == sum(parameter.numel() for parameter in generator.transformer.parameters()) + sum(
        buffer.numel() for name, buffer in generator.transformer.named_buffers() if name in seen.shapes
    )
    for size in [(None, None), (24, 16)]:
        assert seen.latent_shape(*size) == generator.latent_shape(*size)
    with pytest.raises(ValueError, match="height 33 is not allowed here"):
        seen.latent_shape(33, None)


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
    with pytest.raises(ValueError, match=r"no transformer/.*-00001-of-.* there"):
        outline(str(tmp_path))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_model_is_asked_for_configs_and_headers_only(folder, tmp_path, monkeypatch, sharded):
    """What is asked of the hub, against one that holds the fixture's folder; the real one is never reached in tests."""
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
    seen, local = read_outline(tmp_path / "empty", "owner/name"), outline(str(folder))
    assert (seen.shapes, seen.scheduler) == (local.shapes, local.scheduler)
    assert seen.latent_shape(24, 16) == local.latent_shape(24, 16)
    assert all(name.endswith(".json") for name in downloaded)
    assert (INDEX in downloaded) == sharded


def test_what_is_missing_is_named(folder, tmp_path):
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    with pytest.raises(ValueError, match=r"no scheduler/scheduler_config\.json there"):
        outline(str(tmp_path))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "UniPCMultistepScheduler"}))
    with pytest.raises(ValueError, match=f"no {SINGLE} there"):
        outline(str(tmp_path))


def test_a_broken_header_or_config_is_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / SINGLE).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        outline(str(tmp_path / "copy"))
    (tmp_path / "copy" / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vae/config\.json says no block_out_channels"):
        outline(str(tmp_path / "copy"))


def test_latent_shapes_by_hand():
    config = {"patch_size": 2, "pos_embed_max_size": 192, "sample_size": 128, "in_channels": 16}
    assert latent_shape(config, 8, None, None) == (16, 128, 128)
    assert latent_shape(config, 8, 768, 1344) == (16, 96, 168)
    with pytest.raises(ValueError, match="width 3088 is not allowed here: multiples of 16 up to 3072"):
        latent_shape(config, 8, None, 3088)


def test_a_shift_where_there_is_none(folder):
    seen = outline(str(folder))
    seen.check_grid(3.0, even=True)
    object.__setattr__(seen, "scheduler", {"_class_name": "DDIMScheduler"})
    seen.check_grid(None, even=False)
    with pytest.raises(ValueError, match="shift 3: a DDIMScheduler has none"):
        seen.check_grid(3, even=False)
    with pytest.raises(ValueError, match="spacing 'even': a DDIMScheduler takes no times from outside"):
        seen.check_grid(None, even=True)


def test_diffusers_words():
    assert lora_file.FILE_NAME == LORA_WEIGHT_NAME_SAFE
    assert lora_file.METADATA_KEY == LORA_ADAPTER_METADATA_KEY
