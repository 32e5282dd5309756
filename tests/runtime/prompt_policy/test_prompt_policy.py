"""Small runs of the prompt policy: what they write, that they resume, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffusion import Prompt, Scores
from diffusion.types import About
from generators import embedded
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_as
from runtime.finished.compare import read_runs, summary
from runtime.finished.verbs import read_run
from runtime.prompt_policy.config import PromptPolicy
from runtime.prompt_policy.judge import Judge, Rewriting
from runtime.prompt_policy.run import Run, train_prompt_policy
from runtime.prompt_policy.trainer import greedy, trl_checkpoints
from runtime.run.folder import RunFolder

ROOT = Path(__file__).parents[3]
FILE = ROOT / "experiments" / "prompt_policy.yaml"
SMALL = [
    "run.steps=3",
    "run.evaluate_every=2",
    "run.checkpoint_every=1",
    "run.keep=2",
    "run.micro_batch=8",
    "run.threads=1",
    "run.trackers=[]",
    "rollouts.steps=2",
    "prompts.heldout_number=3",
    "grpo.prompts_per_step=2",
    "grpo.num_generations=4",
    "grpo.learning_rate=0.002",
]
BIT_EQUAL = ("loss", "grad_norm", "reward/total", "reward/std", "entropy", "nfe/rollout", "nfe/teacher")


@pytest.fixture(autouse=True, scope="module")
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def go(path, *overrides, allow_code=False):
    assert train_prompt_policy(FILE, [*SMALL, *overrides], path, allow_code=allow_code) == 0
    return RunFolder(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    return go(tmp_path_factory.mktemp("runs") / "whole", "run.trackers=[tensorboard]")


def results(folder):
    return [[line.get(key) for key in (*BIT_EQUAL, "heldout/total")] for line in folder.metrics()]


def test_every_step_has_its_line_and_every_evaluation_its_metrics(whole):
    lines = whole.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["reward/total"] == line["reward/glyph_match"]
        assert line["nfe/train"] == 0
    evaluated = [line for line in lines if "heldout/total" in line]
    assert [line["step"] for line in evaluated] == [2, 3]
    for line in evaluated:
        assert {"heldout/clip_score", "heldout/base/clip_score", "heldout/total_se", "heldout/win_rate", "diversity"} <= set(
            line
        )
    assert len({(line["heldout/base/total"], line["start/total"]) for line in evaluated}) == 1
    # 8 rewritings a step at most, 2 solver steps; 6 held-out images for base, start and each evaluation
    assert 3 * 2 * 2 <= lines[-1]["nfe/rollout"] <= 3 * 8 * 2
    assert [line["nfe/teacher"] for line in lines] == [24, 36, 48]


def test_the_run_folder_is_complete(whole):
    names = {path.name for path in whole.path.iterdir()}
    expected = {"experiment.yaml", "environment.json", "metrics.jsonl", "events", "samples", "checkpoints", "export"}
    assert expected | {"report.html", "teacher.safetensors", "start.safetensors"} <= names
    assert list(trl_checkpoints(whole)) == [2, 3]
    assert "embedded:glyphs-rewriter" in json.loads((whole.path / "environment.json").read_text())["weights"]
    for step in (0, 2, 3):
        lines = (whole.path / "samples" / f"step_{step:06d}" / "prompts.txt").read_text().splitlines()
        assert len(lines) == 3
        assert all(" -> " in line for line in lines)
    assert (whole.path / "samples" / "step_000003" / "grid.png").stat().st_size > 500
    assert not list(whole.path.glob("*tmp"))


def test_the_export_is_a_stock_folder_that_gives_the_same_rewritings(whole):
    model = AutoModelForCausalLM.from_pretrained(whole.path / "export")
    tokenizer = AutoTokenizer.from_pretrained(whole.path / "export")
    section = read_as(PromptPolicy, whole.path / "experiment.yaml").language_model
    lines = (whole.path / "samples" / "step_000003" / "prompts.txt").read_text().splitlines()
    texts, rewritings = zip(*(line.split(" -> ") for line in lines), strict=True)
    assert greedy(model, tokenizer, section, texts) == list(rewritings)
    start = AutoModelForCausalLM.from_pretrained(embedded("embedded:glyphs-rewriter"))
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_it_is_compared_like_any_run(whole):
    ((name, lines),) = read_runs([whole.path]).items()
    row = summary(name, lines)
    assert row["steps"] == "3"
    assert "held-out clip_score" in row


def test_it_has_no_adapter_to_sample_with(whole):
    with pytest.raises(InputError, match="is the run of a prompt policy, which has no adapter"):
        read_run(whole.path)


class Killed(Exception):
    pass


def test_an_interrupted_run_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    def dies(self, logs):
        if self.trainer.state.global_step == 2:
            raise Killed
        return original(self, logs)

    original = Run.logged
    with monkeypatch.context() as patch:
        patch.setattr(Run, "logged", dies)
        with pytest.raises(Killed):
            go(tmp_path / "cut")
    broken = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global')
    folder = go(tmp_path / "cut")
    assert results(folder) == results(whole)
    exported = [(one.path / "export" / "model.safetensors").read_bytes() for one in (folder, whole)]
    assert exported[0] == exported[1]


def test_a_finished_run_is_reported_and_may_be_extended(whole, tmp_path, capsys):
    shutil.copytree(whole.path, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    go(tmp_path / "run")
    assert "all 3 steps are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match=r"ran another experiment: grpo.learning_rate \(was 0.002, is 0.02\)"):
        go(tmp_path / "run", "grpo.learning_rate=0.02")
    assert [line["step"] for line in go(tmp_path / "run", "run.steps=4").metrics()] == [1, 2, 3, 4]


def test_a_signal_ends_the_step_and_leaves_a_checkpoint(whole, tmp_path, monkeypatch):
    original = Judge.total

    def signalled(self, *args, **kwargs):
        if kwargs["trainer_state"].global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Judge, "total", signalled)
    code = train_prompt_policy(FILE, [*SMALL, "run.checkpoint_every=100"], tmp_path / "run")
    assert code == 128 + signal.SIGTERM
    assert list(trl_checkpoints(RunFolder(tmp_path / "run"))) == [2]
    assert results(RunFolder(tmp_path / "run")) == results(whole)[:2]
    assert not (tmp_path / "run" / "export").exists()


def test_a_chat_template(whole, tmp_path):
    model = shutil.copytree(embedded("embedded:glyphs-rewriter"), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{% if add_generation_prompt %} =>{% endif %}")
    chat = f"language_model={{weights: {model}, chat: true, max_new_tokens: 12}}"
    folder = go(tmp_path / "run", chat, "run.steps=2", "grpo.per_device_train_batch_size=8")
    assert results(folder) == results(whole)[:2]


# What a step samples


class FakeWorker:
    """An image's brightness is its text's length in hundredths, plus a small part of its noise."""

    most = 4

    def __init__(self):
        self.groups = []

    def take(self, groups, plan):
        assert plan.source == "teacher"
        self.groups = list(groups)
        values = [len(group.prompt.text) / 100 + group.seeds[0] % 7 / 1000 for group in groups]
        images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
        return SimpleNamespace(images=images, nfe=3 * len(groups))


class Brightness:
    about = About("total", differentiable=True)

    def __call__(self, images, prompts):
        self.prompts = list(prompts)
        assert len(prompts) <= 4
        total = images.mean((1, 2, 3))
        return Scores(total, {"bright": total})


def test_a_group_shares_its_noise_and_equal_rewritings_are_sampled_once():
    experiment = read_as(PromptPolicy, FILE, SMALL)
    prompts = [Prompt("1", "red", {"wish": 1, "prompts": "no"}), Prompt("2", "blue")]
    fake, reward = FakeWorker(), Brightness()
    judge = Judge(experiment, fake, reward, prompts)
    ids = ["1"] * 4 + ["2"] * 4
    rewritings = ["a", "a ", "a", "bb", "a", "a", "a", "ccc"]
    totals = judge.total(["given"] * 8, rewritings, id=ids, trainer_state=SimpleNamespace(global_step=0))
    first = {group.prompt.id: set() for group in fake.groups}
    for group in fake.groups:
        first[group.prompt.id] |= set(group.seeds)
    assert [(group.prompt.id, group.prompt.text) for group in fake.groups] == [
        ("1", "a"),
        ("1", "bb"),
        ("2", "a"),
        ("2", "ccc"),
    ]
    assert [len(seeds) for seeds in first.values()] == [1, 1]
    assert first["1"] != first["2"]
    assert totals[0] == totals[1] == totals[2] != totals[3]
    assert totals[4] == totals[5] == totals[6] != totals[0]
    assert [prompt.text for prompt in reward.prompts] == ["blue"] * 4
    assert judge.last.nfe == 12
    assert judge.last.scores.parts["bright"].tolist() == totals
    judge.total(["given"] * 8, rewritings, id=ids, trainer_state=SimpleNamespace(global_step=1))
    assert {group.seeds[0] for group in fake.groups if group.prompt.id == "1"} != first["1"]


def test_the_generator_encodes_rewritings():
    encoded = []
    generator = SimpleNamespace(encode=lambda texts: encoded.extend(texts), device="here")
    rewriting = Rewriting(generator)
    rewriting.rewritten = {"a": "b"}
    rewriting.encode(["a", "c"])
    assert encoded == ["b", "c"]
    assert rewriting.device == "here"


# What is refused


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.num_generations=1", "grpo.num_generations = 1: Input should be greater than or equal to 2"),
        ("grpo.num_generation=8", "grpo.num_generation: unknown key; did you mean 'num_generations'"),
        ("objective={}", "objective: unknown key"),
        ("grpo.loss_type=ppo", "grpo.loss_type = 'ppo'"),
        ("grpo.per_device_train_batch_size=3", "must divide the 2 x 4 = 8 rewritings of a step"),
        ("grpo.bf16=true", "grpo.bf16 = True: needs a GPU"),
        ("language_model.weights=no/such/model", "language_model: weights 'no/such/model': no such folder"),
        (
            "language_model.weights=owner/name",
            "language_model: weights 'owner/name': it is not a local folder, not in the cache",
        ),
        ("language_model.weights=embedded:glyphs-writer", "did you mean 'glyphs-rewriter'"),
        ("language_model.weights=embedded:glyphs", "no config.json"),
        ("language_model.weights=embedded:glyphs-clip", "model_type 'clip', which is not a causal language model"),
        ("language_model.chat=true", "its tokenizer has no chat template"),
        ("language_model.template=rewrite", "language_model.template = 'rewrite': must hold {prompt} once"),
        ("rewards.train=[{name: 'python:mine.py:f'}]", "runs only with --allow-code"),
        ("rewards.heldout=[{name: clip_score, weights: no/such/clip}]", "no/such/clip"),
        ("rewards.multi_objective_aggregation=normalize_then_sum", "allowed: sum_then_normalize"),
        ("watch.stop_on_hacking=true", "watch.stop_on_hacking = True"),
        ("rollouts.solver=eular", "'euler'"),
        ("prompts.train=no/such.txt", "no/such.txt"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_folder(override, words, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        go(tmp_path / "run", override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_the_whole_experiment_and_leaves_nothing(tmp_path, capsys):
    assert train_prompt_policy(FILE, SMALL, tmp_path / "run", dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "scale_rewards:" in printed
    assert "# a step: 8 rewritings, at most as many images and 16 network evaluations" in printed
    assert not (tmp_path / "run").exists()


def test_an_error_exits_with_2():
    command = [sys.executable, "-m", "runtime.cli", "prompt-policy", "nothing.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "odeon: nothing.yaml: no such file\n")
