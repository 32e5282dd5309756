"""Metrics over bins of time in a report."""

from runtime.finished.compare import write_report
from runtime.finished.profiles import is_binned, profile, profile_names

LINES = [
    {"step": 1, "seconds": 1.0, "loss": 1.0, "curriculum/u/0-0.2": 0.0, "curriculum/u/0.8-1": 0.5},
    {"step": 2, "seconds": 2.0, "loss": 1.0, "curriculum/u/0.8-1": 0.7, "nfe/rollout": 1},
]


def test_bins_are_recognised():
    assert is_binned("curriculum/u/0.2-0.4")
    assert not is_binned("heldout/total")
    assert profile_names(key for line in LINES for key in line) == ["curriculum/u"]


def test_a_profile_is_the_mean_over_lines_that_have_the_bin():
    assert profile(LINES, "curriculum/u") == [(0.1, 0.0), (0.9, 0.6)]


def test_a_report_draws_one_plot_for_all_bins(tmp_path):
    lines = [{**line, "nfe/rollout": 1, "nfe/train": 1} for line in LINES]
    write_report({"run": lines}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Over the time t of the solve" in page
    assert page.count("curriculum") == 1, "one title"
    assert "0.8-1" not in page
    assert "u = t" in page
    write_report(
        {"run": [{k: v for k, v in line.items() if not k.startswith("curriculum")} for line in lines]}, tmp_path / "no.html"
    )
    assert "Over the time t" not in (tmp_path / "no.html").read_text()
