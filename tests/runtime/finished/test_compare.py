import json

import pytest
from PIL import Image

from runtime.experiment.config import InputError
from runtime.finished.compare import _running_mean, abscissa, read_runs, summary, write_figure, write_report


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 1, "seconds": 30.0, "nfe/rollout": 100, "nfe/train": 10, "reward/total": 0.25, "loss": 0.0},
        {
            "step": 2,
            "seconds": 90.0,
            "nfe/rollout": 200,
            "nfe/train": 20,
            "reward/total": 0.5,
            "loss": 0.0,
            "heldout/total": 0.6,
            "heldout/base/total": 0.4,
            "heldout/total_se": 0.05,
            "heldout/win_rate": 0.75,
        },
    ]
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_summary_has_first_and_last_values(run):
    (lines,) = read_runs([run]).values()
    assert summary("run", lines) == {
        "run": "run",
        "steps": "2",
        "minutes": "1.5",
        "network evaluations": "220",
        "reward": "0.250 -> 0.500",
        "held-out total": "0.400 -> 0.600",
        "gain / standard error": "+0.200 / 0.050",
        "win rate": "0.75",
    }


def test_the_axes(run):
    (lines,) = read_runs([run]).values()
    assert [abscissa(lines[0], axis) for axis in ("step", "seconds", "nfe")] == [1, 30.0, 110]


def test_the_figure_shows_trained_and_held_out_rewards(run, tmp_path):
    assert _running_mean([1.0, 2.0, 6.0]) == [1.0, 1.5, 3.0]
    assert _running_mean([0.0] * 5 + [1.0] * 10)[-1] == 1.0
    write_figure(read_runs([run]), tmp_path / "new" / "curve.svg")
    text = (tmp_path / "new" / "curve.svg").read_text()
    for title in ("heldout/total", "reward/total"):
        assert f"<!-- {title} -->" in text  # matplotlib's comment beside the glyphs of a text
    assert "<!-- loss -->" not in text
    write_figure(read_runs([run]), tmp_path / "loss.png", metric="loss")
    assert Image.open(tmp_path / "loss.png").size == (440, 330)


def test_the_page_needs_no_network_and_escapes_names(run, tmp_path):
    write_report(read_runs([run]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.split("</head>")[0]
    assert 'src="http' not in page
    assert "<h1>&lt;b&gt;run</h1>" in page
    assert "heldout\\u002ftotal" in page  # as plotly spells a slash
    assert '"step": [[2], [2]], "seconds": [[90.0], [90.0]], "nfe": [[220], [220]]' in page  # heldout/total and its teacher
    assert '<option value="step" selected>' in page
    assert "<b>run" not in page.split("<script>")[0]


def test_runs_of_equal_name_are_distinguished_and_a_folder_without_a_run_is_named(run, tmp_path):
    (tmp_path / "other").mkdir()
    run.rename(tmp_path / "other" / "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.jsonl").write_text((tmp_path / "other" / "x" / "metrics.jsonl").read_text())
    assert list(read_runs([tmp_path / "x", tmp_path / "other" / "x"])) == ["x", str(tmp_path / "other" / "x")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        read_runs([tmp_path / "empty"])
