"""The trajectory store: stored equals drawn, nothing damaged is ever read, and processes do not harm each other."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion import SOLVERS, Group, Plan, Prompt, guided, integrate
from generators import load
from rollouts import records
from rollouts.records import RecordStore, checksum
from rollouts.store import Stored
from rollouts.worker import Worker

ROOT = Path(__file__).parents[2]
IDENTITY = {"weights": "w", "family": "sd3", "dtype": "float32", "solver": "euler", "grid": [1, 0], "guidance": [2.5, 2.5]}
TEACHER = Plan(source="teacher", record="all", scored=False)
TEXTS = ["a red circle", "a blue seven", "a green cross above a white two"]


class Counting:
    """The glyph teacher, with its calls counted."""

    def __init__(self, generator):
        self.generator, self.rows, self.encoded = generator, 0, 0

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def __call__(self, x, t, condition, adapter):
        self.rows += len(x)
        return self.generator(x, t, condition, adapter)

    def encode(self, prompts):
        self.encoded += len(prompts)
        return self.generator.encode(prompts)


@pytest.fixture(scope="module")
def glyphs():
    return load("embedded:glyphs")


@pytest.fixture
def counting(glyphs):
    return Counting(glyphs)


def new_worker(generator, steps=4, most=4, guidance=2.5):
    grid = generator.time_grid(steps, even=True)
    shape = generator.latent_shape(32, 32)
    return Worker(generator, solver=SOLVERS["euler"], grid=grid, shape=shape, guidance=guidance, most=most)


def stored(generator, folder, limit=None, **options):
    return Stored(new_worker(generator, **options), RecordStore(folder, limit), IDENTITY)


def groups(number=3):
    return [Group(Prompt(str(i), TEXTS[i % 3]), i, [100 + i]) for i in range(number)]


def same(a, b):
    assert torch.equal(a.trajectory.x, b.trajectory.x)
    assert torch.equal(a.trajectory.t, b.trajectory.t)
    assert torch.equal(a.group, b.group)
    assert torch.equal(a.seeds, b.seeds)
    assert a.condition.tensors.keys() == b.condition.tensors.keys()
    for name, value in a.condition.tensors.items():
        assert torch.equal(value, b.condition.tensors[name])
        assert value.dtype == b.condition.tensors[name].dtype
    assert a.version == b.version
    assert list(a.prompts) == list(b.prompts)


def test_stored_is_what_the_worker_draws_and_a_warm_store_draws_nothing(counting, tmp_path):
    source = stored(counting, tmp_path)
    cold = source.take(groups(), TEACHER)
    same(cold.rollout, source.behind.take(groups(), TEACHER).rollout)
    assert (cold.nfe, cold.saved) == (3 * 4 * 2, 0)
    other = stored(counting, tmp_path)
    counting.rows = counting.encoded = 0
    warm = other.take(groups(), TEACHER)
    same(warm.rollout, cold.rollout)
    assert (counting.rows, counting.encoded) == (0, 0), "neither the network nor the text encoders"
    assert (warm.nfe, warm.saved) == (0, 3 * 4 * 2)
    picked = other.take(groups(), replace(TEACHER, record=[0, 4])).rollout
    assert torch.equal(picked.trajectory.x, cold.rollout.trajectory.x[:, [0, 4]])


def test_indexing_the_trajectory_is_running_the_teacher_from_every_start(glyphs, tmp_path):
    stored(glyphs, tmp_path, steps=6).take(groups(), TEACHER)
    rollout = stored(glyphs, tmp_path, steps=6).take(groups(), TEACHER).rollout
    negative = glyphs.encode([""]).repeat(3)
    predict = guided(glyphs, rollout.condition, adapter=None, scale=2.5, negative=negative)
    for start in range(6):
        x, grid = rollout.trajectory.x[:, start], rollout.trajectory.t[start:]
        with torch.no_grad():
            again = integrate(predict, x, grid, glyphs.path, SOLVERS["euler"], record=range(len(grid)))
        torch.testing.assert_close(again.x, rollout.trajectory.x[:, start:], rtol=1e-4, atol=1e-5)


def test_a_missing_group_is_drawn_with_its_micro_batch(counting, tmp_path):
    """Calls split at multiples of a micro-batch give the same bits, whatever was stored before."""
    whole = stored(counting, tmp_path / "whole", most=2).take(groups(6), TEACHER).rollout
    source = stored(counting, tmp_path / "parts", most=2)
    source.take(groups(6)[2:4], TEACHER)
    first, second = source.take(groups(6)[:4], TEACHER), source.take(groups(6)[4:], TEACHER)
    joined = torch.cat([first.rollout.trajectory.x, second.rollout.trajectory.x])
    assert torch.equal(joined, whole.trajectory.x)
    assert (first.nfe, first.saved) == (2 * 4 * 2, 2 * 4 * 2)


def test_the_key_depends_on_the_teacher_the_prompt_and_the_seed(glyphs, tmp_path):
    source = stored(glyphs, tmp_path)
    group = groups()[0]
    keys = {source.trajectory_key(group, 100), source.trajectory_key(group, 101)}
    keys.add(source.trajectory_key(replace(group, prompt=Prompt("0", "another text")), 100))
    for name in IDENTITY:
        changed = Stored(source.behind, source.store, {**IDENTITY, name: "changed"})
        keys.add(changed.trajectory_key(group, 100))
    assert len(keys) == 3 + len(IDENTITY)
    assert source.trajectory_key(replace(group, prompt=Prompt("other id", group.prompt.text)), 100) in keys


@pytest.mark.parametrize("plan", [Plan(source="policy", scored=False), Plan(source="teacher"), replace(TEACHER, noisy=[0])])
def test_plans_that_no_store_serves(glyphs, tmp_path, plan):
    with pytest.raises(ValueError, match="serves the teacher's plans"):
        stored(glyphs, tmp_path).take(groups(), plan)


# --- damage


def shard_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, Path.unlink, lambda file: file.write_bytes(b"not safetensors")])
def test_a_damaged_shard_is_drawn_again(counting, tmp_path, damage, capfd):
    right = stored(counting, tmp_path).take(groups(), TEACHER).rollout
    damage(shard_of(tmp_path))
    counting.rows = 0
    source = stored(counting, tmp_path)
    same(source.take(groups(), TEACHER).rollout, right)
    assert counting.rows > 0
    assert capfd.readouterr().err.count("damaged; its records are drawn again") == 1
    counting.rows = 0
    same(stored(counting, tmp_path).take(groups(), TEACHER).rollout, right)


@pytest.mark.parametrize("damaged_is_read", ["first", "last"])
def test_after_the_damage_is_repaired_the_store_is_warm(counting, tmp_path, monkeypatch, damaged_is_read):
    """Whichever of the two indices of a key is read last, since shards have random names."""
    names = iter(["a", "b"] if damaged_is_read == "first" else ["b", "a"])
    monkeypatch.setattr(records.uuid, "uuid4", lambda: type("Name", (), {"hex": next(names)}))
    stored(counting, tmp_path).take(groups(), TEACHER)
    flip_a_byte(shard_of(tmp_path))
    stored(counting, tmp_path).take(groups(), TEACHER)
    counting.rows = 0
    stored(counting, tmp_path).take(groups(), TEACHER)
    assert counting.rows == 0


def test_a_shard_that_is_cut_short_while_it_is_open(counting, tmp_path, capfd):
    source = stored(counting, tmp_path)
    source.take(groups(), TEACHER)
    right = source.take(groups(), TEACHER).rollout
    os.truncate(shard_of(tmp_path), 100)
    same(source.take(groups(), TEACHER).rollout, right)
    assert "damaged" in capfd.readouterr().err


def test_foreign_and_damaged_files_are_ignored(counting, tmp_path, capfd):
    right = stored(counting, tmp_path).take(groups(), TEACHER).rollout
    (tmp_path / "foreign.safetensors").write_bytes(shard_of(tmp_path).read_bytes())
    (tmp_path / "foreign.parquet").write_bytes(b"PAR1 is not enough")
    (tmp_path / ".half.safetensors.1.tmp").write_bytes(b"half")
    counting.rows = 0
    same(stored(counting, tmp_path).take(groups(), TEACHER).rollout, right)
    assert counting.rows == 0
    assert "foreign.parquet: not an index of this store" in capfd.readouterr().err


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from rollouts import records
from rollouts.records import RecordStore

point = sys.argv[2]
save, write = records.save_file, records.write_index

def half(tensors, file):
    save(tensors, file)
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def before_index(entries, file):
    os.kill(os.getpid(), signal.SIGKILL)

def half_index(entries, file):
    write(entries, file)
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

if point == "shard": records.save_file = half
if point == "between": records.write_index = before_index
if point == "index": records.write_index = half_index
RecordStore(Path(sys.argv[1])).write({"k": ({"x": torch.arange(1000.0)}, {"kind": "test"})})
"""


@pytest.mark.parametrize("point", ["shard", "between", "index"])
def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path, point, capfd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()), "the process was killed in the middle of its work"
    store = RecordStore(tmp_path)
    assert store.read(["k"]) == {}
    assert store.entries() == []
    assert store.write({"k": ({"x": torch.ones(3)}, {})})
    assert RecordStore(tmp_path).read(["k"])["k"]["x"].tolist() == [1, 1, 1]
    assert capfd.readouterr().err == ""


def test_leftovers_of_dead_writers_are_removed_after_a_day(tmp_path):
    old, new = tmp_path / ".old.safetensors.1.tmp", tmp_path / ".new.safetensors.2.tmp"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 90000,) * 2)
    RecordStore(tmp_path).write({"k": ({"x": torch.ones(1)}, {})})
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_does_not_end_the_run(counting, tmp_path, monkeypatch, capfd):
    def full(tensors, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "save_file", full)
    source = stored(counting, tmp_path)
    right = source.behind.take(groups(), TEACHER).rollout
    for _ in range(2):
        same(source.take(groups(), TEACHER).rollout, right)
    assert list(tmp_path.iterdir()) == [], "no half file is left"
    assert capfd.readouterr().err.count("the disk is full") == 1

    def failing(tensors, file):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(records, "save_file", failing)
    with pytest.raises(OSError, match="broken disk"):
        source.take(groups(), TEACHER)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_file_system_that_is_really_full(counting, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        source = stored(counting, small / "store")
        same(source.take(groups(), TEACHER).rollout, source.behind.take(groups(), TEACHER).rollout)
        assert [path.name for path in (small / "store").iterdir()] == []
        assert "the disk is full" in capfd.readouterr().err
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_at_its_limit_a_store_takes_no_more(counting, tmp_path, capfd):
    source = stored(counting, tmp_path, limit=1)
    source.take(groups(1), TEACHER)
    before = sorted(tmp_path.iterdir())
    assert len(before) == 2, "the limit is checked before a shard"
    for _ in range(2):
        same(source.take(groups(), TEACHER).rollout, source.behind.take(groups(), TEACHER).rollout)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written, nothing is lost"
    assert capfd.readouterr().err.count("its limit (teacher.store_limit) is 1") == 1


# --- several processes

WRITER = """
import sys, torch
from pathlib import Path
from rollouts.records import RecordStore

store = RecordStore(Path(sys.argv[1]))
for i in range(40):
    key = f"k{i}"
    if key not in (found := store.read([key])):
        store.write({key: ({"x": torch.full((50,), float(i))}, {"writer": sys.argv[2]})})
    else:
        assert found[key]["x"].tolist() == [float(i)] * 50
"""


def test_two_runs_share_a_store(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)], env=environment) for n in range(2)]
    reader = RecordStore(tmp_path)
    while any(process.poll() is None for process in processes):
        for key, tensors in reader.read([f"k{i}" for i in range(40)]).items():
            assert tensors["x"].tolist() == [float(key[1:])] * 50
    assert [process.returncode for process in processes] == [0, 0]
    found = RecordStore(tmp_path).read([f"k{i}" for i in range(40)])
    assert sorted(found) == sorted(f"k{i}" for i in range(40))
    assert {entry.key for entry in RecordStore(tmp_path).entries()} == set(found)


def test_records_that_another_process_writes_are_noticed(tmp_path):
    reader, writer = RecordStore(tmp_path), RecordStore(tmp_path)
    assert reader.read(["k"]) == {}
    writer.write({"k": ({"x": torch.ones(2)}, {})})
    assert reader.read(["k"])["k"]["x"].tolist() == [1, 1]


def test_other_users_can_read_a_store(tmp_path):
    RecordStore(tmp_path).write({"k": ({"x": torch.ones(2)}, {})})
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "OPEN_SHARDS", 3)
    store = RecordStore(tmp_path)
    for i in range(8):
        store.write({str(i): ({"x": torch.tensor([float(i)])}, {})})
    found = RecordStore(tmp_path)
    assert {key: value["x"].item() for key, value in found.read([str(i) for i in range(8)]).items()} == {
        str(i): i for i in range(8)
    }
    assert len(found._open) == 3


def test_the_checksum_covers_names_shapes_dtypes_and_bytes():
    x = torch.arange(4.0)
    different = {
        checksum({"x": x}),
        checksum({"y": x}),
        checksum({"x": x.view(2, 2)}),
        checksum({"x": x.view(torch.int32)}),
        checksum({"x": x + 1}),
        checksum({"x": x, "y": x}),
    }
    assert len(different) == 6
    assert checksum({"b": x, "a": x}) == checksum({"a": x.clone(), "b": x})
    assert checksum({"x": torch.ones(2, dtype=torch.bfloat16)})
