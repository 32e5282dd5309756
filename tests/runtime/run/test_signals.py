import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.run.signals import signals_end_the_process, signals_kept, signals_noted

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_the_steps_a_signal_ends_the_process(number, code):
    with pytest.raises(SystemExit) as caught, signals_end_the_process():
        os.kill(os.getpid(), number)
    assert caught.value.code == code


def test_while_steps_run_it_is_recorded_and_the_old_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with signals_noted() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_step_broken_by_the_signal_is_not_a_failure(capsys):
    def step():
        with signals_noted():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ConnectionError("the workers got the signal too")

    with pytest.raises(SystemExit) as caught:
        step()
    assert caught.value.code == 143
    assert "ConnectionError" in capsys.readouterr().err


def test_without_a_signal_an_error_passes_through():
    with pytest.raises(ConnectionError), signals_noted():
        raise ConnectionError


def test_handlers_of_a_library_are_removed():
    before = signal.getsignal(signal.SIGTERM)
    with signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("executor", "number", "code"), [("inline", signal.SIGINT, 130), ("ray", signal.SIGTERM, 143)])
def test_before_the_first_step_a_launch_ends_with_the_signals_code(tmp_path, executor, number, code):
    command = [sys.executable, "-m", "runtime.cli", "launch", "experiments/quickstart.yaml", "--executor", executor]
    process = subprocess.Popen([*command, "--run-dir", str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "environment.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)  # Ray is starting, or networks are being loaded
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors


def test_a_signal_to_the_whole_group_leaves_ray_alive_until_the_step_is_done(tmp_path):
    small = ["rollouts.groups_per_step=1", "prompts.heldout_number=2", "run.steps=50", "run.evaluate_every=50"]
    command = [sys.executable, "-m", "runtime.cli", "launch", "experiments/quickstart.yaml", *small]
    run = tmp_path / "run"
    process = subprocess.Popen([*command, "--run-dir", str(run)], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    steps = (run / "metrics.jsonl").read_text().count("\n")
    assert (run / "checkpoints" / f"step_{steps:06d}" / "policy.safetensors").exists()
