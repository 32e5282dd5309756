import json

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from inputs import hub_revision, is_on_hub
from rewards.parts.files import model_folder


def refused(weights) -> str:
    with pytest.raises(ValueError, match=r"^weights ") as error:
        model_folder(str(weights), "clip")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_itself(clip_folder):
    assert model_folder(str(clip_folder), "clip") == clip_folder


def test_invalid_folders(tmp_path):
    assert "no such file or folder; allowed: a local one or a hub id owner/name" in refused(tmp_path / "none")
    assert "no such file or folder" in refused("clip")
    assert "not a transformers model folder (no config.json)" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    assert "model_type in config.json is 'siglip'; allowed: 'clip'" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "pytorch_model.bin").touch()
    assert "no .safetensors file" in refused(tmp_path)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/owner/name"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (errors.GatedRepoError("403", response=response(403)), "accept its licence at https://huggingface.co/owner/name"),
        (errors.RepositoryNotFoundError("401", response=response(401)), "is neither a local folder nor found on the hub"),
        (errors.HfHubHTTPError("500 oops\nmore", response=response(500)), "cannot be read from the hub: 500 oops"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"),
        (httpx2.ConnectError("no name"), "the hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub_are_one_line(cache, monkeypatch, error, line):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "auth_check", fail)
    said = refused("owner/name")
    assert said.startswith("weights 'owner/name': it ")
    assert line in said


def test_a_cached_hub_model_needs_no_network(cache, monkeypatch, clip_folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (cache / "models--owner--name" / "snapshots").mkdir(parents=True)
    (cache / "models--owner--name" / "snapshots" / commit).symlink_to(clip_folder)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text(commit)
    assert model_folder("owner/name", "clip") == cache / "models--owner--name" / "snapshots" / commit


def test_the_revision_is_the_hub_s_or_else_the_cached_one(cache, monkeypatch):
    class Hub:
        def model_info(self, hub_id, timeout):
            assert hub_id == "owner/name"
            return huggingface_hub.hf_api.ModelInfo(id=hub_id, sha="abc123", **dict.fromkeys(("private", "downloads", "likes")))

    class Away:
        def model_info(self, hub_id, timeout):
            raise httpx2.ConnectError("no name")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert hub_revision("owner/name") == "abc123"
    monkeypatch.setattr(huggingface_hub, "HfApi", Away)
    with pytest.raises(ValueError, match="the hub cannot be reached"):
        hub_revision("owner/name")
    head = cache / "models--owner--name" / "refs" / "main"
    head.parent.mkdir(parents=True)
    head.write_text("def456\n")
    assert hub_revision("owner/name") == "def456"


def test_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("owner/name")
    assert not is_on_hub("embedded:glyphs")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_on_hub("owner/name"), "a local folder goes first, as it does when it is loaded"
