import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rewards
from diffusion.types import Prompt
from rewards.mixture import RewardError
from rewards.parts import compat
from rewards.scorers import ocr
from rewards.scorers.ocr import OCR, closeness, edit_distance, plain, quoted, requested_text

PACKAGE = pytest.mark.skipif(bool(compat.missing(OCR.facts.packages)), reason="rapidocr is not installed; make rewards")


def written(text, side=128, size=32):
    """[1, 3, side, side] with the text in its middle, size pixels high."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text((side / 2, side / 2), text, "black", ImageFont.load_default(size), anchor="mm", align="center")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def prompts(*captions):
    return [Prompt(str(i), caption) for i, caption in enumerate(captions)]


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ('a sign that says "STOP"', ["STOP"]),
        ("a sign that says “STOP”", ["STOP"]),
        ("a 'STOP' sign", ["STOP"]),
        ("a ‘STOP’ sign", ["STOP"]),
        ("it's a 'STOP' sign on the dogs' lawn", ["STOP"]),
        ("it’s a ‘STOP’ sign on the dogs’ lawn", ["STOP"]),
        ("a mug with 'it's late'", ["it's late"]),
        ("a mug with ‘it’s late’", ["it’s late"]),
        ("a '90s poster of 'DISCO'", ["DISCO"]),
        ("""it's a poster: "the dogs' 'home'" """, ["the dogs' 'home'"]),
        ('"OPEN" over “24 hours”', ["OPEN", "24 hours"]),
        ("'OPEN' over '24 hours'", ["OPEN", "24 hours"]),
        ('写着"停"的牌子', ["停"]),
        ("it's the dogs' lawn", []),
        ('a 12" pizza', []),
        ('an empty sign, ""', []),
    ],
)
def test_quoted(caption, texts):
    assert quoted(caption) == texts


def test_plain():
    assert plain(" Hello\tWorld\n") == "helloworld"
    assert plain("ＯＰＥＮ：２４") == "open:24"
    assert plain("Cafe\N{COMBINING ACUTE ACCENT}") == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("abc", "acb", 2),
        ("flaw", "lawn", 2),
        ("", "", 0),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("read", "score"),
    [
        ("stop", 1),
        ("nonstopflights", 1),
        ("stp", 0.75),
        ("shop", 0.75),
        ("st", 0.5),
        ("", 0),
        ("stxxop", 0.5),
        ("xxxxxxxxx", 0),
    ],
)
def test_closeness(read, score):
    assert closeness(read, "stop") == score


def test_requested_text():
    assert requested_text(Prompt("1", 'the "Grand" old "Hotel"')) == "grandhotel"
    assert requested_text(Prompt("1", 'a "STOP" sign', {"ocr_text": "Halt"})) == "halt"
    assert requested_text(Prompt("1", 'a "STOP" sign', {"ocr_text": None})) == "stop"
    assert requested_text(Prompt("1", "the year", {"ocr_text": 1999})) == "1999"
    assert requested_text(Prompt("1", 'a sign, " "')) == ""


@pytest.fixture
def seen(monkeypatch):
    """The images that a fake reader got; it reads their brightness, 0 to 255."""
    images = []

    def read(image):
        images.append(image)
        return str(image.max())

    monkeypatch.setattr(ocr, "reader", lambda *_: read)
    return images


def test_each_image_is_read_in_8_bits_and_compared_with_its_caption(seen):
    images = torch.tensor([1.0, 0.2, 0.0]).view(3, 1, 1, 1).expand(3, 3, 4, 5).clone()
    images[1, 2] = 0.5
    scores = OCR()(images, prompts('"255"', '"1 2 9"', '"no"'))
    assert scores.total.tolist() == [1.0, pytest.approx(2 / 3), 0.0]  # 128 for 129
    assert [image.shape for image in seen] == [(4, 5, 3)] * 3
    assert seen[1].dtype == np.uint8
    assert seen[1][0, 0].tolist() == [51, 51, 128]


@pytest.mark.parametrize("caption", ["a red circle", 'a sign, ""', 'a sign, " "'])
def test_a_caption_without_text_stops_before_anything_is_read(seen, caption):
    with pytest.raises(RewardError, match=f"^reward sign, prompt {caption!r}: requests no text; allowed: words in quotation"):
        OCR(label="sign")(torch.zeros(2, 3, 8, 8), prompts('"STOP"', caption))
    assert seen == []


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(compat, "missing", lambda modules: [name for name in modules if name == "rapidocr"])
    entries = rewards.resolve([{"name": "ocr"}])
    for attempt in (lambda: rewards.check(entries), OCR):
        with pytest.raises(ValueError, match=r"^ocr needs rapidocr \(not installed\); run `make rewards`$"):
            attempt()


@pytest.fixture(scope="module")
def reward():
    return OCR()


@PACKAGE
@pytest.mark.parametrize(("side", "size"), [(128, 32), (256, 64), (256, 24)])
def test_the_right_text_scores_1_and_a_wrong_one_less(reward, side, size):
    images = torch.cat([written(text, side, size) for text in ("STOP", "Stop", "SHOP", "GO", "")])
    total = reward(images, prompts(*['a sign that says "stop"'] * 5)).total
    assert total.tolist() == [1.0, 1.0, 0.75, 0.25, 0.0]  # of GO the O is right


@PACKAGE
def test_lines_are_read_from_top_to_bottom(reward):
    image = written("GRAND\nHOTEL", 256, 48)
    for caption, score in (('"Grand Hotel"', 1.0), ("'Grand' above 'Hotel'", 1.0), ('"Hotel Grand"', 0.0)):
        assert reward(image, prompts(caption)).total.item() == score


@PACKAGE
def test_the_reader_gets_the_channels_it_takes(monkeypatch):
    from rapidocr.utils.load_image import LoadImage
    from rapidocr.utils.output import RapidOCROutput

    got = []
    monkeypatch.setattr(ocr, "_engine", lambda *_: lambda image, **_: got.append(image) or RapidOCROutput())
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert ocr.reader()(image) == ""
    assert np.array_equal(got[0], LoadImage()(Image.fromarray(image)))


@PACKAGE
def test_lines_of_little_confidence_can_be_left_out(reward):
    image, sign = written("STOP"), prompts('"STOP"')
    engine = ocr._engine("", 736, 1)
    confidence = engine((image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8), use_cls=False).scores[0]
    assert 0.9 < confidence < 1
    assert OCR(min_confidence=confidence)(image, sign).total.item() == 1.0
    assert OCR(min_confidence=1.0)(image, sign).total.item() == 0.0


@PACKAGE
def test_networks_are_loaded_once_for_all_scorers_alike():
    before = ocr._engine.cache_info().currsize
    OCR(shortest_side=320)
    OCR(shortest_side=320, min_confidence=0.5)
    assert ocr._engine.cache_info().currsize == before + 1


@PACKAGE
def test_it_uses_as_many_threads_as_torch():
    engine = ocr._engine("", 736, 1)
    for part in (engine._load_det_model(), engine._load_rec_model()):
        assert part.session.session.get_session_options().intra_op_num_threads == 1


@PACKAGE
def test_nothing_is_downloaded(monkeypatch):
    from rapidocr.utils.download_file import DownloadFile

    def refuse(*_):
        raise AssertionError("it downloads")

    monkeypatch.setattr(DownloadFile, "run", refuse)
    assert OCR(shortest_side=352)(written("STOP"), prompts('"STOP"')).total.item() == 1.0


@PACKAGE
def test_a_recogniser_of_one_s_own(tmp_path):
    _, own = ocr._models("")
    file = shutil.copy(own, tmp_path / "mine.onnx")
    rewards.check(rewards.resolve([{"name": "ocr", "weights": str(file)}]))
    assert OCR(weights=str(file))(written("STOP"), prompts('"STOP"')).total.item() == 1.0


@PACKAGE
def test_invalid_recognisers(tmp_path):
    (tmp_path / "words.onnx").write_text("words")
    detector, _ = ocr._models("")
    for weights, problem in (
        (tmp_path / "missing.onnx", "no such file"),
        (tmp_path / "words.onnx", "not a network in ONNX"),
        (detector, "no list of characters"),
    ):
        with pytest.raises(ValueError, match=f"^weights '{weights}': {problem}"):
            OCR(weights=str(weights))
