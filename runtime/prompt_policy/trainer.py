"""The language model: its folder, TRL's trainer over it, its checkpoints, and greedy rewriting."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion import Prompt
from generators import embedded
from inputs import hub_errors
from rollouts.prompts import prompts_of_step
from runtime.experiment.config import InputError
from runtime.prompt_policy.config import LanguageModelSection, PromptPolicy, check_model_folder
from runtime.prompt_policy.judge import Judge, one_line
from runtime.roles.build import device
from runtime.run.folder import RunFolder

ROWS = 64
"""Batch size of rewritings at an evaluation."""


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


def trl_checkpoints(folder: RunFolder) -> dict[int, Path]:
    """{step: folder} of TRL's complete checkpoints, oldest first. TRL writes trainer_state.json last."""
    found = {}
    for path in (folder.path / "checkpoints").glob("checkpoint-*"):
        try:
            found[json.loads((path / "trainer_state.json").read_text())["global_step"]] = path
        except (FileNotFoundError, json.JSONDecodeError):  # incomplete after an interruption
            continue
    return dict(sorted(found.items()))


@contextmanager
def without_trl_deprecations() -> Iterator[None]:
    """Hides warnings: TRL 1.16 uses names that transformers has deprecated, with a warning at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def new_trainer(
    experiment: PromptPolicy,
    folder: RunFolder,
    train: Sequence[Prompt],
    judge: Judge,
    end_of_step: Callable[[Any], None],
    logged_line: Callable[[Mapping[str, Any]], None],
) -> Any:
    """TRL's GRPOTrainer over the prompts of all steps, one after the other.

    end_of_step: called with TRL's control before a step is logged. logged_line: called with TRL's metrics of the step.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    grpo, section, steps = experiment.grpo, experiment.language_model, experiment.run.steps
    path = model_folder(experiment)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, section.dtype))
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", truncation_side="left")
    on_cpu = device(experiment) == "cpu"
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
        seed=experiment.seed % 2**32,  # numpy's range
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
    number, seed = grpo.prompts_per_step, experiment.seed
    prompts = [prompt for step in range(1, steps + 1) for prompt in prompts_of_step(train, step, number, seed)]
    rows = [{"prompt": _input(section, prompt.text), "id": prompt.id} for prompt in prompts]

    class Callbacks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            end_of_step(control)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            logged_line(logs or {})

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[judge.total],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _input(section: LanguageModelSection, text: str) -> str | list[dict[str, str]]:
    """The language model's input for a prompt, as TRL takes it."""
    filled = section.template.replace("{prompt}", text)
    return [{"role": "user", "content": filled}] if section.chat else filled


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, section: LanguageModelSection, texts: Sequence[str]) -> list[str]:
    """The greedy rewriting of each text, token by token."""
    was_training = model.training
    model.eval()
    rewritten: list[str] = []
    for start in range(0, len(texts), ROWS):
        given: list[Any] = [_input(section, text) for text in texts[start : start + ROWS]]
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
    return [one_line(text) for text in rewritten]
