"""A run's held-out evaluations: the same groups every time, compared with the frozen teacher, as metrics and an image grid."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from diffusion import Group, Prompt
from rollouts.worker import seed_groups
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.statistics import IMAGES_PER_PROMPT, heldout_metrics
from runtime.evaluation.watch import suspicions, watch_metrics
from runtime.experiment.config import Task
from runtime.run.folder import RunFolder, replaced

HELDOUT_ITERATION = 0
"""Training steps count from 1, so held-out noise is never training noise."""
LINES = 3
"""Of a caption under its images."""


def heldout_groups(prompts: Sequence[Prompt], seed: int) -> list[Group]:
    """The same noise at every evaluation of a run."""
    return seed_groups(prompts, IMAGES_PER_PROMPT, seed, HELDOUT_ITERATION)


def baseline(folder: RunFolder, evaluate_teacher: Callable[[], Evaluated]) -> Evaluated:
    """The frozen teacher on the held-out prompts; evaluated once per run, then read from its file."""
    file = folder.path / "teacher.safetensors"
    if not file.exists():
        with replaced(file) as temporary:
            evaluate_teacher().save(temporary)
    return Evaluated.load(file)


def evaluation_metrics(task: Task, result: Evaluated, teacher: Evaluated, saturated: float | None = None) -> dict[str, Any]:
    """The metrics of an evaluation; `hacking`, where reward hacking is suspected, gives the reasons as sentences.

    saturated: see `suspicions`.
    """
    line: dict[str, Any] = heldout_metrics(result, teacher)
    line |= watch_metrics(result, teacher, {"total", *task.trained_labels})
    if found := suspicions(line, result, teacher, task.watch, saturated):
        line["hacking"] = found
    return line


def save_samples(folder: Path, images: Tensor, teacher: Tensor, groups: Sequence[Group]) -> None:
    """grid.png: the first held-out prompts, each with the teacher's image above the policy's on the same noise; captions.txt.

    images, teacher: [B, H, W, 3] uint8.
    """
    folder.mkdir(parents=True, exist_ok=True)
    captions = [group.prompt.text for group in groups[: len(images)]]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    scale = max(1, 96 // images.shape[2])
    height, width = images.shape[1] * scale, images.shape[2] * scale
    size = max(10, width // 24)
    cell = 2 * height + LINES * (size + 2) + 6
    columns = min(8, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x, y = i % columns * width, i // columns * cell
        for row, some in enumerate((teacher, images)):
            image = Image.fromarray(some[i].numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y + row * height))
        lines = textwrap.wrap(caption, int(width / size * 1.8), max_lines=LINES, placeholder=" ...")
        draw.multiline_text((x + 2, y + 2 * height + 1), "\n".join(lines), "black", font_size=size, spacing=1)
    sheet.save(folder / "grid.png")
