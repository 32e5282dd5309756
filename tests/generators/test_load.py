import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from generators import download, embedded, load, resolve, weights_hash
from generators.load import EMBEDDED


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(weights: object, **options) -> str:
    with pytest.raises(ValueError, match=r"^(weights|family) ") as error:
        resolve(str(weights), **options)
    return one_line(error)


def test_a_local_folder(folder):
    assert resolve(str(folder)) == download(str(folder)) == folder
    generator = load(str(folder))
    assert (generator.dtype, generator.device, generator.max_sequence_length) == (torch.float32, torch.device("cpu"), 0)
    assert generator.adapters.names == ()
    assert load(str(folder), gradient_checkpointing=True).transformer.is_gradient_checkpointing


def test_wrong_dtype_and_family(folder):
    allowed = r"\(allowed: bfloat16, float32\)"
    with pytest.raises(ValueError, match=rf"dtype 'bfloat15': not known; did you mean 'bfloat16'\? {allowed}"):
        load(str(folder), dtype="bfloat15")
    assert refused(folder, family="sd4") == "family 'sd4': not known; did you mean 'sd3'? (allowed: sd3)"


def test_embedded_names():
    assert embedded("embedded:glyphs-clip") == EMBEDDED["glyphs-clip"]
    assert EMBEDDED["glyphs"].parent.joinpath("networks.py").is_file()
    allowed = "(allowed: glyphs, glyphs-clip, glyphs-rewriter)"
    expected = f"weights 'embedded:glyps': no such embedded model; did you mean 'glyphs'? {allowed}"
    assert refused("embedded:glyps") == expected


def test_a_gpu_that_is_missing(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda:1': PyTorch sees no GPU \(allowed: cpu\)"):
        load(str(folder), device="cuda:1")


def test_folders_that_are_not_generators(tmp_path, folder):
    assert "there is no such folder (allowed: embedded:NAME, a local diffusers folder" in refused(tmp_path / "none")
    assert "there is no such folder" in refused("./sd3/medium")
    assert "there is no such folder" in refused("sd3")
    assert "not a diffusers pipeline folder (no model_index.json)" in refused(tmp_path)
    assert "not a diffusers pipeline folder" in refused(folder / "model_index.json")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert ": a FluxPipeline, but family sd3 is a StableDiffusion3Pipeline" in refused(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub that answers with the given error."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def answer(error: Exception) -> None:
        def fail(*arguments, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "auth_check", fail)

    return answer


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/owner/name"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.GatedRepoError("403", response=response(403)),
            "is gated: accept its licence at https://huggingface.co/owner/name and log in with `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError("401", response=response(401)),
            "is neither a local folder nor found on the hub; if it is",
        ),
        (
            errors.RemoteEntryNotFoundError("404", response=response(404)),
            "lacks a file on the hub: 404",
        ),
        (errors.HfHubHTTPError("500 oops\nmore", response=response(500)), "cannot be read from the hub: 500 oops"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"),
        (httpx2.ConnectError("no name"), "the hub cannot be reached"),
        (errors.LocalEntryNotFoundError("not cached"), "the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub_are_one_line(hub, error, line):
    hub(error)
    message = refused("owner/name")
    assert message.startswith("weights 'owner/name': ")
    assert line in message


@pytest.mark.parametrize("error", [KeyError("bug"), OSError(28, "No space left on device")])
def test_other_errors_pass_through(hub, error):
    hub(error)
    with pytest.raises(type(error), match=str(error.args[-1])):
        resolve("owner/name")


def test_offline_fails_at_once(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refused("owner/name")


@pytest.mark.parametrize("t5", [True, False])
def test_a_cached_hub_model_needs_no_network(hub, monkeypatch, tmp_path, t5_folder, t5):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache, commit = tmp_path / "cache" / "models--owner--name", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(t5_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    if not t5:
        shutil.rmtree(cache / "snapshots" / commit / "text_encoder_3")
    assert resolve("owner/name") == cache / "snapshots" / commit
    generator = load("owner/name", t5=t5)
    assert (generator.pipeline.text_encoder_3 is not None) == t5
    assert generator.max_sequence_length == 256


def test_the_hash_is_of_weights_and_configs(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("words")
    assert weights_hash(copy) == weights_hash(folder)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert weights_hash(copy) != weights_hash(folder)


def test_the_package_imports_nothing_heavy():
    heavy = {"torch", "diffusers", "peft", "transformers", "huggingface_hub"}
    code = f"import sys, generators; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
