import json

import pytest

from runtime.run.progress import profiled


def traced(tmp_path, steps, left, done, capsys):
    """What a run of `done` steps leaves of a trace."""
    shown = []
    with profiled(steps, left, tmp_path / "profile.json", shown.append) as show:
        for step in range(1, done + 1):
            show({"step": step})
    assert [line["step"] for line in shown] == list(range(1, done + 1))
    if not (tmp_path / "profile.json").exists():
        return None
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"] is not None
    return capsys.readouterr().out.strip().rpartition("profile.json: ")[2]


@pytest.mark.parametrize(
    ("steps", "left", "done", "words"),
    [
        (2, 10, 5, "steps 2 to 3"),
        (3, 3, 3, "steps 2 to 3"),  # fewer steps than requested are traced, too
        (1, 1, 1, "steps 1 to 1"),
        (5, 10, 3, "steps 2 to 3"),  # stopped by a signal
    ],
)
def test_the_steps_after_the_first_are_traced_however_the_run_ends(tmp_path, capsys, steps, left, done, words):
    assert traced(tmp_path, steps, left, done, capsys) == words


def test_a_run_that_ends_before_a_traced_step_leaves_no_trace(tmp_path, capsys):
    assert traced(tmp_path, 2, 10, 1, capsys) is None
