"""Prepared histories: what `from_tables` finds, at any size, and whole after a kill or a full disk."""

import errno
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.data import prepared, stream
from metarec_jax.errors import DataError

SMALL = {"shards": 3, "piece": 70, "progress": False}


def table(seed: int, rows: int = 400, users: int = 25, items: int = 30, names: bool = False) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    ids = {"user_id": rng.integers(0, users, rows) * 2**40 - 7, "item_id": rng.integers(0, items, rows) * 3}
    if names:
        ids = {k: np.array([f"{k[0]}é{v}" for v in values]) for k, values in ids.items()}
    return pl.DataFrame(
        ids | {"rating": rng.integers(1, 6, rows).astype(float), "timestamp": rng.integers(0, 40, rows)}
    )


def write(frame: pl.DataFrame, path: Path) -> Path:
    writers = {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}
    writers.get(path.suffix, lambda p: frame.write_csv(p, separator="\t"))(path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_against_from_tables(done: mr.data.Prepared, frame: pl.DataFrame) -> None:
    data = mr.data.from_tables(frame)
    expected = {}
    for user in data.users.ids.tolist():
        rows = np.flatnonzero(data.user == data.users.encode([user])[0])
        rows = rows[np.argsort(data.order[rows])]
        expected[user] = (data.items.ids[data.item[rows] - 1], data.rating[rows], data.timestamp[rows])
    assert done.items.ids.tolist() == data.items.ids.tolist()
    assert done.report == {
        "rows": frame.height,
        "duplicates": data.report["duplicates"],
        "cut": 0,
        "users": len(expected),
        "items": len(data.items) - 1,
    }
    for user, arrays in expected.items():
        for ours, theirs in zip(done.history(user), arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("names", [False, True])
def test_every_format_gives_what_from_tables_finds(suffix, names, tmp_path):
    one, two = table(0, names=names), table(1, rows=90, names=names)
    files = [write(f, tmp_path / f"{i}{suffix}") for i, f in enumerate((one, two))]
    check_against_from_tables(mr.data.prepare(files, tmp_path / "out", **SMALL), pl.concat([one, two]))


def test_shards_are_datasets_that_hold_every_user_once(tmp_path):
    frame = table(0)
    done = mr.data.prepare(write(frame, tmp_path / "a.parquet"), tmp_path / "out", **SMALL)
    shards = [done.shard(n) for n in range(done.shards)]
    users = np.concatenate([s.users.ids for s in shards])
    assert sorted(users.tolist()) == sorted(frame["user_id"].unique().to_list())
    assert sum(len(s.rating) for s in shards) == frame.height - done.report["duplicates"]
    biggest = max(shards, key=lambda s: len(s.rating))
    histories = mr.tasks.Histories.of(biggest, np.arange(1, len(biggest.users)))
    (batch,) = mr.tasks.batches(histories, mr.tasks.Target("click"), query=2, buckets=(64,), batch_size=64)
    assert batch.task.support.mask.sum() + batch.task.query.mask.sum() == len(biggest.rating)
    assert isinstance(biggest.item, np.memmap)


def test_only_the_latest_of_a_long_history_stay_and_are_counted(tmp_path):
    frame = table(0)
    source = write(frame, tmp_path / "a.parquet")
    whole = mr.data.prepare(source, tmp_path / "whole", **SMALL)
    short = mr.data.prepare(source, tmp_path / "short", max_history=4, **SMALL)
    left = 0
    for user in frame["user_id"].unique().to_list():
        for a, b in zip(whole.history(user), short.history(user), strict=True):
            np.testing.assert_array_equal(a[-4:], b)
        left += len(b)
    assert short.report["cut"] == frame.height - short.report["duplicates"] - left > 0


def test_a_user_with_very_many_interactions_is_no_trouble(tmp_path):
    rows = 1_000_000
    frame = pl.DataFrame({"user_id": np.ones(rows, int), "item_id": np.arange(rows), "rating": np.ones(rows)})
    done = mr.data.prepare(write(frame, tmp_path / "a.parquet"), tmp_path / "out", shards=2, progress=False)
    items, ratings, _ = done.history(1)
    assert items.tolist() == list(range(rows))
    assert len(ratings) == rows
    assert len(done.history(2)[0]) == 0


SCRIPT = """
import sys
import metarec_jax as mr
mr.data.prepare(sys.argv[1:-1], sys.argv[-1], shards=40, piece=60, progress=False)
"""


def test_killed_at_any_moment_it_goes_on_without_loss_or_duplication(tmp_path):
    files = [write(table(i, rows=4000, users=300), tmp_path / f"{i}.parquet") for i in range(2)]
    options = {"shards": 40, "piece": 60, "progress": False}
    expected = content(mr.data.prepare(files, tmp_path / "expected", **options).path)
    rng, killed, out = random.Random(0), 0, tmp_path / "out"

    def written() -> int:
        return len(list(out.glob("work/piece-*"))) + len(list(out.glob("shard-*")))

    for _ in range(4):
        command = [sys.executable, "-c", SCRIPT, *map(str, files), str(out)]
        with subprocess.Popen(command) as process:
            goal, end = written() + rng.randrange(1, 40), time.monotonic() + 60
            while process.poll() is None and written() < goal and time.monotonic() < end:
                time.sleep(0.001 * rng.random())
            process.kill()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    assert content(mr.data.prepare(files, out, **options).path) == expected
    assert not (out / "work").exists()


def test_a_full_disk_is_told_and_the_next_call_goes_on(tmp_path, monkeypatch):
    files = [write(table(i), tmp_path / f"{i}.parquet") for i in range(2)]
    expected = content(mr.data.prepare(files, tmp_path / "expected", **SMALL).path)
    real, room = stream.write_whole, [9]

    def full(path, data):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    for space in (9, 30, 12):
        room[0] = space
        monkeypatch.setattr(stream, "write_whole", full)
        monkeypatch.setattr(prepared, "write_whole", full)
        with pytest.raises(DataError, match=r"no space left.*bytes.*call prepare"):
            mr.data.prepare(files, tmp_path / "out", **SMALL)
    monkeypatch.setattr(stream, "write_whole", real)
    monkeypatch.setattr(prepared, "write_whole", real)
    assert content(mr.data.prepare(files, tmp_path / "out", **SMALL).path) == expected


def test_a_finished_preparation_is_opened_and_another_is_refused(tmp_path, monkeypatch):
    source = write(table(0), tmp_path / "a.parquet")
    done = mr.data.prepare(source, tmp_path / "out", **SMALL)
    monkeypatch.setattr(stream, "_gather", None)  # must not be needed
    assert mr.data.prepare(source, tmp_path / "out", **SMALL).report == done.report
    with pytest.raises(DataError, match="other options"):
        mr.data.prepare(source, tmp_path / "out", **SMALL | {"shards": 4})
    with pytest.raises(DataError, match="something else"):
        mr.data.prepare(source, tmp_path, **SMALL)
    shutil.rmtree(tmp_path / "out" / "shard-00000")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        mr.data.Prepared.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rating", float("nan"), r"bad\.parquet \(rows counted from row 140\).*'rating' is nan in row 10"),
        ("user_id", None, r"rows counted from row 140.*'user_id' has no id in row 10"),
        ("timestamp", 10**12, r"row 10.*milliseconds"),
    ],
)
def test_a_bad_value_is_told_with_its_file_and_row(column, value, message, tmp_path):
    there = pl.int_range(pl.len()) == 150
    frame = table(0).with_columns(pl.when(there).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))
    source = write(frame, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=message):
        mr.data.prepare(source, tmp_path / "out", **SMALL)


def test_damaged_missing_and_strange_files_are_told(tmp_path):
    whole = write(table(0), tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read"):
        mr.data.prepare(tmp_path / "cut.parquet", tmp_path / "out", **SMALL)
    (tmp_path / "bad.csv").write_bytes(b"user_id,item_id,rating\nann\xff,1,3\n")
    with pytest.raises(DataError, match=r"bad\.csv"):
        mr.data.prepare(tmp_path / "bad.csv", tmp_path / "out2", **SMALL)
    with pytest.raises(DataError, match="no such file"):
        mr.data.prepare(tmp_path / "gone.parquet", tmp_path / "out3", **SMALL)
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind of table"):
        mr.data.prepare(tmp_path / "a.xlsx", tmp_path / "out4", **SMALL)
    (tmp_path / "few.csv").write_text("user_id,item_id\n1,2\n")
    with pytest.raises(DataError, match=r"few\.csv: column 'stars' is missing, and `columns` names it"):
        mr.data.prepare(tmp_path / "few.csv", tmp_path / "out5", columns={"rating": "stars"}, **SMALL)
    rated = write(table(0), tmp_path / "rated.csv")
    with pytest.raises(DataError, match=r"few\.csv: column 'rating' is missing, and .*rated\.csv has it"):
        mr.data.prepare([rated, tmp_path / "few.csv"], tmp_path / "out5", **SMALL)
    mixed = [write(table(0), tmp_path / "n.parquet"), write(table(0, names=True), tmp_path / "s.parquet")]
    with pytest.raises(DataError, match="integers in one file and strings in another"):
        mr.data.prepare(mixed, tmp_path / "out6", **SMALL)
