"""`odeon prompt-policy`: a language model learns to rewrite prompts for a frozen generator.

The model rewrites a prompt, the generator samples an image for the rewriting, and the rewards score the image with the original
prompt (the idea is from Promptist, Hao et al. 2212.09611). TRL's GRPOTrainer owns the loop, its optimiser and
checkpoints; the images, the rewards, the held-out comparison and the run's folder are those of `odeon launch`.

All rewritings of a prompt in one step are sampled from the same noise, which changes from step to step, so that inside a group
only the wording differs. Equal rewritings are sampled once.

At an evaluation the model decodes greedily. `heldout/base` is the generator on the original prompts, `start` on the rewritings
of the language model before training, all on the same noise.

TRL checkpoints its weights, optimiser, schedule and random state, and its data is a function of seed and step; so an
interrupted run continues from its newest checkpoint and, on a CPU, gives the same result as an uninterrupted one, to the last
bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion import Group, Prompt
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.evaluator import Evaluator
from runtime.evaluation.heldout import baseline, evaluation_metrics, heldout_groups, save_samples
from runtime.evaluation.statistics import means_of_known, reward_metrics
from runtime.experiment.yaml import read_as
from runtime.prompt_policy.config import PromptPolicy, check_prompt_policy, plan_text
from runtime.prompt_policy.judge import Judge, Rewriting
from runtime.prompt_policy.trainer import greedy, model_folder, new_trainer, trl_checkpoints, without_trl_deprecations
from runtime.roles.build import new_generator, new_worker
from runtime.run.folder import RunFolder, replaced
from runtime.run.launch import record_environment
from runtime.run.log import RunLog, Show
from runtime.run.loop import Progress
from runtime.run.progress import reporter
from runtime.run.signals import signals_end_the_process, signals_noted

PASSED_ON = ("entropy", "kl", "completions/mean_length", "completions/clipped_ratio", "learning_rate")
"""Those of TRL's metrics that are logged."""


def train_prompt_policy(
    file: Path, overrides: Sequence[str], run_dir: Path | None, dry_run: bool = False, allow_code: bool = False
) -> int:
    """The exit code: 0, or 128 + the signal that stopped the run."""
    experiment = read_as(PromptPolicy, file, overrides, allow_code=allow_code)
    train, heldout, generator = check_prompt_policy(experiment)
    if dry_run:
        print(plan_text(experiment, generator))
        return 0
    folder = RunFolder(run_dir if run_dir is not None else Path("runs") / experiment.name)
    with folder.locked(), signals_end_the_process():
        folder.claim(experiment)
        if max(trl_checkpoints(folder), default=0) >= experiment.run.steps and (folder.path / "export").exists():
            print(f"{folder.path}: all {experiment.run.steps} steps are done")
            return 0
        model = {experiment.language_model.weights: model_folder(experiment)}
        record_environment(experiment, folder, train, heldout, model)
        run = Run(experiment, folder, train, heldout)
        folder.keep(experiment)
        with reporter(experiment.run.steps) as show:
            stopped = run.go(show)
    return 0 if stopped is None else 128 + stopped


class Run:
    """One run: the generator, the language model with its trainer, and their logs."""

    def __init__(self, experiment: PromptPolicy, folder: RunFolder, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
        self.experiment, self.folder = experiment, folder
        generator = new_generator(experiment)
        self.rewriting = Rewriting(generator)
        self.evaluator = Evaluator(experiment, self.rewriting, experiment.rollouts)
        self.groups = heldout_groups(heldout[: experiment.prompts.heldout_number], experiment.seed)
        worker = new_worker(experiment, generator, experiment.rollouts)
        self.judge = Judge(experiment, worker, self.evaluator.trained_reward, train)
        with without_trl_deprecations():
            self.trainer = new_trainer(experiment, folder, train, self.judge, self.end_of_step, self.logged)
        self.model, self.tokenizer = self.trainer.model, self.trainer.processing_class

    def go(self, show: Show) -> int | None:
        """Train the remaining steps, and export; returns the signal number if one stopped the run."""
        checkpoints = trl_checkpoints(self.folder)
        step = max(checkpoints, default=0)
        self.folder.rewind_metrics(step)
        self.progress = Progress()
        if step:
            line = self.folder.metrics()[-1]
            self.progress = Progress(step, line["seconds"], line["nfe/rollout"], 0, line["nfe/teacher"])
        self.started = time.monotonic() - self.progress.seconds
        self.stopping = False
        self.teacher = baseline(self.folder, self.evaluate_originals)
        self.start = self.before_training(step)
        with (
            RunLog(self.experiment, self.folder, step, show) as log,
            signals_noted() as noted,
            without_trl_deprecations(),
        ):
            self.log, self.noted = log, noted
            self.trainer.train(resume_from_checkpoint=str(checkpoints[step]) if step else None)
        if self.trainer.state.global_step >= self.experiment.run.steps:
            self.export()
        return noted[0] if noted else None

    def evaluate_originals(self) -> Evaluated:
        """The generator on the original prompts."""
        self.rewriting.rewritten = {}
        return self._evaluated(self.groups)

    def _evaluated(self, groups: Sequence[Group]) -> Evaluated:
        result = self.evaluator.evaluate(groups, None)
        self.progress.nfe_teacher += result.nfe
        return result

    def evaluate_rewritten(self, step: int) -> Evaluated:
        """The generator on the language model's rewritings, which are written to prompts.txt with the images."""
        texts = list(dict.fromkeys(group.prompt.text for group in self.groups))
        written = greedy(self.model, self.tokenizer, self.experiment.language_model, texts)
        self.rewriting.rewritten = dict(zip(texts, written, strict=True))
        result = self._evaluated(self.groups)
        samples = self.folder.path / "samples" / f"step_{step:06d}"
        save_samples(samples, result.images, self.teacher.images, self.groups)
        pairs = self.rewriting.rewritten.items()
        (samples / "prompts.txt").write_text("".join(f"{text} -> {rewritten}\n" for text, rewritten in pairs))
        return result

    def before_training(self, step: int) -> dict[str, float]:
        """`start/<label>`: the held-out means of the language model before training, evaluated once per run."""
        file = self.folder.path / "start.safetensors"
        if not file.exists() and step == 0:
            with replaced(file) as temporary:
                self.evaluate_rewritten(0).save(temporary)
        return means_of_known("start", Evaluated.load(file).scores) if file.exists() else {}

    def end_of_step(self, control: Any) -> None:
        """Called before the step is logged: a signal ends the run here, with a checkpoint."""
        self.stopping = bool(self.noted)
        last = self.trainer.state.global_step == self.experiment.run.steps
        if self.stopping or last:
            control.should_save = True
            control.should_training_stop = True

    def logged(self, logs: Mapping[str, Any]) -> None:
        """The step's line, written before its checkpoint. logs: TRL's metrics of the step."""
        if "loss" not in logs:  # the summary at the end of training
            return
        run, step, batch, progress = self.experiment.run, self.trainer.state.global_step, self.judge.last, self.progress
        assert batch is not None
        assert batch.scores is not None
        progress.nfe_rollout += batch.nfe
        line: dict[str, Any] = {
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            **reward_metrics(batch.scores, self.experiment.grpo.num_generations),
            "nfe/rollout": progress.nfe_rollout,
            "nfe/train": 0,
            "time/rollout": batch.seconds["rollout"],
            "time/reward": batch.seconds["reward"],
            "time/train": max(0.0, logs["step_time"] - sum(batch.seconds.values())),
            **{key: logs[key] for key in PASSED_ON if logs.get(key) is not None},
        }
        if step % run.evaluate_every == 0 or step == run.steps:
            line |= evaluation_metrics(self.experiment, self.evaluate_rewritten(step), self.teacher) | self.start
        progress.step, progress.seconds = step, time.monotonic() - self.started
        self.log.write({"step": step, "seconds": progress.seconds, **line, "nfe/teacher": progress.nfe_teacher})
        if "heldout/total" in line or self.stopping:
            self.log.report()

    def export(self) -> None:
        """The language model and its tokenizer as a transformers folder, complete or absent."""
        final, partial = self.folder.path / "export", self.folder.path / "export.tmp"
        self.model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        if not final.exists():
            os.replace(partial, final)
            return
        for file in partial.iterdir():  # the run was continued with more steps
            os.replace(file, final / file.name)
        partial.rmdir()
