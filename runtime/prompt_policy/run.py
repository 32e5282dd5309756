"""`odeon prompt-policy`: a language model learns to write prompts for a generator that stays as it is.

It reads a prompt and rewrites it; the generator draws what it wrote, and the rewards score the picture against the prompt that
was asked for (the idea is Promptist's, Hao et al. 2212.09611). TRL's GRPOTrainer owns the loop, its optimiser and checkpoints;
the pictures, the rewards, the held-out comparison and the run's folder are those of `odeon launch`.

All rewritings of a prompt in one step are drawn from the same noise, another one in every step, so that within a group the
wording alone makes the difference. Rewritings that say the same are drawn once.

At an evaluation the model writes greedily. `heldout/base` is the generator on the prompts as they were asked, `start` the
rewritings of the language model before it learned, all on the same noise.

TRL checkpoints its weights, optimiser, schedule and random state, and its data is a function of seed and step; so a run that
was cut goes on from its newest checkpoint and ends as one that was not, to the last bit on a CPU.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffusion import SOLVERS, Prompt, RewardModel, Scores
from generators import embedded, weights_hash
from generators.outline import Outline
from inputs import hub_errors, hub_revision, is_on_hub
from rewards.trl import OURS, as_trl_reward
from rollouts.prompts import prompts_of_step
from rollouts.worker import Group, RolloutWorker, seed_groups
from runtime.evaluation.watch import suspicions, watch_metrics
from runtime.executors.inline import Batch, Executor
from runtime.experiment.checks import check_inputs, digest, files_of, fixed_elsewhere
from runtime.experiment.config import (
    ALGORITHM_MODELS,
    Experiment,
    GeneratorSection,
    InputError,
    LoraSection,
    PromptsSection,
    RewardsSection,
    RolloutsSection,
    RunSection,
    Section,
    WatchSection,
    one_of,
    read_as,
)
from runtime.roles.build import Evaluated, Evaluator, device, joined_scores, set_threads, worker
from runtime.run.environment import environment
from runtime.run.folder import RunFolder, replaced
from runtime.run.launch import Show, record_environment, reporter
from runtime.run.loop import (
    Progress,
    baseline,
    heldout_groups,
    heldout_metrics,
    means_of_known,
    reward_metrics,
    save_samples,
    write_report,
)
from runtime.run.signals import signals_end_the_process, signals_noted
from runtime.run.tracking import trackers

PASSED_ON = ("entropy", "kl", "completions/mean_length", "completions/clipped_ratio", "learning_rate")
"""What is kept of TRL's own figures."""
ASKED = "asked for"
"""The column of the original prompts, by a name that no column of a prompt file has."""
ROWS = 64
"""Prompts rewritten at once at an evaluation."""


class LanguageModelSection(Section):
    weights: str = Field(description="embedded:NAME, a local transformers folder, or a hub id; all of it is trained")
    template: str = Field("{prompt}", description="what it is given, with {prompt} where the prompt goes")
    chat: bool = Field(False, description="whether that is said as a user's message, in the tokenizer's own chat template")
    max_new_tokens: int = Field(64, ge=1, description="of a rewriting")
    temperature: float = Field(1.0, gt=0, description="of rewritings while it learns; evaluations are greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of its weights")

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} once, where the prompt goes")
        return value


class GRPOSection(Section):
    """Keys, ranges and defaults are those of TRL's GRPOConfig, but for prompts_per_step, and one update of each batch."""

    prompts_per_step: int = Field(8, ge=1)
    num_generations: int = Field(8, ge=2, description="rewritings of a prompt, which are scored against each other")
    per_device_train_batch_size: int | None = Field(None, ge=1, description="rewritings of one backward pass; all unless given")
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0, description="pull towards the model's start")
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    bf16: bool = Field(False, description="mixed precision; needs a GPU")

    @model_validator(mode="after")
    def _whole_batches(self) -> GRPOSection:
        rows = self.prompts_per_step * self.num_generations
        if rows % self.rows_of_a_pass:
            raise ValueError(
                f"grpo.per_device_train_batch_size = {self.per_device_train_batch_size}: must divide the "
                f"{self.prompts_per_step} x {self.num_generations} = {rows} rewritings of a step"
            )
        return self

    @property
    def rows_of_a_pass(self) -> int:
        return self.per_device_train_batch_size or self.prompts_per_step * self.num_generations


class DrawingSection(Section):
    solver: str = Field("dpmpp_2m", description=f"of all pictures: {', '.join(SOLVERS)}")
    steps: int = Field(8, ge=1, description="solver steps")
    shift: float | None = Field(None, gt=0, description="of the time grid; the pipeline's own scheduler decides unless given")

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str) -> str:
        return one_of(value, SOLVERS)


class PromptPolicy(Section):
    """What `odeon prompt-policy` runs."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="the run folder's name under runs/")
    seed: int = Field(0, ge=0)
    generator: GeneratorSection
    language_model: LanguageModelSection
    prompts: PromptsSection
    rewards: RewardsSection
    rollouts: DrawingSection = DrawingSection()
    grpo: GRPOSection = GRPOSection()
    run: RunSection = RunSection()
    watch: WatchSection = WatchSection()

    @model_validator(mode="after")
    def _fits_together(self) -> PromptPolicy:
        if self.rewards.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"rewards.multi_objective_aggregation = {self.rewards.multi_objective_aggregation!r}: is not there for a "
                "prompt policy; allowed: sum_then_normalize"
            )
        if self.watch.stop_on_hacking:
            raise ValueError("watch.stop_on_hacking = True: is not there for a prompt policy; allowed: False")
        return self

    def frame(self) -> Experiment:
        """What the rest of the runtime reads of an experiment; its objective and its adapter are used by nobody."""
        return Experiment.model_construct(
            name=self.name,
            seed=self.seed,
            generator=self.generator,
            lora=LoraSection(),
            prompts=self.prompts,
            rewards=self.rewards,
            rollouts=RolloutsSection(**self.rollouts.model_dump()),
            objective=ALGORITHM_MODELS["neighbor_grpo"](),
            run=self.run,
            watch=self.watch,
        )


def train_prompt_policy(
    file: Path, overrides: Sequence[str], run_dir: Path | None, dry_run: bool = False, allow_code: bool = False
) -> int:
    """The exit code: 0, or 128 + the signal that stopped the run."""
    experiment = read_as(PromptPolicy, file, overrides, allow_code=allow_code)
    train, heldout, generator = check_prompt_policy(experiment)
    if dry_run:
        print(plan(experiment, generator))
        return 0
    folder = RunFolder(run_dir if run_dir is not None else Path("runs") / experiment.name)
    with folder.locked(), signals_end_the_process():
        folder.claim(experiment)
        if max(trl_checkpoints(folder), default=0) >= experiment.run.steps and (folder.path / "export").exists():
            print(f"{folder.path} has run its {experiment.run.steps} steps")
            return 0
        prompts = {experiment.prompts.train: digest(train), experiment.prompts.heldout: digest(heldout)}
        named = files_of(experiment.frame()) | {experiment.language_model.weights: model_folder(experiment)}
        weights = {name: weights_hash(path) for name, path in named.items()} | fixed_elsewhere(experiment.frame())
        record_environment(folder.path / "environment.json", environment(weights, prompts))
        run = Run(experiment, folder, train, heldout)
        folder.keep(experiment)
        with reporter(experiment.run.steps) as show:
            stopped = run.go(show)
    return 0 if stopped is None else 128 + stopped


def check_prompt_policy(experiment: PromptPolicy) -> tuple[list[Prompt], list[Prompt], Outline]:
    """The prompts to train on, the held-out ones, and the generator's outline. Raises InputError for what is wrong."""
    found = check_inputs(experiment.frame(), "inline")
    on_gpu = device(experiment.frame()) != "cpu"
    if on_gpu and (torch.cuda.device_count() > 1 or experiment.run.device == "cuda:1"):
        raise InputError(
            f"run.device = {experiment.run.device!r}: the trainer takes the only GPU it sees, and here are "
            f"{torch.cuda.device_count()}; make one visible with CUDA_VISIBLE_DEVICES"
        )
    if experiment.grpo.bf16 and not on_gpu:
        raise InputError("grpo.bf16 = True: needs a GPU; allowed here: False")
    weights = experiment.language_model.weights
    try:
        local = embedded(weights) if weights.startswith("embedded:") else Path(weights).expanduser()
        if local.exists():
            check_model_folder(local, weights, experiment.language_model.chat)
        elif is_on_hub(weights):
            hub_revision(weights)
        else:
            raise ValueError(
                f"weights {weights!r}: there is no such folder; "
                "allowed are embedded:NAME, a local transformers folder, or a hub id owner/name"
            )
    except ValueError as error:
        raise InputError(f"language_model: {error}") from None
    return found


def check_model_folder(folder: Path, weights: str, chat: bool) -> None:
    """Raises ValueError unless it holds a causal language model in safetensors, and a tokenizer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not (folder / "config.json").is_file():
        raise ValueError(f"weights {weights!r}: no config.json there, so it is no transformers model folder")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in KNOWN:
        raise ValueError(f"weights {weights!r}: its config.json says model_type {kind!r}, which is no causal language model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights {weights!r}: no .safetensors there, the only format that is read")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"weights {weights!r}: no tokenizer_config.json there")
    in_config = "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    if chat and not in_config and not (folder / "chat_template.jinja").is_file():
        raise ValueError(f"weights {weights!r}: its tokenizer has no chat template; allowed: chat: false")


def model_folder(experiment: PromptPolicy) -> Path:
    """The language model's local folder; a hub id is downloaded unless it is in the cache."""
    weights = experiment.language_model.weights
    if weights.startswith("embedded:"):
        return embedded(weights)
    if (local := Path(weights).expanduser()).exists():
        return local
    from huggingface_hub import snapshot_download

    try:
        with hub_errors(weights):
            folder = Path(snapshot_download(weights, allow_patterns=["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]))
        check_model_folder(folder, weights, experiment.language_model.chat)
    except ValueError as error:
        raise InputError(f"language_model: {error}") from None
    return folder


def plan(experiment: PromptPolicy, generator: Outline) -> str:
    """The whole experiment, and what a step asks of the networks."""
    from diffusion import evaluations, guidance_evaluations

    grpo, rollouts = experiment.grpo, experiment.rollouts
    rows = grpo.prompts_per_step * grpo.num_generations
    solve = evaluations(SOLVERS[rollouts.solver], torch.linspace(1, 0, rollouts.steps + 1))
    solve *= guidance_evaluations(experiment.generator.guidance)
    base = generator.parameters * {"float32": 4, "bfloat16": 2}[experiment.generator.dtype] / 2**20
    return "\n".join(
        [
            yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            f"# a step: {rows} rewritings, at most as many images and {rows * solve:,} network evaluations of the generator",
            f"# memory: transformer {base:,.0f} MiB, text encoders and VAE, libraries about 700 MiB; of the language model its",
            f"#   weights, gradient and optimiser{', and its start' if grpo.beta else ''}, and the activations of "
            f"{grpo.rows_of_a_pass} rewritings",
        ]
    )


def trl_checkpoints(folder: RunFolder) -> dict[int, Path]:
    """{step: folder} of TRL's whole checkpoints, oldest first. Their trainer_state.json is written last."""
    found = {}
    for path in (folder.path / "checkpoints").glob("checkpoint-*"):
        try:
            found[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (FileNotFoundError, json.JSONDecodeError):  # a cut left it half written
            continue
    return dict(sorted(found.items()))


class Rewriting:
    """A generator that is told other texts than it is given: `said`, {prompt: rewriting}. Others are said as they are."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.said: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def __call__(self, *args: Any) -> Tensor:
        return self.generator(*args)

    def encode(self, prompts: Sequence[str]) -> Any:
        return self.generator.encode([self.said.get(text, text) for text in prompts])


class Remembered:
    """A reward that scores `rows` pictures at once, and remembers what it said last."""

    def __init__(self, reward: RewardModel, rows: int) -> None:
        self.reward = reward
        self.rows = rows
        self.about = replace(reward.about, differentiable=False)
        self.scores: Scores | None = None
        self.seconds = 0.0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        start = time.perf_counter()
        parts = [slice(first, first + self.rows) for first in range(0, len(prompts), self.rows)]
        self.scores = joined_scores([self.reward(images[part], prompts[part]) for part in parts])
        self.seconds = time.perf_counter() - start
        return self.scores


class Judge:
    """A step's rewritings, drawn and scored: what TRL calls for its rewards.

    Axes: N prompts, G rewritings of each in a row, B = N G.
    """

    def __init__(self, experiment: PromptPolicy, worker: RolloutWorker, reward: RewardModel, prompts: Sequence[Prompt]) -> None:
        """worker: draws groups of one."""
        self.seed, self.size = experiment.seed, experiment.grpo.num_generations
        self.worker = worker
        self.reward = Remembered(reward, worker.micro_batch)
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.as_trl = as_trl_reward(self.reward, self.draw, caption=ASKED)
        self.noise: list[tuple[Prompt, int]] = []
        self.drawn = 0
        self.last: Batch | None = None
        """The figures of the last call."""

    def draw(self, texts: list[str]) -> Tensor:
        """B texts -> images [B, 3, H, W], those of one prompt from one noise."""
        wanted = [(plain(text), prompt, seed) for text, (prompt, seed) in zip(texts, self.noise, strict=True)]
        groups = {(text, seed): Group(Prompt(prompt.id, text, prompt.meta), seed, [seed]) for text, prompt, seed in wanted}
        place = {key: i for i, key in enumerate(groups)}
        self.drawn = len(groups)
        return self.worker.draw(list(groups.values())).images[[place[text, seed] for text, _, seed in wanted]]

    def total(self, prompts: Sequence[Any], completions: Sequence[Any], id: Sequence[str], **rest: Any) -> list[float | None]:
        """The reward function; its name is what TRL calls the reward."""
        start = time.perf_counter()
        asked = [self.prompts[one] for one in id]
        groups = seed_groups(asked[:: self.size], 1, self.seed, rest["trainer_state"].global_step + 1)
        assert [group.prompt.id for group in groups for _ in range(self.size)] == list(id), "a prompt's group is split"
        self.noise = [(group.prompt, group.seeds[0]) for group in groups for _ in range(self.size)]
        keys = {key for prompt in asked for key in prompt.meta if key not in OURS}
        columns: dict[str, Sequence[Any]] = {key: [prompt.meta.get(key) for prompt in asked] for key in keys}
        totals = self.as_trl(prompts, completions, **columns | {ASKED: [prompt.text for prompt in asked], "id": id})
        scores = self.reward.scores
        assert scores is not None
        self.last = Batch(
            scores={name: values.cpu() for name, values in {"total": scores.total, **scores.parts}.items()},
            extra={name: values.cpu() for name, values in scores.extra.items()},
            nfe=self.drawn * self.worker.nfe,
            seconds={
                "rollout": time.perf_counter() - start - self.reward.seconds,
                "reward": self.reward.seconds,
            },
            payload=None,
        )
        return totals


@contextmanager
def trl_speaks_of_old_names() -> Iterator[None]:
    """TRL 1.16 uses names that transformers has changed, which says so at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Run:
    """One run: the generator, the language model with its trainer, and what is written down of them."""

    def __init__(self, experiment: PromptPolicy, folder: RunFolder, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
        from generators import load

        frame, section = experiment.frame(), experiment.generator
        self.experiment, self.folder, self.frame = experiment, folder, frame
        set_threads(frame)
        options = {"family": section.family, "dtype": section.dtype, "device": device(frame)}
        generator = load(section.weights, **options)  # type: ignore[arg-type]
        self.rewriting = Rewriting(generator)
        self.evaluator = Evaluator(frame, self.rewriting, frame.rollouts)
        self.groups = heldout_groups(heldout[: experiment.prompts.heldout_number], experiment.seed)
        drawing = worker(frame, generator, frame.rollouts, group_size=1)
        self.judge = Judge(experiment, drawing, self.evaluator.trained, train)
        with trl_speaks_of_old_names():
            self.trainer = new_trainer(experiment, folder, train, self.judge, self)
        self.model, self.tokenizer = self.trainer.model, self.trainer.processing_class

    def go(self, show: Show) -> int | None:
        """Train the steps that are left, and export; the signal number if one stopped it."""
        checkpoints = trl_checkpoints(self.folder)
        step = max(checkpoints, default=0)
        self.folder.rewind_metrics(step)
        self.progress = Progress()
        if step:
            line = self.folder.metrics()[-1]
            self.progress = Progress(step, line["seconds"], line["nfe/rollout"], 0, line["nfe/teacher"])
        self.started = time.monotonic() - self.progress.seconds
        self.show, self.stopping = show, False
        self.teacher = baseline(self.folder, cast(Executor, self), self.groups)  # which only evaluates
        self.start = self.before(step)
        run = self.experiment.run
        with (
            trackers(run.trackers, self.experiment.name, self.folder.path, step) as track,
            signals_noted() as noted,
            trl_speaks_of_old_names(),
        ):
            self.track, self.noted = track, noted
            self.trainer.train(resume_from_checkpoint=str(checkpoints[step]) if step else None)
        if self.trainer.state.global_step >= run.steps:
            self.export()
        return noted[0] if noted else None

    def evaluate(self, groups: Sequence[Group], adapter: str | None) -> Evaluated:
        """On the prompts as they were asked; for `runtime.run.loop.baseline`."""
        self.rewriting.said = {}
        result = self.evaluator.evaluate(groups, None)
        self.progress.nfe_teacher += result.nfe
        return result

    def evaluate_rewritten(self, step: int) -> Evaluated:
        """On what the language model makes of them, which is written down beside the pictures."""
        texts = list(dict.fromkeys(group.prompt.text for group in self.groups))
        said = dict(zip(texts, greedy(self.model, self.tokenizer, self.experiment.language_model, texts), strict=True))
        self.rewriting.said = said
        result = self.evaluator.evaluate(self.groups, None)
        self.progress.nfe_teacher += result.nfe
        samples = self.folder.path / "samples" / f"step_{step:06d}"
        save_samples(samples, result.pictures, self.teacher.pictures, self.groups)
        (samples / "prompts.txt").write_text("".join(f"{text} -> {rewritten}\n" for text, rewritten in said.items()))
        return result

    def before(self, step: int) -> dict[str, float]:
        """`start/<label>`: the held-out means of the language model before it learned, evaluated once in the life of a run."""
        file = self.folder.path / "start.safetensors"
        if not file.exists() and step == 0:
            with replaced(file) as temporary:
                self.evaluate_rewritten(0).save(temporary)
        return means_of_known("start", Evaluated.load(file).scores) if file.exists() else {}

    def end_of_step(self, control: Any) -> None:
        """Before the step is logged: a signal ends the run here, with a checkpoint."""
        self.stopping = bool(self.noted)
        last = self.trainer.state.global_step == self.experiment.run.steps
        if self.stopping or last:
            control.should_save = True
            control.should_training_stop = True

    def logged(self, logs: Mapping[str, Any]) -> None:
        """The step's line, written before its checkpoint. logs: TRL's figures of the step."""
        if "loss" not in logs:  # the whole run's summary
            return
        run, step, batch, progress = self.experiment.run, self.trainer.state.global_step, self.judge.last, self.progress
        assert batch is not None
        progress.nfe_rollout += batch.nfe
        line: dict[str, Any] = {
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            **reward_metrics(batch, self.experiment.grpo.num_generations),
            "nfe/rollout": progress.nfe_rollout,
            "nfe/train": 0,
            "time/rollout": batch.seconds["rollout"],
            "time/reward": batch.seconds["reward"],
            "time/train": max(0.0, logs["step_time"] - sum(batch.seconds.values())),
            **{key: logs[key] for key in PASSED_ON if logs.get(key) is not None},
        }
        if step % run.evaluate_every == 0 or step == run.steps:
            result = self.evaluate_rewritten(step)
            line |= heldout_metrics(result, self.teacher) | self.start
            trained = {"total", *(entry["label"] for entry in self.experiment.rewards.train)}
            line |= watch_metrics(result, self.teacher, trained)
            if found := suspicions(line, result, self.teacher, self.experiment.watch):
                line["hacking"] = found
        progress.step, progress.seconds = step, time.monotonic() - self.started
        line = {"step": step, "seconds": progress.seconds, **line, "nfe/teacher": progress.nfe_teacher}
        self.folder.append_metrics(line)
        self.track(line, step)
        self.show(line)
        if "heldout/total" in line or self.stopping:
            write_report({self.experiment.name: self.folder.metrics()}, self.folder.path / "report.html")

    def export(self) -> None:
        """The language model and its tokenizer as a transformers folder, whole or not there."""
        final, partial = self.folder.path / "export", self.folder.path / "export.tmp"
        self.model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        if not final.exists():
            os.replace(partial, final)
            return
        for file in partial.iterdir():  # of a run that went on
            os.replace(file, final / file.name)
        partial.rmdir()


def new_trainer(experiment: PromptPolicy, folder: RunFolder, train: Sequence[Prompt], judge: Judge, run: Run) -> Any:
    """TRL's GRPOTrainer over the prompts of all steps, one after the other; `run` hears of every step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    grpo, section, steps = experiment.grpo, experiment.language_model, experiment.run.steps
    path = model_folder(experiment)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, section.dtype))
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
    on_cpu = device(experiment.frame()) == "cpu"
    ours = {"prompts_per_step", "per_device_train_batch_size"}
    arguments = GRPOConfig(
        output_dir=str(folder.path / "checkpoints"),
        **grpo.model_dump(exclude=ours),
        per_device_train_batch_size=grpo.rows_of_a_pass,
        gradient_accumulation_steps=grpo.prompts_per_step * grpo.num_generations // grpo.rows_of_a_pass,
        max_completion_length=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        shuffle_dataset=False,
        max_steps=steps,
        seed=experiment.seed % 2**32,  # what numpy takes
        save_steps=experiment.run.checkpoint_every,
        save_total_limit=experiment.run.keep,
        gradient_checkpointing=experiment.run.gradient_checkpointing,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    asked = [prompt for step in range(1, steps + 1) for prompt in _of_step(experiment, train, step)]
    rows = [{"prompt": _given(section, prompt.text), "id": prompt.id} for prompt in asked]

    class Hears(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.end_of_step(control)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            run.logged(logs or {})

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[judge.total],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Hears()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _of_step(experiment: PromptPolicy, train: Sequence[Prompt], step: int) -> list[Prompt]:
    return prompts_of_step(train, step, experiment.grpo.prompts_per_step, experiment.seed)


def _given(section: LanguageModelSection, text: str) -> str | list[dict[str, str]]:
    """What the language model is given of a prompt, as TRL takes it."""
    filled = section.template.replace("{prompt}", text)
    return [{"role": "user", "content": filled}] if section.chat else filled


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, section: LanguageModelSection, texts: Sequence[str]) -> list[str]:
    """The likeliest rewriting of each text, a word after the other."""
    was_training = model.training
    model.eval()
    rewritten: list[str] = []
    for start in range(0, len(texts), ROWS):
        given: list[Any] = [_given(section, text) for text in texts[start : start + ROWS]]
        if section.chat:
            given = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in given]
        tokens = tokenizer(
            given, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not section.chat
        ).to(model.device)
        written = model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=section.max_new_tokens,
        )
        rewritten += tokenizer.batch_decode(written[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [plain(text) for text in rewritten]


def plain(text: str) -> str:
    """On one line, with single spaces."""
    return " ".join(text.split())
