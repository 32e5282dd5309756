"""The teacher's images above those of a distilled run with 1, 2 and 4 steps, on the same captions and noise.

The first held-out captions, not selected. Prints one JSON line with the means of all scores over the run's held-out captions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from rollouts.prompts import read_prompts
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.heldout import heldout_groups
from runtime.finished.verbs import changed_rollouts, read_run, trained_generator
from runtime.roles.build import evaluated_adapter

SCALE = 2
LABEL = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--columns", type=int, default=14)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    experiment, folder = read_run(arguments.run_dir)
    generator, _ = trained_generator(experiment, folder)
    groups = heldout_groups(read_prompts(experiment.prompts.heldout)[: experiment.prompts.heldout_number], experiment.seed)
    teacher = experiment.teacher_sampling
    evaluations = teacher.steps * (1 if teacher.guidance_range == (1, 1) else 2)
    rows: dict[str, Evaluated] = {}
    for steps in arguments.steps:
        evaluator = Evaluator(experiment, generator, changed_rollouts(experiment, steps=steps), teacher=experiment.teacher)
        if not rows:
            rows[f"teacher, {evaluations} evaluations"] = evaluator.evaluate(groups, None)
        rows[f"student, {steps}"] = evaluator.evaluate(groups, evaluated_adapter(experiment))
    write_grid({label: result.images[: arguments.columns] for label, result in rows.items()}, arguments.out)
    print(json.dumps({label: {name: s.mean().item() for name, s in result.scores.items()} for label, result in rows.items()}))


def write_grid(rows: dict[str, torch.Tensor], out: Path) -> None:
    """{label: [columns, H, W, 3] uint8}, one row each."""
    first = next(iter(rows.values()))
    height, width = first.shape[1] * SCALE, first.shape[2] * SCALE
    sheet = Image.new("RGB", (LABEL + len(first) * (width + 1), len(rows) * (height + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows.items()):
        draw.text((4, y * (height + 1) + height // 2 - 6), label, "black", font_size=12)
        for x, image in enumerate(images):
            enlarged = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABEL + x * (width + 1), y * (height + 1)))
    sheet.save(out)


if __name__ == "__main__":
    main()
