"""Streaming preparation: tables larger than memory to per-user histories on disk, in bounded memory.

The first pass reads the tables in pieces and writes each piece with its rows ordered by shard (a hash of the user). The
second pass gathers each shard from all pieces, sorts it by user and time, and writes memory-mapped arrays. Pieces and
shards are renamed into place when complete, so a killed run can resume and loses at most the piece or shard in
progress.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_jax._files import write_whole
from metarec_jax._progress import counter
from metarec_jax.data.prepared import ITEMS, MANIFEST, VERSION, Prepared, shard_name, shard_of, write_folder
from metarec_jax.data.tables import COLUMNS, ids, numbers, seconds
from metarec_jax.data.vocabulary import Vocabulary
from metarec_jax.errors import DataError

if TYPE_CHECKING:
    import polars as pl

SETTING = "setting.json"
OPTIONAL = ("rating", "timestamp")


def prepare(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    shards: int = 64,
    piece: int = 2_000_000,
    max_history: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Convert tables of interactions of any size to per-user histories on disk.

    Of several ratings of one item by one user the latest is kept, as in `from_tables`. Peak memory is a small multiple
    of the largest of: one piece, one shard, all item ids. More shards need less memory. After a kill, an error or a
    full disk, the same call resumes.

    Args:
      sources: Parquet, CSV (also .tsv) or JSON-lines (.jsonl, .ndjson) files, all with the same columns. Without
        ratings every interaction is a positive, with rating 1.
      out: the output folder.
      columns: names of your own columns, as in `from_tables`.
      shards: number of parts into which users are hashed.
      piece: rows read at a time.
      max_history: number of latest interactions kept for each user (default: all).
      progress: show a progress bar.

    Raises:
      DataError: a file is missing or damaged; an id, rating or time is invalid (with file and row); the disk is full;
        `out` holds something else; or an option is out of range.

    Example:
      >>> import polars as pl
      >>> plays = {"user_id": [1, 1, 2], "item_id": [7, 8, 7], "rating": [5.0, 4.0, 3.0], "timestamp": [20, 10, 30]}
      >>> pl.DataFrame(plays).write_parquet("plays.parquet")
      >>> prepared = mr.data.prepare("plays.parquet", "histories", shards=2, progress=False)
      >>> prepared.report
      {'rows': 3, 'duplicates': 0, 'cut': 0, 'users': 2, 'items': 2}
    """
    files = [Path(s) for s in ([sources] if isinstance(sources, str | Path) else sources)]
    if not files or shards < 1 or piece < 1 or (max_history is not None and max_history < 1):
        raise DataError(
            f"prepare needs at least one file, and shards, piece and max_history of 1 or more; got {len(files)} files, "
            f"shards={shards}, piece={piece}, max_history={max_history}"
        )
    if missing := [f for f in files if not f.is_file()]:
        raise DataError(f"{missing[0]}: no such file")
    out, names = Path(out), {c: c for c in COLUMNS} | dict(columns or {})
    _check_columns(files, names, columns or {})
    marks: list[Any] = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    setting = {"files": marks, "columns": names, "shards": shards, "piece": piece, "max_history": max_history}
    setting["version"] = VERSION
    work = out / "work"
    try:
        if _same_setting(out, setting) and (out / MANIFEST).exists():
            shutil.rmtree(work, ignore_errors=True)
            return Prepared.open(out)
        work.mkdir(parents=True, exist_ok=True)
        write_whole(out / SETTING, json.dumps(setting).encode())
        with counter(progress, "reading rows") as advance:
            pieces = [
                p for f, file in enumerate(files) for p in _partition(file, f, names, shards, piece, work, advance)
            ]
        _merge_items(pieces, out)
        items = Vocabulary(np.load(out / ITEMS), "item_id")
        with counter(progress, "writing shards", shards) as advance:
            for number in range(shards):
                if not (out / shard_name(number)).exists():
                    _gather(number, pieces, items, out, max_history)
                advance(1)
        counts = [json.loads((out / shard_name(n) / "counts.json").read_text()) for n in range(shards)]
        report = {key: sum(c[key] for c in counts) for key in counts[0]} | {"items": len(items) - 1}
        manifest = {"version": VERSION, "shards": shards, "report": report}
        write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(work)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        need = sum(size for _, size, _ in marks)
        raise DataError(
            f"{out}: no space left on the disk; preparing needs about {3 * need:,} bytes there. Make space and call "
            "prepare(...) again: what is written already is kept"
        ) from error
    return Prepared.open(out)


def _partition(
    file: Path, number: int, names: Mapping[str, str], shards: int, rows: int, work: Path, advance: Any
) -> list[Path]:
    """Run the first pass over one file; return one folder for each piece, its rows ordered by shard."""
    folders: list[Path] = []

    def folder_of(begin: int) -> Path:
        return work / f"piece-{number:05}-{begin:012}"

    for begin, height, frame in _pieces(file, names, rows, lambda begin: folder_of(begin).exists()):
        folder = folder_of(begin)
        if frame is not None:
            what = f"{file} (rows counted from row {begin})"
            user, item = (ids(frame, names[k], what) for k in ("user_id", "item_id"))
            rated = names["rating"] in frame.columns
            rating = numbers(frame, names["rating"], what) if rated else np.ones(len(user), np.float32)
            timed = names["timestamp"] in frame.columns
            time = seconds(frame, names["timestamp"], what) if timed else np.zeros(len(user), np.int64)
            shard = shard_of(user, shards)
            order = np.argsort(shard, kind="stable")
            arrays = {"user": user, "item": item, "rating": rating, "time": time}
            content = {name: array[order] for name, array in arrays.items()}
            content["bounds"] = np.searchsorted(shard[order], np.arange(shards + 1))
            content["items"] = np.unique(item)
            write_folder(folder, content)
        folders.append(folder)
        advance(height)
    if not folders:
        raise DataError(f"{file}: the table is empty")
    return folders


def _pieces(
    file: Path, names: Mapping[str, str], rows: int, done: Callable[[int], bool]
) -> Iterator[tuple[int, int, "pl.DataFrame | None"]]:
    """Yield first row, number of rows and wanted columns of each piece; None for the columns of a `done` piece."""
    import polars as pl

    try:
        scan = _scan(file)
        available = scan.collect_schema().names()
        scan = scan.select([n for n in names.values() if n in available])
        if file.suffix == ".parquet":
            total = scan.select(pl.len()).collect().item()
            for begin in range(0, total, rows):
                height = min(rows, total - begin)
                yield begin, height, None if done(begin) else scan.slice(begin, rows).collect()
        else:
            begin = 0
            for frame in scan.collect_batches(chunk_size=rows, maintain_order=True):
                yield begin, frame.height, None if done(begin) else frame
                begin += frame.height
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read, it may be damaged or cut short ({error})") from error


def _scan(file: Path) -> "pl.LazyFrame":
    """Open a table without reading its rows."""
    import polars as pl

    scanners: dict[str, Callable[[Path], pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": pl.scan_csv,
        ".tsv": lambda f: pl.scan_csv(f, separator="\t"),
        ".jsonl": pl.scan_ndjson,
        ".ndjson": pl.scan_ndjson,
    }
    if file.suffix not in scanners:
        raise DataError(f"{file}: unknown kind of table {file.suffix!r}; use {', '.join(scanners)}")
    return scanners[file.suffix](file)


def _check_columns(files: list[Path], names: Mapping[str, str], chosen: Mapping[str, str]) -> None:
    """Raise `DataError` if a file lacks an optional column that another file has, or that the caller has `chosen`."""
    import polars as pl

    try:
        available = [_scan(file).collect_schema().names() for file in files]
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return  # reading the rows says what is wrong
    for name in OPTIONAL:
        has = [names[name] in columns for columns in available]
        if (any(has) or name in chosen) and not all(has):
            why = "`columns` names it" if name in chosen else f"{files[has.index(True)]} has it"
            raise DataError(f"{files[has.index(False)]}: column {names[name]!r} is missing, and {why}")


def _merge_items(pieces: list[Path], out: Path) -> None:
    """Write the sorted item ids of all pieces, the vocabulary of all shards."""
    if (out / ITEMS).exists():
        return
    merged = np.load(pieces[0] / "items.npy")
    for folder in pieces[1:]:
        more = np.load(folder / "items.npy")
        if more.dtype.kind != merged.dtype.kind:
            raise DataError("item ids are integers in one file and strings in another; make them one type")
        merged = np.union1d(merged, more)
    write_whole(out / ITEMS, merged)


def _gather(number: int, pieces: list[Path], items: Vocabulary, out: Path, max_history: int | None) -> None:
    """Run the second pass over one shard: drop duplicates, sort by user and time, cut long histories."""

    def column(name: str) -> np.ndarray:
        parts = []
        for folder in pieces:
            begin, end = np.load(folder / "bounds.npy")[[number, number + 1]]
            parts.append(np.load(folder / f"{name}.npy", mmap_mode="r")[begin:end])
        return np.concatenate(parts)

    user, item, time = column("user"), items.encode(column("item")), column("time")
    users, owner = np.unique(user, return_inverse=True)
    # lexsort is stable: of interactions at the same time the last row wins
    by_pair = np.lexsort((time, item, owner))
    last = np.ones(len(item), bool)
    last[:-1] = (np.diff(owner[by_pair]) != 0) | (np.diff(item[by_pair]) != 0)
    kept = np.sort(by_pair[last])
    kept = kept[np.lexsort((time[kept], owner[kept]))]
    unique = len(kept)
    if max_history is not None:
        ends = np.searchsorted(owner[kept], owner[kept], side="right")
        kept = kept[ends - np.arange(len(kept)) <= max_history]
    starts = np.searchsorted(owner[kept], np.arange(len(users) + 1))
    counts = {
        "rows": len(item),
        "duplicates": len(item) - unique,
        "cut": unique - len(kept),
        "users": len(users),
    }
    content = {"users": users, "starts": starts, "item": item[kept], "rating": column("rating")[kept]}
    content["timestamp"] = time[kept]
    write_folder(out / shard_name(number), content, {"counts.json": json.dumps(counts).encode()})


def _same_setting(out: Path, setting: dict[str, Any]) -> bool:
    """Return whether `out` holds an earlier run of the same call; raise `DataError` if it holds anything else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / SETTING).exists():
        raise DataError(f"{out} holds something else than prepared histories; give an empty folder")
    if json.loads((out / SETTING).read_text()) != setting:
        raise DataError(f"{out} was prepared from other files or with other options; delete it or give another folder")
    return True
