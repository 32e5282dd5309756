import gzip
import logging
import os
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from rewards.parts import compat

HPSV2 = pytest.mark.skipif(find_spec("hpsv2") is None, reason="hpsv2 is not installed; make rewards")
IMAGE_REWARD = pytest.mark.skipif(find_spec("ImageReward") is None, reason="image-reward is not installed; make rewards")
ROOT = Path(__file__).parents[3]


def test_what_is_not_installed_is_named():
    compat.check_installed("x", ("torch", "json"))
    with pytest.raises(ValueError, match=r"^backend 'x' needs no_such_a, no_such_b \(not installed\); run `make rewards`"):
        compat.check_installed("backend 'x'", ("no_such_a", "torch", "no_such_b"))


FITS = "import torch"
OPERATOR_MISSING = """
import torch
@torch.library.register_fake("torchvision::nms")
def fake(dets, scores, iou_threshold):
    return dets
"""
BROKEN_OTHERWISE = "raise RuntimeError('no space left')"


def ensured(folder, source) -> str:
    """What `ensure_torchvision` returns, twice, in a process whose torchvision is this source."""
    if source is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(source)
    code = "from rewards.parts import compat; print(compat.ensure_torchvision(), compat.ensure_torchvision())"
    code += "; import torchvision" if source is not None else ""
    paths = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **paths}, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.splitlines()[-1]


def test_torchvision_that_does_not_fit_torch(tmp_path):
    """The fake fails like the real one, whose compiled part cannot be loaded."""
    assert ensured(tmp_path, OPERATOR_MISSING) == "declared declared"


def test_torchvision_that_fits_is_left_alone(tmp_path):
    assert ensured(tmp_path, FITS) == "native native"


def test_torchvision_that_fails_otherwise_still_fails(tmp_path):
    assert ensured(tmp_path, BROKEN_OTHERWISE) == "RuntimeError: no space left"


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_no_torchvision(tmp_path):
    assert ensured(tmp_path, None) == "absent absent"


@pytest.mark.parametrize(
    ("fix", "missing", "module", "name"),
    [
        (compat.no_clint, "clint", "clint.textui", "progress"),
        (compat.no_turtle, "_tkinter", "turtle", "forward"),
        (compat.no_clip, "clip", "clip", "load"),
        (compat.no_fairscale, "fairscale", "fairscale.nn.checkpoint.checkpoint_activations", "checkpoint_wrapper"),
    ],
)
def test_stubs_exist_only_during_an_import(monkeypatch, fix, missing, module, name):
    monkeypatch.setattr(compat, "find_spec", lambda asked: None if asked == missing else find_spec(asked))
    before = set(sys.modules)
    with fix():
        assert hasattr(import_module(module), name)
        assert find_spec(module) is not None, "others may ask for it, and must not stumble"
    assert set(sys.modules) == before


@pytest.mark.parametrize("fix", [compat.no_clint, compat.no_turtle, compat.no_clip, compat.no_fairscale])
def test_what_is_installed_is_left_alone(monkeypatch, fix):
    monkeypatch.setattr(compat, "find_spec", lambda asked: object())
    before = dict(sys.modules)
    with fix():
        assert dict(sys.modules) == before


def test_a_stub_that_is_called_raises(monkeypatch):
    monkeypatch.setattr(compat, "find_spec", lambda asked: None)
    with compat.no_clip():
        load = import_module("clip").load
    with pytest.raises(NotImplementedError, match=r"^clip\.load is a stub"):
        load("ViT-L/14")


def test_the_missing_vocabulary_is_read_from_open_clip(monkeypatch, tmp_path):
    present = tmp_path / "here" / compat.VOCABULARY
    substitute = tmp_path / "open_clip" / compat.VOCABULARY
    for file in (present, substitute):
        file.parent.mkdir()
        file.write_bytes(gzip.compress(file.parent.name.encode()))
    monkeypatch.setattr(compat, "open_clip_vocabulary", lambda: substitute)

    def read(path):
        with gzip.open(path) as file:
            return file.read()

    original = gzip.open
    with compat.vocabulary():
        assert read(str(tmp_path / "gone" / compat.VOCABULARY)) == b"open_clip"
        assert read(present) == b"here"
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "other.gz")
    assert gzip.open is original


def test_no_vocabulary(monkeypatch):
    monkeypatch.setattr(compat, "find_spec", lambda asked: None)
    with pytest.raises(ValueError, match=r"^hpsv2 needs bpe_simple_vocab_16e6\.txt\.gz of open_clip"):
        compat.open_clip_vocabulary()


def test_an_import_s_side_effects_end_with_it(monkeypatch):
    from transformers.utils import logging as transformers_logging

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    verbosity, filters = transformers_logging.get_verbosity(), list(warnings.filters)
    with compat.no_side_effects():
        warnings.filterwarnings("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert warnings.filters == filters
    assert transformers_logging.get_verbosity() == verbosity
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with compat.no_side_effects():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_vanished_names_come_back_for_the_import():
    from transformers import modeling_utils, pytorch_utils

    names = ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices")
    before = [name for name in names if hasattr(modeling_utils, name)]
    with compat.vanished_names():
        assert all(hasattr(modeling_utils, name) for name in names)
        assert modeling_utils.apply_chunking_to_forward is pytorch_utils.apply_chunking_to_forward
    assert [name for name in names if hasattr(modeling_utils, name)] == before


def test_a_bert_of_old_gets_its_methods():
    from transformers import BertConfig, PreTrainedModel

    class Old(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(2, 2)
            self.init_weights()

        def _init_weights(self, module):
            if isinstance(module, nn.Linear):
                module.weight.data.fill_(0.5)

    compat.complete_bert(Old)
    model = Old(BertConfig())
    assert (model.linear.weight == 0.5).all()
    assert model.get_head_mask(None, 3) == [None, None, None]
    mask = model.invert_attention_mask(torch.tensor([[1, 1, 0]]))
    assert mask.shape == (1, 1, 1, 3)
    assert mask.flatten().tolist() == [0, 0, torch.finfo(torch.float32).min]


@HPSV2
def test_hpsv2_can_be_imported_without_tkinter_and_leaves_nothing_behind():
    code = """
import sys
from importlib.util import find_spec
from rewards.parts import compat
compat.find_spec = lambda name: None if name == "_tkinter" else find_spec(name)
compat.ensure_torchvision()
import transformers, gzip
opened = gzip.open
with compat.importing_hpsv2():
    from hpsv2.src.open_clip import CLIP, tokenize
    from hpsv2 import img_score
import hpsv2
assert gzip.open is opened
left = sorted({"clint", "turtle"} & set(sys.modules))
print(left, tuple(tokenize(["a cat"]).shape), tokenize(["a cat"])[0, :4].tolist())
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] (1, 77) [49406, 320, 2368, 49407]"


@IMAGE_REWARD
def test_image_reward_can_be_imported_and_leaves_nothing_behind():
    code = """
import sys
from rewards.parts import compat
compat.ensure_torchvision()
from transformers import modeling_utils
from transformers.utils import logging
before = logging.get_verbosity()
with compat.importing_image_reward():
    import ImageReward
assert logging.get_verbosity() == before
print(sorted({"clip", "fairscale"} & set(sys.modules)), hasattr(modeling_utils, "find_pruneable_heads_and_indices"))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[] False"
