import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from diffusion.types import Prompt
from rollouts import prompts_of_step, read_prompts
from worlds import glyphs


def refused(source) -> str:
    with pytest.raises(ValueError, match=r"^prompts ") as error:
        read_prompts(str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize("name", ["train", "heldout", "evaluation", "tuning"])
def test_embedded(name):
    prompts = read_prompts(f"embedded:glyphs/{name}")
    assert [prompt.text for prompt in prompts] == glyphs.read_prompts(name)
    assert prompts[0] == Prompt("1", glyphs.read_prompts(name)[0])


def test_text(write):
    prompts = read_prompts(write("p.txt", "\ufeffa red circle\n\n  a blue – seven \r\n\n"))
    assert prompts == [Prompt("1", "a red circle"), Prompt("3", "a blue – seven")]


def test_jsonl(write):
    rows = [
        {"text": "one"},
        {"prompt": "two", "id": 17, "target": "TWO", "boxes": [[0, 1]]},
        {"text": "three\u2028and a half", "prompt": "kept", "id": "x"},
    ]
    prompts = read_prompts(write("p.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
    assert prompts == [
        Prompt("1", "one"),
        Prompt("17", "two", {"target": "TWO", "boxes": [[0, 1]]}),
        Prompt("x", "three\u2028and a half", {"prompt": "kept"}),
    ]


def test_ids_do_not_change_when_lines_are_added_at_the_end(write):
    before = read_prompts(write("p.txt", "one\n\ntwo"))
    after = read_prompts(write("p.txt", "one\n\ntwo\nthree"))
    assert after[:2] == before


TABLE = {"prompt": ["one", "two"], "id": ["a", "b"], "score": [0.5, None]}
EXPECTED = [Prompt("a", "one", {"score": 0.5}), Prompt("b", "two", {"score": None})]


def test_parquet(tmp_path):
    parquet.write_table(pyarrow.table(TABLE), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == EXPECTED
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "p.parquet")
    assert [prompt.id for prompt in read_prompts(str(tmp_path / "p.parquet"))] == ["1", "2"]


def test_a_saved_dataset(tmp_path):
    table = datasets.Dataset.from_dict(TABLE)
    table.save_to_disk(tmp_path / "one")
    assert read_prompts(str(tmp_path / "one")) == EXPECTED
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    assert read_prompts(str(tmp_path / "both" / "test")) == EXPECTED
    assert "contains several splits; choose the folder of one (allowed: test, train)" in refused(tmp_path / "both")
    assert "the folder has neither images nor a data set (allowed: " in refused(tmp_path)


@pytest.mark.parametrize(
    ("source", "asked", "texts"),
    [
        ("hf:owner/name", ("owner/name", "train"), ["one", "two"]),
        ("hf:name:test", ("name", "test"), ["one", "two"]),
        ("hf:owner/name:test:other", ("owner/name", "test"), ["eins", "zwei"]),
        ("hf:owner/name::other", ("owner/name", "train"), ["eins", "zwei"]),
    ],
)
def test_a_hub_dataset(monkeypatch, source, asked, texts):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_dict({"text": ["one", "two"], "other": ["eins", "zwei"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = read_prompts(source)
    assert calls == [asked]
    assert [prompt.text for prompt in prompts] == texts
    assert len(prompts[0].meta) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("no"), "not found on the hub"),
        (
            ConnectionError("no"),
            "'datasets/owner/name': it is not a local folder, not in the cache, and the hub cannot",
        ),
        (ValueError('Unknown split "tset". Should be one of ["train"].'), 'Unknown split "tset"'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, message):
    def load_dataset(name, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refusal = refused("hf:owner/name")
    assert refusal.startswith("prompts hf:owner/name: ")
    assert message in refusal


def test_sources_that_do_not_exist(write, tmp_path):
    assert f"prompts {tmp_path}/none.txt: there is no such file or folder (allowed: " in refused(tmp_path / "none.txt")
    assert "unknown file format (allowed: .txt, .jsonl, .parquet files" in refused(write("p.csv", "text"))
    assert "embedded:glyphs/train, embedded:glyphs/heldout" in refused("glyphs/train")
    sets = "(allowed: glyphs/evaluation, glyphs/heldout, glyphs/train, glyphs/tuning)"
    expected = f"prompts embedded:glyphs/held-out: no such embedded prompt set; did you mean 'glyphs/heldout'? {sets}"
    assert expected in refused("embedded:glyphs/held-out")
    assert "prompts hf:a:b:c:d: not the name of a dataset (allowed: hf:[OWNER/]NAME[:SPLIT][:COLUMN])" in refused("hf:a:b:c:d")
    assert "prompts hf:: not the name of a dataset" in refused("hf:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "contains no prompt"),
        ("p.txt", " \n\n", "contains no prompt"),
        ("p.txt", b"caf\xe9", "not UTF-8 text: "),
        ("p.jsonl", '{"text": "one"}\n\n{"text": two}', "line 3: not JSON: Expecting value at column 10"),
        ("p.jsonl", '["one"]', 'line 1: not a JSON object: ["one"]'),
        ("p.jsonl", '{"text": "one"}\n{"caption": "two", "n": 1}', "line 2: no column text or prompt (columns: caption, n)"),
        ("p.jsonl", "{}", "line 1: no column text or prompt (columns: none)"),
        ("p.jsonl", '{"text": " "}', "line 1: text ' ' is not a text"),
        ("p.jsonl", '{"text": 3}', "line 1: text 3 is not a text"),
        ("p.jsonl", '{"text": "one", "id": null}', "line 1: id None is neither a string nor an integer"),
        ("p.jsonl", '{"text": "one", "id": "2"}\n{"text": "two"}', "line 2: id '2' is already that of an earlier prompt"),
        ("p.parquet", "text", "not a Parquet file: "),
    ],
)
def test_wrong_content(write, name, content, message):
    assert message in refused(write(name, content))


def test_a_column_that_is_missing(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"text": ["one"]}))
    assert "row 1: no column caption (columns: text)" in refused("hf:owner/name:train:caption")


def numbered(number):
    return [Prompt(str(i), f"prompt {i}") for i in range(number)]


def drawn(prompts, steps, number, seed=0):
    return [prompt.id for step in steps for prompt in prompts_of_step(prompts, step, number, seed)]


@pytest.mark.parametrize(("size", "number"), [(12, 4), (12, 5), (7, 7), (3, 8)])
def test_every_prompt_occurs_once_in_every_pass(size, number):
    prompts = numbered(size)
    ids = drawn(prompts, range(1, size + 1), number)  # this many steps make `number` passes
    for start in range(0, len(ids), size):
        assert sorted(ids[start : start + size], key=int) == [prompt.id for prompt in prompts]


def test_passes_and_seeds_differ_and_are_shuffled():
    prompts = numbered(50)
    first, second, other = (drawn(prompts, [1], 50), drawn(prompts, [2], 50), drawn(prompts, [1], 50, seed=1))
    assert len({tuple(first), tuple(second), tuple(other), tuple(p.id for p in prompts)}) == 4


def test_a_step_is_a_pure_function_of_its_number():
    prompts = numbered(11)
    together = drawn(prompts, range(1, 9), 4)
    assert drawn(prompts, [7], 4) == together[24:28]
    assert drawn(prompts, [7], 4) == drawn(prompts, [7], 4)


def test_shuffles_are_uniform():
    """The first place of a pass goes to each of 4 prompts in about a quarter of 400 passes: 100 with a deviation of 9."""
    first = Counter(drawn(numbered(4), range(1, 1600, 4), 1))
    assert all(60 < first[str(i)] < 140 for i in range(4))


def test_the_package_imports_no_datasets():
    heavy = {"datasets", "pyarrow", "transformers", "diffusers"}
    code = f"import sys, rollouts; rollouts.read_prompts; print({heavy} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
