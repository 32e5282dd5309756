"""How much of the text that the caption asks for can be read in the image: the OCR reward of flow_grpo, read by RapidOCR.

    score = 1 - min(d, n) / n       n = characters of the requested text
                                    d = 0 where the text read contains it, or else the edit distance between the two

Both sides in lower case and without white space. Text around the requested one costs nothing, which a policy may exploit.

The requested text is in the caption between quotation marks: "..." or “...”, and if there are none of these, '...' or ‘...’,
where an apostrophe inside a word is not a quotation mark. Several texts are joined in their order, as is the text read, line by
line and from left to right. A prompt's column `ocr_text` has precedence over its quotation marks.

The networks are PP-OCRv6's small ones in ONNX, which are part of the package rapidocr 3.10; nothing is downloaded.

The source is flow_grpo/ocr.py, read in a fork of github.com/yifan123/flow_grpo. Deviations:

* The reader there is PaddleOCR, made for English. Neither rotates lines that are upside down.
* It supports "..." only, takes the first one, and removes no white space but spaces.
* Characters are compared after Unicode's NFKC: full-width ones, accents separate from their letters.
* Every failure ends the run; there it is a score of 0.

Axis: B images.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffusion.types import Prompt, Scores
from rewards.mixture import RewardError
from rewards.parts import compat
from rewards.parts.facts import Facts

COLUMN = "ocr_text"
"""The column of a prompt set with the requested text."""
DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
"""In rapidocr's folder `models`: the network that finds lines of text, and the one that reads them."""
DOUBLE = re.compile(r'"([^"]+)"|“([^”]+)”')
SINGLE = re.compile(r"(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)|(?<!\w)‘((?:[^’]|(?<=\w)’(?=\w))+)’(?!\w)")


class OCR:
    """How much of the requested text can be read in the image, in [0, 1]. Not differentiable: text is recognised.

    Images are read one by one, on the CPU, with 8 bits a channel: scores do not depend on the batch. The networks are loaded
    once in a process and use as many threads as torch.
    """

    facts = Facts(differentiable=False, licence="Apache-2.0", packages=("rapidocr", "onnxruntime"))

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        weights: str = Field(
            "", description="A PP-OCR recogniser for other scripts, a local .onnx file; empty: the one in the package."
        )
        min_confidence: float = Field(0.0, ge=0, le=1, description="Lines that are read with less are ignored; flow_grpo: 0.")
        shortest_side: int = Field(
            736,
            ge=32,
            description="Pixels that smaller images are enlarged to. Time grows with its square.",
        )

    @staticmethod
    def check(weights: str, min_confidence: float, shortest_side: int) -> None:
        compat.check_installed("ocr", OCR.facts.packages)
        _models(weights)

    @staticmethod
    def check_prompt(prompt: Prompt) -> None:
        if not requested_text(prompt):
            raise ValueError(f"requests no text; allowed: words in quotation marks, or a column {COLUMN}")

    def __init__(self, weights: str = "", min_confidence: float = 0.0, shortest_side: int = 736, label: str = "ocr") -> None:
        """Raises ValueError unless the packages and their networks are installed, and `weights` is such a recogniser."""
        self.about = self.facts.about(label)
        self.read = reader(weights, min_confidence, shortest_side)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """images [B, 3, H, W] float32 in [0, 1] -> Scores over B. Raises RewardError for a prompt that requests no text."""
        for prompt in prompts:
            try:
                self.check_prompt(prompt)
            except ValueError as error:
                raise RewardError(f"reward {self.about.label}, prompt {prompt.text!r}: {error}") from None
        wanted = [requested_text(prompt) for prompt in prompts]
        arrays = (images.detach() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        values = [closeness(plain(self.read(array)), text) for array, text in zip(arrays, wanted, strict=True)]
        total = torch.tensor(values, dtype=torch.float32, device=images.device)
        return Scores(total, {self.about.label: total})


def requested_text(prompt: Prompt) -> str:
    """The text that the image should show, `plain`; empty if there is none."""
    given = prompt.meta.get(COLUMN)
    return plain("".join(quoted(prompt.text)) if given is None else str(given))


def quoted(caption: str) -> list[str]:
    """The texts between double quotation marks, or else between single ones."""
    for marks in (DOUBLE, SINGLE):
        if found := ["".join(groups) for groups in marks.findall(caption)]:
            return found
    return []


def plain(text: str) -> str:
    """The text in the form that is compared: NFKC, lower case, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def closeness(read: str, wanted: str) -> float:
    """1 where the text read contains the requested one, less by each wrong character, in [0, 1].

    Both `plain`; `wanted` is not empty.
    """
    return 1.0 if wanted in read else max(0.0, 1 - edit_distance(read, wanted) / len(wanted))


def edit_distance(a: str, b: str) -> int:
    """The smallest number of insertions, deletions and replacements that turn one into the other (Levenshtein)."""
    row = list(range(len(b) + 1))  # from the first i characters of a to the first j of b
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def reader(weights: str = "", min_confidence: float = 0.0, shortest_side: int = 736) -> Callable[[np.ndarray], str]:
    """A function: image [H, W, 3] uint8 RGB -> the text in it. Raises ValueError as the constructor does."""
    OCR.check(weights, min_confidence, shortest_side)
    engine = _engine(weights, shortest_side, min(torch.get_num_threads(), os.cpu_count() or 1))

    def read(image: np.ndarray) -> str:
        found = engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False)  # it takes BGR
        lines = zip(found.txts or (), found.scores or (), strict=True)
        return "".join(text for text, confidence in lines if confidence >= min_confidence)

    return read


@cache
def _engine(weights: str, shortest_side: int, threads: int) -> Any:
    """threads: at most the number of cores, otherwise RapidOCR takes all of them."""
    import cv2
    from rapidocr import RapidOCR

    detector, recogniser = _models(weights)
    if weights:
        _check_characters(recogniser)
    cv2.setNumThreads(threads)  # its default is all cores, too
    return RapidOCR(
        params={
            "Global.log_level": "error",  # it warns about every image without text
            "Global.text_score": 0.0,
            # As files: it downloads the ones it chooses itself again if they are not those it expects.
            "Det.model_path": str(detector),
            "Rec.model_path": str(recogniser),
            "Det.limit_side_len": shortest_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _models(weights: str) -> tuple[Path, Path]:
    """The files of detector and recogniser. Imports neither package."""
    spec = find_spec("rapidocr")
    assert spec is not None, "checked before this is called"
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "models")
    recogniser = Path(weights).expanduser() if weights else folder / RECOGNISER
    if weights and not recogniser.is_file():
        raise ValueError(f"weights {weights!r}: no such file; allowed: a local .onnx file, or '' for the package's own")
    for path in (folder / DETECTOR, recogniser):
        if not path.is_file():
            raise ValueError(f"ocr needs {path.name}, which is missing in the installed rapidocr; rapidocr 3.10 has it")
    return folder / DETECTOR, recogniser


def _check_characters(recogniser: Path) -> None:
    """Raises ValueError for a recogniser without its list of characters: RapidOCR would download one."""
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf

    options = SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = InferenceSession(recogniser, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf):
        raise ValueError(f"weights {str(recogniser)!r}: not a network in ONNX") from None
    if "character" not in session.get_modelmeta().custom_metadata_map:
        raise ValueError(f"weights {str(recogniser)!r}: no list of characters ('character' in the file's metadata)")
