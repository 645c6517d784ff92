"""Fetch: load a named dataset from a local path, the cache, the official archive, or a PyPI package."""

import hashlib
import http.client
import io
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from metarec_jax.data import movielens
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.tables import from_tables, read_table
from metarec_jax.errors import DataError

logger = logging.getLogger(__name__)

OFFICIAL = "https://files.grouplens.org/datasets/movielens/{}.zip"
MD5 = {  # as published with the archives; ml-latest* changes over time and has none here
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
}
NAMES = ("ml-100k", "ml-1m", "ml-latest-small", "ml-latest")
RECBOLE = "recbole==1.2.1"  # its wheel holds a copy of ml-100k; only the members below are read
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k/"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
LICENCE = (
    "MovieLens data has its own licence (research use, no redistribution, cite Harper and Konstan, 2015): "
    "see https://grouplens.org/datasets/movielens/"
)


def load(
    name: str,
    path: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    download: bool = True,
    timeout: float = 10.0,
) -> Dataset:
    """Load a dataset by name, or from a file.

    `load("ml-100k")` tries, in this order: `path`, the cache, the official archive, and (ml-100k only) the copy in the
    PyPI package recbole 1.2.1. Only the data files of the package are read; no code of it runs.

    Args:
      name: "ml-100k", "ml-1m", "ml-latest-small" or "ml-latest"; or the path of a folder or archive in one of these
        layouts, of a folder of RecBole's atomic files, or of a .csv, .tsv, .jsonl or .parquet table with the columns
        user_id, item_id and, optionally, rating and timestamp.
      path: a local folder or archive to read instead of downloading.
      cache: download folder (default: `METAREC_CACHE`, or the user's cache folder).
      download: False disables network access.
      timeout: seconds to wait for the official server before the next source is tried.

    Raises:
      DataError: nothing could be found or read; the message says what to do.

    Example:
      >>> import polars as pl
      >>> pl.DataFrame({"user_id": [1, 2], "item_id": ["tea", "rye"]}).write_csv("plays.csv")
      >>> mr.data.load("plays.csv")
      Dataset(plays: 2 interactions, 2 users, 2 items)
    """
    if path is not None:
        return movielens.read(path, name)
    if name not in NAMES:
        return _read_path(Path(name))
    folder = cache_folder(cache)
    cached = folder / f"{name}.zip"
    if cached.exists():
        try:
            return movielens.read(cached, name)
        except DataError as error:
            raise DataError(f"{error}. Delete {cached} and call again to download it") from error
    reasons = ["download=False"]
    if download:
        reasons = []
        sources = [_official, _recbole] if name == "ml-100k" else [_official]
        for source in sources:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                source(name, cached, timeout)
            except (OSError, http.client.HTTPException, DataError, subprocess.SubprocessError) as error:
                reasons.append(f"{source.__name__.strip('_')}: {error}")
                continue
            logger.warning(LICENCE)
            return movielens.read(cached, name)
    raise DataError(
        f"{name} is not in the cache ({folder}) and could not be fetched ({'; '.join(reasons)}). "
        f"You can (1) go online and try again; (2) download the archive from {OFFICIAL.format(name)} "
        f'on another machine and call load("{name}", path="{name}.zip"); (3) use '
        "metarec_jax.data.synthetic(...), which needs no download."
    )


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the download folder: `cache`, else `METAREC_CACHE`, else the user's cache folder."""
    return Path(cache or os.environ.get("METAREC_CACHE") or platformdirs.user_cache_dir("metarec_jax"))


def _read_path(path: Path) -> Dataset:
    if not path.exists():
        raise DataError(f"{path}: neither a known dataset ({', '.join(NAMES)}) nor an existing file or folder")
    if path.suffix in (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq"):
        return from_tables(read_table(path), name=path.stem)
    return movielens.read(path)


def _official(name: str, target: Path, timeout: float) -> None:
    """Download the official archive; verify its published MD5, if there is one."""
    with urllib.request.urlopen(OFFICIAL.format(name), timeout=timeout) as response:
        content = response.read()
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != MD5.get(name, digest):
        raise DataError(f"the official archive of {name} does not have its published checksum; try again later")
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise DataError(f"the server's response for {name} is no zip archive; try again later")
    _write(target, content)


def _recbole(name: str, target: Path, timeout: float) -> None:
    """Pack the data files of recbole's wheel as an archive."""
    from_wheel(RECBOLE, RECBOLE_FOLDER, RECBOLE_SHA256, target)


def from_wheel(requirement: str, inside: str, sha256: Mapping[str, str], target: Path) -> None:
    """Extract members of a PyPI package's wheel, verify their SHA-256, and pack them as an archive.

    Args:
      requirement: pip requirement with a version.
      inside: folder of the members in the wheel.
      sha256: checksums by member name, relative to the folder.
      target: path of the archive to write.

    Raises:
      DataError: pip cannot download the wheel, or a member is missing or has another checksum.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--quiet", "--only-binary=:all:", "-d", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise DataError(f"pip could not download {requirement} ({lines[-1] if lines else 'no message'})")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                content = {member: wheel.read(inside + member) for member in sha256}
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"the wheel of {requirement} cannot be read ({error})") from error
        for member, expected in sha256.items():
            if hashlib.sha256(content[member]).hexdigest() != expected:
                raise DataError(f"{member} of {requirement} does not have the expected SHA-256")
        packed = Path(folder) / "packed.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in content.items():
                archive.writestr(member, data)
        _write(target, packed.read_bytes())


def _write(target: Path, content: bytes) -> None:
    """Write a file atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # same disk, so that the move is atomic
        part = Path(folder) / target.name
        part.write_bytes(content)
        os.replace(part, target)
