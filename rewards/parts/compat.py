"""Workarounds that hpsv2 1.2.0 and image-reward 1.5 need with current libraries. `make rewards` installs both with --no-deps,
because the versions they pin would break the rest.

Every function names the symptom it fixes and when it is unnecessary, and does nothing where it is not needed. Stubs exist only
during an import. The two packages are imported in `hpsv2.py` and `image_reward.py` alone, inside `importing_hpsv2` and
`importing_image_reward`.
"""

from __future__ import annotations

import gzip
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HPSV2 = ("hpsv2", "torchvision", "ftfy", "regex")
IMAGE_REWARD = ("ImageReward", "torchvision", "timm")
"""What each package needs besides the core, by module name."""
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


def missing(modules: Sequence[str]) -> list[str]:
    """Those that are not installed. Imports none of them."""
    return [module for module in modules if module not in sys.modules and find_spec(module) is None]


def check_installed(what: str, modules: Sequence[str]) -> None:
    """Raises ValueError, about `what`, if a module is missing. Imports none of them."""
    if names := missing(modules):
        raise ValueError(f"{what} needs {', '.join(names)} (not installed); run `make rewards`")


@contextmanager
def importing_hpsv2() -> Iterator[None]:
    """Around `import hpsv2...`."""
    ensure_torchvision()
    with ExitStack() as stack:
        for fix in (no_side_effects(), no_clint(), no_turtle(), vocabulary()):
            stack.enter_context(fix)
        yield


@contextmanager
def importing_image_reward() -> Iterator[None]:
    """Around `import ImageReward`."""
    ensure_torchvision()
    with ExitStack() as stack:
        for fix in (no_side_effects(), no_clip(), no_fairscale(), vanished_names()):
            stack.enter_context(fix)
        yield


_operators: list[torch.library.Library] = []
"""Kept, since torch drops operators when their library is garbage-collected."""


def ensure_torchvision() -> str:
    """Fixes: "operator torchvision::nms does not exist" where torchvision is PyPI's CUDA build and torch is one for the CPU.

    Unnecessary where torchvision fits torch. Declares the two operators that torchvision's import requires; calling them raises
    an error. transformers and diffusers import the installed torchvision, so this must be called before they are imported.
    Returns "native", "absent" or "declared".
    """
    if find_spec("torchvision") is None:
        return "absent"
    if _operators:
        return "declared"
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return "native"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)
    import_module("torchvision")
    return "declared"


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Fixes: silenced warnings, a silenced transformers and TOKENIZERS_PARALLELISM=false in the whole process after the import.

    Both packages set these at import, in every version.
    """
    from transformers.utils import logging

    verbosity, parallelism = logging.get_verbosity(), os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.set_verbosity(verbosity)
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


@contextmanager
def no_clint() -> Iterator[None]:
    """Fixes: hpsv2 imports `clint.textui.progress`, a progress bar it never uses. Unnecessary where clint is installed."""
    if find_spec("clint") is None:
        with _stub("clint"), _stub("clint.textui", progress=None):
            yield
    else:
        yield


@contextmanager
def no_turtle() -> Iterator[None]:
    """Fixes: hpsv2 imports a name from `turtle`, which fails on a Python without tkinter. Unnecessary in hpsv2x 1.2.0."""
    if find_spec("_tkinter") is None:
        with _stub("turtle", forward=None):
            yield
    else:
        yield


@contextmanager
def vocabulary() -> Iterator[None]:
    """Fixes: hpsv2's wheel lacks CLIP's vocabulary, which it reads at import. Unnecessary in hpsv2x 1.2.0.

    The same file of open_clip (open_clip_torch) is read instead.
    """
    original = gzip.open

    def opened(filename: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(filename, (str, os.PathLike)) and Path(filename).name == VOCABULARY and not Path(filename).exists():
            filename = open_clip_vocabulary()
        return original(filename, *arguments, **options)

    with _replaced(gzip, "open", opened):
        yield


def open_clip_vocabulary() -> Path:
    """The file of CLIP's vocabulary in the package open_clip, which is not imported. Raises ValueError if it is missing."""
    spec = find_spec("open_clip")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder) / VOCABULARY).is_file():
            return file
    raise ValueError(f"hpsv2 needs {VOCABULARY} of open_clip, which is not installed; run `make rewards`")


@contextmanager
def no_clip() -> Iterator[None]:
    """Fixes: image-reward imports OpenAI's `clip`, not on PyPI under that name, for scores that this project does not use.

    Unnecessary where it is installed.
    """
    if find_spec("clip") is None:
        with _stub("clip", load=_unavailable("clip.load"), tokenize=_unavailable("clip.tokenize")):
            yield
    else:
        yield


@contextmanager
def no_fairscale() -> Iterator[None]:
    """Fixes: image-reward imports fairscale's checkpoint_wrapper, which only training with recomputation calls.

    Unnecessary where fairscale is installed.
    """
    if find_spec("fairscale") is None:
        with ExitStack() as stack:
            for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
                stack.enter_context(_stub(name))
            wrapper = _unavailable("fairscale's checkpoint_wrapper")
            stack.enter_context(_stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=wrapper))
            yield
    else:
        yield


@contextmanager
def vanished_names() -> Iterator[None]:
    """Fixes: image-reward imports three helpers from `transformers.modeling_utils`. Unnecessary up to transformers 4.55."""
    from transformers import modeling_utils, pytorch_utils

    with ExitStack() as stack:
        for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
            if not hasattr(modeling_utils, name):
                helper = getattr(pytorch_utils, name, _unavailable(f"transformers' {name}"))
                stack.enter_context(_replaced(modeling_utils, name, helper))
        yield


def complete_bert(bert: Any) -> None:
    """Fixes: image-reward's BERT calls methods that PreTrainedModel no longer has, or that need its newer attributes
    ("has no attribute 'all_tied_weights_keys'"). Unnecessary before transformers 5.

    bert: the package's BertPreTrainedModel, which is changed; nothing else uses it.
    """
    from transformers import PreTrainedModel

    def init_weights(self: Any) -> None:
        self.apply(self._init_weights)

    def get_head_mask(self: Any, head_mask: None, layers: int) -> list[None]:
        assert head_mask is None, "ImageReward masks no heads"
        return [None] * layers

    def invert_attention_mask(self: Any, mask: torch.Tensor) -> torch.Tensor:
        """[B, L], 1 where attention is allowed -> [B, 1, 1, L], to be added before the softmax."""
        return (1 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min

    if not hasattr(PreTrainedModel, "get_head_mask"):  # all three changed in one version
        bert.init_weights = init_weights
        bert.get_head_mask = get_head_mask
        bert.invert_attention_mask = invert_attention_mask


@contextmanager
def built_from(blip: Any, tokenizer: Any, visual_encoder: Any, width: int) -> Iterator[None]:
    """Fixes: image-reward's network downloads its tokenizer from the hub, reads its `additional_special_tokens_ids`, removed in
    transformers 5, and supports two sizes of its image tower only. No version accepts them as arguments.

    blip: the package's module `blip_pretrain`. Around the constructor.
    """
    with (
        _replaced(blip, "init_tokenizer", lambda: tokenizer),
        _replaced(blip, "create_vit", lambda *_: (visual_encoder, width)),
    ):
        yield


@contextmanager
def _stub(name: str, **attributes: Any) -> Iterator[None]:
    """An empty module of this name, with these attributes, inside the block; what was imported from it stays usable."""
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(attributes)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    had, before = hasattr(module, name), getattr(module, name, None)
    setattr(module, name, value)
    try:
        yield
    finally:
        if had:
            setattr(module, name, before)
        else:
            delattr(module, name)


def _unavailable(name: str) -> Any:
    def call(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"{name} is a stub: no score of this project needs it")

    return call
