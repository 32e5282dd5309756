"""Real images with captions: every source, what is missing or broken, and their latents with and without a store."""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from diffusion import Group, Plan, Prompt
from generators import load
from inputs.images import ImageError, read_image
from rollouts import read_prompts
from rollouts.images import Images, fitted, open_images
from rollouts.records import RecordStore
from worlds import glyphs

CAPTIONS = ["a red circle", "a blue square", "a green cross"]
COLORS = [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
PLAN = Plan(source="images", scored=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(color, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def folder(path, captions="txt"):
    (path / "below").mkdir(parents=True)
    names = ["a.png", "b.PNG", "below/c.png"]
    for name, color in zip(names, COLORS, strict=True):
        (path / name).write_bytes(png(color))
    if captions == "txt":
        for name, text in zip(names, CAPTIONS, strict=True):
            (path / name).with_suffix(".txt").write_text(f"{text}\n")
    else:
        rows = [{"file_name": name, "text": text, "score": 1.5} for name, text in zip(names, CAPTIONS, strict=True)]
        (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def web(path, caption="txt"):
    files = []
    for i, (color, text) in enumerate(zip(COLORS, CAPTIONS, strict=True)):
        data = text.encode() if caption == "txt" else json.dumps({"text": text, "score": i}).encode()
        files += [(f"{i}.png", png(color)), (f"{i}.{caption}", data)]
    return tar(path, files)


def table():
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": png(color), "path": None} for color in COLORS], "text": CAPTIONS},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )


def make_source(kind, path):
    if kind.startswith("folder"):
        return folder(path / "images", kind.removeprefix("folder-"))
    if kind == "tar":
        return web(path / "a.tar")
    if kind == "tar-json":
        return web(path / "a.tar", "json")
    if kind == "tars":
        (path / "shards").mkdir()
        return web(path / "shards" / "0.tar").parent
    if kind == "saved":
        table().save_to_disk(path / "saved")
        return path / "saved"
    rows = {"image": [{"bytes": png(color), "path": "x"} for color in COLORS], "prompt": CAPTIONS}
    parquet.write_table(pyarrow.table(rows), path / "p.parquet")
    return path / "p.parquet"


KINDS = ["folder-txt", "folder-jsonl", "tar", "tar-json", "tars", "saved", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_has_captions_and_images(kind, tmp_path):
    source = str(make_source(kind, tmp_path))
    prompts = read_prompts(source)
    assert [prompt.text for prompt in prompts] == CAPTIONS
    assert not any(isinstance(value, (bytes, Image.Image)) for prompt in prompts for value in prompt.meta.values())
    images = open_images(source, prompts)
    for i in (2, 0, 1):
        name, data = images(prompts[i])
        assert read_image(data, name).getpixel((0, 0)) == COLORS[i]
    if kind == "tar":
        assert prompts[0] == Prompt("1", CAPTIONS[0])
    if kind == "tar-json":
        assert prompts[2] == Prompt("3", CAPTIONS[2], {"score": 2})
    if kind == "folder-jsonl":
        assert prompts[0] == Prompt("a.png", CAPTIONS[0], {"score": 1.5})


def test_a_hub_dataset(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table())
    prompts = read_prompts("hf:owner/name:train:text")
    assert prompts[1] == Prompt("2", CAPTIONS[1])
    name, data = open_images("hf:owner/name:train:text", prompts)(prompts[1])
    assert (name, read_image(data, name).getpixel((0, 0))) == ("hf:owner/name:train:text, row 2", COLORS[1])


def test_a_glyph_caption_has_one_render():
    prompts = read_prompts("embedded:glyphs/train")[:3]
    images = open_images("embedded:glyphs/train", prompts)
    data = [images(prompt)[1] for prompt in prompts]
    assert data == [images(prompt)[1] for prompt in prompts]
    expected = glyphs.render([glyphs.parse(prompts[2].text)], seed=3)[0]
    found = fitted(read_image(data[2], "x"), (32, 32))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 / 255 + 1e-6)


def refused(path, image_set=False):
    prompts = read_prompts(str(path)) if image_set else []
    with pytest.raises(ValueError, match=r"^prompts") as error:
        open_images(str(path), prompts) if image_set else read_prompts(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_captions_and_files_that_are_missing(tmp_path):
    one = folder(tmp_path / "one")
    (one / "b.txt").unlink()
    assert "b.PNG has no caption, neither in metadata.jsonl nor in b.txt beside it" in refused(one)
    (one / "b.txt").write_text(" \n")
    assert "row 2: text '' is not a text" in refused(one)
    other = folder(tmp_path / "other", "jsonl")
    (other / "a.png").unlink()
    assert "metadata.jsonl: a.png is not in the folder, or is no image" in refused(other)
    (other / "metadata.jsonl").write_text('{"text": "a"}')
    assert "metadata.jsonl, line 1: not a JSON object with file_name" in refused(other)
    (tmp_path / "x.tar").write_bytes(b"no")
    assert "x.tar is not a tar file, or damaged" in refused(tmp_path / "x.tar")
    (tmp_path / "p.txt").write_text("a\nb")
    assert "has no images, only texts" in refused(tmp_path / "p.txt", image_set=True)
    parquet.write_table(pyarrow.table({"text": CAPTIONS}), tmp_path / "p.parquet")
    assert "has no column of images (columns: text)" in refused(tmp_path / "p.parquet", image_set=True)


def test_an_image_that_is_missing_is_one_line(tmp_path):
    one = folder(tmp_path / "one")
    prompts = read_prompts(str(one))
    images = open_images(str(one), prompts)
    (one / "a.png").unlink()
    with pytest.raises(ImageError, match=r"^image .*/one/a.png: No such file or directory$"):
        images(prompts[0])
    rows = {"image": [None, {"bytes": png(COLORS[0]), "path": ""}, {"bytes": None, "path": "/nowhere/x.png"}]}
    parquet.write_table(pyarrow.table({**rows, "text": CAPTIONS}), tmp_path / "p.parquet")
    source = str(tmp_path / "p.parquet")
    prompts = read_prompts(source)
    images = open_images(source, prompts)
    assert images(prompts[1])[1] == png(COLORS[0])
    with pytest.raises(ImageError, match=r"p.parquet, row 1: there is none in column image$"):
        images(prompts[0])
    with pytest.raises(ImageError, match=r"row 3: /nowhere/x.png: No such file"):
        images(prompts[2])


def test_bytes_are_no_part_of_a_prompt(tmp_path):
    rows = {
        "text": CAPTIONS,
        "jpg_0": [png(color) for color in COLORS],
        "pair": [[png(color)] for color in COLORS],
        "score": [1, 2, 3],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"))[0] == Prompt("1", CAPTIONS[0], {"score": 1})


def test_fitting_keeps_the_centre_and_the_aspect_ratio():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    found = fitted(Image.fromarray(wide), (10, 10))
    assert found.shape == (3, 10, 10)
    assert found.min() == 1, "the middle ten columns"
    assert fitted(Image.new("RGB", (1, 1), "white"), (8, 16)).shape == (3, 8, 16)


def source_of(path, store, images=None):
    generator = load("embedded:glyphs")
    identity = {"weights": "w", "family": "sd3"}
    prompts = read_prompts(str(path))
    source = Images(generator, images or open_images(str(path), prompts), (32, 32), store, identity)
    return source, [Group(prompt, i, [10 + i]) for i, prompt in enumerate(prompts)]


def test_latents_are_those_of_each_image_alone_and_are_encoded_once(tmp_path, monkeypatch):
    one = folder(tmp_path / "one")
    source, groups = source_of(one, RecordStore(tmp_path / "store"))
    drawn = source.take(groups, PLAN)
    assert (drawn.nfe, drawn.images) == (0, None)
    assert drawn.rollout.trajectory.t.tolist() == [0]
    assert [prompt.text for prompt in drawn.rollout.sample_prompts] == CAPTIONS
    assert drawn.rollout.seeds.tolist() == [10, 11, 12]
    for row, color in enumerate(COLORS):
        image = torch.tensor(color).float().div(255)[None, :, None, None].expand(1, 3, 32, 32)
        assert torch.equal(drawn.rollout.trajectory.x[row], source.generator.encode_images(image))
    later, _ = source_of(one, RecordStore(tmp_path / "store"))
    monkeypatch.setattr(type(later.generator), "encode_images", None)
    again = later.take(groups[1:], PLAN)
    assert torch.equal(again.rollout.trajectory.x, drawn.rollout.trajectory.x[1:])
    monkeypatch.undo()
    fresh, _ = source_of(one, None)
    assert torch.equal(fresh.take(groups, PLAN).rollout.trajectory.x, drawn.rollout.trajectory.x)


def test_a_file_whose_content_changed_is_encoded_again(tmp_path):
    one = folder(tmp_path / "one")
    source, groups = source_of(one, RecordStore(tmp_path / "store"))
    before = source.take(groups[:1], PLAN).rollout.trajectory.x
    (one / "a.png").write_bytes(png(COLORS[1]))
    assert not torch.equal(source.take(groups[:1], PLAN).rollout.trajectory.x, before)


def test_a_broken_file_ends_the_step_with_its_name(tmp_path):
    one = folder(tmp_path / "one")
    (one / "b.PNG").write_bytes(png(COLORS[0])[:60])
    source, groups = source_of(one, None)
    with pytest.raises(ImageError, match=r"^image .*b.PNG: cannot be read as an image \(60 bytes\)"):
        source.take(groups, PLAN)
