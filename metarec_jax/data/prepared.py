"""Prepared: per-user histories on disk, read shard by shard or as one memory-mapped dataset."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from metarec_jax._files import write_whole
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.hashing import hashed
from metarec_jax.data.tables import Options, attributes, to_polars, vocabulary
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary, as_ids
from metarec_jax.errors import DataError

VERSION = 1
MANIFEST, ITEMS, WHOLE = "manifest.json", "items.npy", "whole"
ARRAYS = ("users", "starts", "item", "rating", "timestamp")  # of a shard
JOINED = ("users", "user", "item", "rating", "timestamp")  # of all shards together


@dataclass(frozen=True, eq=False)
class Prepared:
    """Per-user histories on disk, as written by `prepare`.

    Attributes:
      path: the folder.
      report: counts of `rows`, `duplicates`, rows `cut` from long histories, `users` and `items`.
      shards: number of shards.

    Example:
      >>> import polars as pl
      >>> plays = {"user_id": [1, 1], "item_id": [7, 8], "rating": [5, 4], "timestamp": [20, 10]}
      >>> pl.DataFrame(plays).write_csv("a.csv")
      >>> prepared = mr.data.prepare("a.csv", "of-a", shards=1, progress=False)
      >>> prepared.history(1)  # items, ratings and timestamps in order of time
      (array([8, 7]), array([4., 5.], dtype=float32), array([10, 20]))
    """

    path: Path
    report: dict[str, int]
    shards: int

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        """Open the finished output of `prepare` at `path`.

        Raises:
          DataError: there are no prepared histories, they are unfinished, or in another format version.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: no prepared histories, or not finished ({error}); prepare them again") from error
        if manifest["version"] != VERSION:
            raise DataError(f"{path}: format {manifest['version']} found, expected {VERSION}; prepare it again")
        return cls(path, manifest["report"], manifest["shards"])

    @cached_property
    def items(self) -> Vocabulary:
        """Vocabulary of the items of all shards."""
        return Vocabulary(np.load(self.path / ITEMS), "item_id")

    def shard(self, number: int) -> Dataset:
        """Return one shard as a memory-mapped dataset; each user's interactions are in order of time."""
        users, starts, item, rating, timestamp = self._arrays(number)
        return Dataset(
            name=f"{self.path.name}, shard {number}",
            user=np.repeat(np.arange(1, len(users) + 1, dtype=np.int32), np.diff(starts)),
            item=item,
            rating=rating,
            timestamp=timestamp,
            users=Vocabulary(users, "user_id"),
            items=self.items,
        )

    def dataset(self, users: Any = None, items: Any = None, *, title: str = "title", fields: Options = None) -> Dataset:
        """Return all shards as one memory-mapped dataset; interactions are in order of user and time.

        The first call writes the joined columns to the folder (20 bytes an interaction), which needs the memory of one
        column. Of the interactions, only what is read is in memory.

        Args:
          users, items: optional attribute tables, as in `from_tables`. One that names new users or items makes a copy
            of that column in memory.
          title, fields: as in `from_tables`.

        Raises:
          DataError: an attribute table is invalid; see `from_tables`.

        Example:
          >>> import polars as pl
          >>> pl.DataFrame({"user_id": [2, 1], "item_id": ["tea", "rye"]}).write_csv("sales.csv")
          >>> prepared = mr.data.prepare("sales.csv", "of-sales", shards=2, progress=False)
          >>> prepared.dataset(items={"item_id": ["rye", "oil"], "kind": ["food", "food"]})
          Dataset(of-sales: 2 interactions, 2 users, 3 items)
        """
        if not (self.path / WHOLE).exists():
            self._join()
        columns: dict[str, Any] = {
            n: np.asarray(np.load(self.path / WHOLE / f"{n}.npy", mmap_mode="r")) for n in JOINED
        }
        tables = {"user": users, "item": items}
        read = {n: None if table is None else to_polars(table, f"{n}s") for n, table in tables.items()}
        rows, encoded = {}, {}
        for name, known in (("user", columns.pop("users")), ("item", self.items.ids)):
            key, table = f"{name}_id", read[name]
            rows[name] = vocabulary(known, table, key, f"{name}s")
            encoded[name] = attributes(table, key, rows[name], title if name == "item" else None, fields)
            if len(rows[name].ids) > len(known):  # new ids move the rows of others
                columns[name] = rows[name].encode(known)[columns[name] - 1]
        names = {f.name for chosen, _, _ in encoded.values() for f in chosen}
        if unknown := set(fields or ()) - names:
            raise DataError(f"fields: there is no column {sorted(unknown)[0]!r}; there are {', '.join(sorted(names))}")
        return Dataset(
            name=self.path.name,
            **columns,
            users=rows["user"],
            items=rows["item"],
            user_fields=encoded["user"][0],
            user_features=encoded["user"][1],
            item_fields=encoded["item"][0],
            item_features=encoded["item"][1],
            titles=encoded["item"][2],
            report=self.report,
        )

    def _join(self) -> None:
        """Write the columns of all shards to one folder, sorted by user and time."""
        need = 20 * (self.report["rows"] - self.report["duplicates"] - self.report["cut"])
        if (free := shutil.disk_usage(self.path).free) < need:
            raise DataError(f"{self.path}: the joined columns take {need:,} bytes, {free:,} are free; make space there")
        shards = [dict(zip(ARRAYS, self._arrays(n), strict=True)) for n in range(self.shards)]
        users = np.concatenate([s["users"] for s in shards])
        counts = np.concatenate([np.diff(s["starts"]) for s in shards])
        order = np.argsort(users, kind="stable")
        begin = np.empty(len(users), np.int64)
        begin[order] = np.cumsum(counts[order]) - counts[order]

        def joined(name: str) -> np.ndarray:
            column, first = np.empty(counts.sum(), shards[0][name].dtype), 0
            for shard in shards:
                here = slice(first, first := first + len(shard["users"]))
                shift = np.repeat(begin[here] - shard["starts"][:-1], counts[here])
                column[shift + np.arange(len(shift))] = shard[name]
            return column

        def rows() -> np.ndarray:
            return np.repeat(np.arange(1, len(users) + 1, dtype=np.int32), counts[order])

        columns = {"users": lambda: users[order], "user": rows}
        columns |= {name: partial(joined, name) for name in JOINED[2:]}
        with tempfile.TemporaryDirectory(prefix=f".{WHOLE}-", dir=self.path) as work:
            write_folder(Path(work) / WHOLE, columns)
            try:
                os.replace(Path(work) / WHOLE, self.path / WHOLE)
            except OSError:
                if not (self.path / WHOLE).exists():  # else another process was faster
                    raise

    def history(self, user: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a user's raw item ids, ratings and timestamps in order of time; empty for an unknown user."""
        raw = as_ids([user], "user_id")
        users, starts, item, rating, timestamp = self._arrays(int(shard_of(raw, self.shards)[0]))
        row = int(Vocabulary(users, "user_id").encode(raw)[0])
        span = slice(0, 0) if row == UNKNOWN else slice(starts[row - 1], starts[row])
        return self.items.ids[item[span] - 1], np.array(rating[span]), np.array(timestamp[span])

    def _arrays(self, number: int) -> list[np.ndarray]:
        folder = self.path / shard_name(number)
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]


def shard_of(users: np.ndarray, shards: int) -> np.ndarray:
    """Return the shard of each raw user id."""
    return (hashed(users) % np.uint64(shards)).astype(np.int64)


def shard_name(number: int) -> str:
    """Return the name of a shard's folder."""
    return f"shard-{number:05}"


def write_folder(folder: Path, arrays: Mapping[str, Any], others: Mapping[str, bytes] | None = None) -> None:
    """Write arrays and other files to a folder that appears under its name only when complete.

    An array may be a function that makes it, so that one is in memory at a time.
    """
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name, array in arrays.items():
        write_whole(unfinished / f"{name}.npy", array() if callable(array) else array)
    for name, content in (others or {}).items():
        write_whole(unfinished / name, content)
    os.replace(unfinished, folder)
