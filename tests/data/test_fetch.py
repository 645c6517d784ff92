"""load(): where a dataset is looked for, in which order, and what happens when a source fails."""

import hashlib
import http.client
import io
import logging
import os
import subprocess
import types
import urllib.error
import zipfile
from pathlib import Path

import platformdirs
import pytest

from metarec_jax.data import fetch
from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError


def archive(rating: int) -> bytes:
    """An ml-100k archive with one rating, by which its source can be told."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("ml-100k/u.data", f"1\t1\t{rating}\t0\n")
    return buffer.getvalue()


def rating_of(data: Dataset) -> float:
    return float(data.rating[0])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; every source fails."""
    monkeypatch.setenv("METAREC_CACHE", str(tmp_path / "cache"))

    def _official(name, target, timeout):
        raise urllib.error.URLError("no route")

    def _recbole(name, target, timeout):
        raise DataError("no pip")

    monkeypatch.setattr(fetch, "_official", _official)
    monkeypatch.setattr(fetch, "_recbole", _recbole)
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that sends `content`, or raises it, in place of the official one."""
    state = types.SimpleNamespace(content=archive(3), asked=[])

    class Response(io.BytesIO):
        def read(self, *_):
            if isinstance(state.content, Exception):
                raise state.content
            return state.content

    def urlopen(url, timeout):
        state.asked.append((url, timeout))
        return Response()

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    return state


@pytest.fixture
def pip(monkeypatch):
    """A pip that downloads a wheel with `files`."""
    state = types.SimpleNamespace(files={}, returncode=0, commands=[])

    def run(command, **_):
        state.commands.append(command)
        if state.returncode == 0:
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "recbole-1.2.1.whl", "w") as wheel:
                for name, content in state.files.items():
                    wheel.writestr(name, content)
        return types.SimpleNamespace(returncode=state.returncode, stderr="a\nno such index\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return state


def source(rating: int):
    def write(name, target, timeout):
        target.write_bytes(archive(rating))

    return write


def test_a_path_goes_before_the_cache_before_the_official_archive_before_the_copy(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_recbole", source(1))
    assert rating_of(fetch.load("ml-100k", cache=tmp_path / "a")) == 1
    monkeypatch.setattr(fetch, "_official", source(2))
    assert rating_of(fetch.load("ml-100k", cache=tmp_path / "b")) == 2
    cache.mkdir()
    (cache / "ml-100k.zip").write_bytes(archive(3))
    assert rating_of(fetch.load("ml-100k")) == 3
    (tmp_path / "mine.zip").write_bytes(archive(4))
    data = fetch.load("ml-100k", path=tmp_path / "mine.zip")
    assert rating_of(data) == 4
    assert data.name == "ml-100k"


def test_a_download_is_kept_and_the_licence_is_told_once(cache, monkeypatch, caplog):
    monkeypatch.setattr(fetch, "_official", source(2))
    with caplog.at_level(logging.WARNING):
        fetch.load("ml-100k")
        monkeypatch.setattr(fetch, "_official", source(5))
        assert rating_of(fetch.load("ml-100k")) == 2
    assert [r.getMessage() for r in caplog.records if "own licence" in r.getMessage()] == [fetch.LICENCE]


def test_only_ml_100k_has_a_copy(cache, monkeypatch):
    monkeypatch.setattr(fetch, "_recbole", source(1))
    with pytest.raises(DataError, match="ml-1m is not in the cache"):
        fetch.load("ml-1m")


def test_the_cache_is_the_argument_else_the_variable_else_the_users_own(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "own" / name))
    monkeypatch.setattr(fetch, "_official", source(2))
    fetch.load("ml-100k", cache=tmp_path / "argument")
    assert (tmp_path / "argument" / "ml-100k.zip").exists()
    assert not cache.exists()
    fetch.load("ml-100k")
    assert (cache / "ml-100k.zip").exists()
    monkeypatch.delenv("METAREC_CACHE")
    fetch.load("ml-100k")
    assert (tmp_path / "own" / "metarec_jax" / "ml-100k.zip").exists()


def test_without_network_and_data_one_error_names_every_reason_and_three_ways(cache):
    with pytest.raises(DataError) as caught:
        fetch.load("ml-100k")
    message = str(caught.value)
    for part in (
        "no route",
        "no pip",
        "(1)",
        "(2)",
        "(3)",
        "path=",
        "data.synthetic(",
        "ml-100k.zip",
        str(cache),
    ):
        assert part in message


def test_download_false_never_asks_a_source_and_names_three_ways(cache, monkeypatch):
    monkeypatch.setattr(fetch, "_official", source(2))
    with pytest.raises(DataError) as caught:
        fetch.load("ml-100k", download=False)
    for part in ("download=False", "(1)", "(2)", "(3)", "data.synthetic("):
        assert part in str(caught.value)
    assert not cache.exists()


def test_a_name_that_is_no_dataset_and_no_file_is_told_so(cache):
    with pytest.raises(DataError, match=r"ml-99.*ml-100k.*nor an existing file"):
        fetch.load("ml-99")


def test_a_damaged_file_in_the_cache_tells_to_delete_it(cache):
    cache.mkdir()
    (cache / "ml-100k.zip").write_bytes(archive(3)[:-30])
    with pytest.raises(DataError, match=r"Delete .*ml-100k\.zip"):
        fetch.load("ml-100k")


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder", "zip"])
def test_a_local_file_is_read_by_its_path(cache, tmp_path, kind):
    import polars as pl

    path = tmp_path / f"mine.{kind}"
    table = pl.DataFrame({"user_id": [1], "item_id": [1], "rating": [3.0], "timestamp": [0]})
    if kind == "csv":
        table.write_csv(path)
    elif kind == "parquet":
        table.write_parquet(path)
    elif kind == "zip":
        path.write_bytes(archive(3))
    else:
        path.mkdir()
        (path / "u.data").write_text("1\t1\t3\t0\n")
    data = fetch.load(str(path))
    assert rating_of(data) == 3
    assert data.name == "mine"


# The official archive


def official(tmp_path, name="ml-100k"):
    fetch._official(name, tmp_path / f"{name}.zip", 2.5)


def test_the_official_archive_is_taken_when_its_checksum_is_right(tmp_path, server, monkeypatch):
    monkeypatch.setitem(fetch.MD5, "ml-100k", hashlib.md5(server.content).hexdigest())
    official(tmp_path)
    assert (tmp_path / "ml-100k.zip").read_bytes() == server.content
    assert server.asked == [("https://files.grouplens.org/datasets/movielens/ml-100k.zip", 2.5)]
    assert os.listdir(tmp_path) == ["ml-100k.zip"]


def test_an_official_archive_with_a_wrong_checksum_is_refused(tmp_path, server):
    with pytest.raises(DataError, match="checksum"):
        official(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_no_archive_is_refused_where_no_checksum_is_published(tmp_path, server):
    official(tmp_path, "ml-latest")
    assert (tmp_path / "ml-latest.zip").exists()
    for content in (b"<html>log in to this network</html>", archive(3)[:-30]):
        server.content = content
        with pytest.raises(DataError, match="no zip archive"):
            official(tmp_path, "ml-latest-small")
    assert os.listdir(tmp_path) == ["ml-latest.zip"]


@pytest.mark.parametrize(
    "failure", [http.client.IncompleteRead(b"half"), TimeoutError("slow"), ConnectionError("gone")]
)
def test_a_download_that_breaks_off_leaves_nothing_and_the_next_source_is_tried(tmp_path, server, monkeypatch, failure):
    server.content = failure
    monkeypatch.setattr(fetch, "_recbole", source(1))
    assert rating_of(fetch.load("ml-100k", cache=tmp_path / "a")) == 1
    assert os.listdir(tmp_path / "a") == ["ml-100k.zip"]
    with pytest.raises(DataError, match="official: "):
        fetch.load("ml-1m", cache=tmp_path / "b")
    assert os.listdir(tmp_path / "b") == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def replace(*_):
        raise OSError("disk full")

    monkeypatch.setattr(fetch.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        fetch._write(tmp_path / "ml-100k.zip", b"content")
    assert os.listdir(tmp_path) == []


# The copy in recbole's wheel

MEMBERS = {
    "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t1\t2\t0\n",
    "ml-100k.item": (b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tA\t1990\tDrama\n"),
    "ml-100k.user": (b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n1\t2\tM\tx\t3\n"),
}
FOLDER = "recbole/dataset_example/ml-100k/"


@pytest.fixture
def checksums(monkeypatch):
    monkeypatch.setattr(fetch, "RECBOLE_SHA256", {m: hashlib.sha256(c).hexdigest() for m, c in MEMBERS.items()})


def test_only_the_data_of_the_wheel_is_taken(tmp_path, pip, checksums):
    pip.files = {FOLDER + m: c for m, c in MEMBERS.items()} | {"recbole/__init__.py": b"raise SystemExit"}
    fetch._recbole("ml-100k", tmp_path / "ml-100k.zip", 1.0)
    with zipfile.ZipFile(tmp_path / "ml-100k.zip") as packed:
        assert {n: packed.read(n) for n in packed.namelist()} == MEMBERS
    assert os.listdir(tmp_path) == ["ml-100k.zip"]
    (command,) = pip.commands
    assert {"download", "--no-deps", "--only-binary=:all:", "recbole==1.2.1"} <= set(command)
    data = fetch.load("ml-100k", path=tmp_path / "ml-100k.zip")
    assert data.titles is not None
    assert data.titles[1] == "A (1990)"


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_with_a_wrong_checksum_is_refused(tmp_path, pip, checksums, member):
    pip.files = {FOLDER + m: c + (b"x" if m == member else b"") for m, c in MEMBERS.items()}
    with pytest.raises(DataError, match=rf"{member}.*SHA-256"):
        fetch._recbole("ml-100k", tmp_path / "ml-100k.zip", 1.0)
    assert os.listdir(tmp_path) == []


def test_a_wheel_without_the_data_is_refused(tmp_path, pip):
    pip.files = {"recbole/__init__.py": b""}
    with pytest.raises(DataError, match=r"recbole==1\.2\.1 cannot be read"):
        fetch._recbole("ml-100k", tmp_path / "ml-100k.zip", 1.0)


def test_what_pip_says_last_is_told(tmp_path, pip):
    pip.returncode = 1
    with pytest.raises(DataError, match=r"pip could not download recbole==1\.2\.1 \(no such index\)"):
        fetch._recbole("ml-100k", tmp_path / "ml-100k.zip", 1.0)


def test_a_pip_that_hangs_is_one_more_reason(cache, monkeypatch):
    def _recbole(name, target, timeout):
        raise subprocess.TimeoutExpired("pip", 300)

    monkeypatch.setattr(fetch, "_recbole", _recbole)
    with pytest.raises(DataError, match=r"recbole: .*timed out"):
        fetch.load("ml-100k")


# The real data


def test_the_real_ml_100k_is_whole(tmp_path):
    """From the user's cache, else through pip; skipped where neither has it."""
    try:
        data = fetch.load("ml-100k", download=False)
    except DataError:
        try:
            fetch._recbole("ml-100k", tmp_path / "ml-100k.zip", 10.0)
        except (DataError, subprocess.SubprocessError) as error:
            pytest.skip(f"ml-100k is neither in the cache nor to be had from a package index: {error}")
        data = fetch.load("ml-100k", cache=tmp_path)
    assert (len(data.users) - 1, len(data.items) - 1, len(data.rating)) == (943, 1682, 100_000)
    assert data.report == {"rows": 100_000, "duplicates": 0}
    assert set(data.rating.tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert data.titles is not None
    assert data.titles[data.items.encode([1, 267, 1412])].tolist() == [
        "Toy Story (1995)",
        "unknown",
        "Land Before Time III: The Time of the Great Giving (1995) (V)",
    ]
    first = (data.users.decode(data.user[:1])[0], data.items.decode(data.item[:1])[0], data.rating[0])
    assert first == (196, 242, 3.0)
