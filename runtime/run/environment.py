"""The environment of a run: versions, hardware, git revision, hashes of the weights."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("odeon", "torch", "diffusers", "transformers", "peft", "accelerate", "ray", "numpy", "trl"),
    *("hpsv2", "image-reward", "rapidocr", "onnxruntime"),
)


def environment(weights: dict[str, str], prompts: dict[str, str]) -> dict[str, Any]:
    """weights, prompts: {what: sha256}. Packages that are not installed are omitted."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": git_revision(),
        "weights": weights,
        "prompts": prompts,
    }


def git_revision() -> str | None:
    """The commit of the code that runs, with "+changes" where the tree differs from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:  # no git
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
