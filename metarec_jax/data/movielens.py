"""Readers of the MovieLens layouts (ml-100k, ml-1m, ml-latest*) and of RecBole's atomic files.

All read from a folder or a zip archive.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.tables import from_tables
from metarec_jax.errors import DataError

if TYPE_CHECKING:
    import polars as pl

TITLES = ("title", "movie_title", "name")  # in RecBole's files
YEAR = r"\((\d{4})\)\D*$"  # of a title: "Toy Story (1995)", "The Land Before Time III (1995) (V)"
Members = dict[str, Callable[[], bytes]]  # file name without its folder -> how to read it
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)  # raised on reading a bad archive

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


def members(path: str | Path) -> Members:
    """Return readers of the files in a folder or zip archive, by file name.

    Raises:
      DataError: the archive is damaged or missing.
    """
    path = Path(path)
    if path.is_dir():
        return {f.name: f.read_bytes for f in sorted(path.rglob("*")) if f.is_file()}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
    except DAMAGED as error:
        raise DataError(f"{path}: not a readable folder or zip archive ({error}); download it again") from error
    return {n.rsplit("/", 1)[-1]: _zip_reader(path, n) for n in names}


def read(path: str | Path, name: str | None = None) -> Dataset:
    """Read a dataset from a folder or zip archive in any of the known layouts.

    Raises:
      DataError: the layout is unknown, or a file is damaged, cut short or badly encoded.
    """
    files = members(path)
    name = name or Path(path).stem
    if "u.data" in files:
        return _read_100k(files, name)
    if "ratings.dat" in files:
        return _read_1m(files, name)
    if "ratings.csv" in files:
        return _read_latest(files, name)
    if any(f.endswith(".inter") for f in files):
        return read_recbole(files, name)
    raise DataError(
        f"{path}: no known layout; expected u.data (ml-100k), ratings.dat (ml-1m), ratings.csv (ml-latest) or *.inter"
    )


def read_recbole(files: Members, name: str) -> Dataset:
    """Read RecBole's atomic files `*.inter`, `*.item` and `*.user`.

    They are tab-separated with headers `name:type`; the values of a `_seq` column are separated by spaces.
    """
    file_of = {end: next((f for f in files if f.endswith(end)), None) for end in (".inter", ".item", ".user")}
    inter = _atomic(files, file_of[".inter"] or "*.inter")
    items = _atomic(files, file_of[".item"]) if file_of[".item"] else None
    users = _atomic(files, file_of[".user"]) if file_of[".user"] else None
    if items is not None and {"movie_title", "release_year", "class"} <= set(items.columns):
        items = _recbole_movies(items)
    elif items is not None and (title_columns := [c for c in TITLES if c in items.columns]):
        items = items.rename({title_columns[0]: "title"})
    if users is not None and "zip_code" in users.columns:
        users = users.drop("zip_code")
    return from_tables(inter, users, items, name=name)


def _read_100k(files: Members, name: str) -> Dataset:
    import polars as pl

    inter = _csv(files, "u.data", "\t", ["user_id", "item_id", "rating", "timestamp"])
    users = items = None
    if "u.user" in files:
        users = _csv(files, "u.user", "|", ["user_id", "age", "gender", "occupation", "zip"]).drop("zip")
    if "u.item" in files:
        flags = [f"g{i}" for i in range(len(GENRES_100K))]
        raw = _csv(files, "u.item", "|", ["item_id", "title", "date", "video", "url", *flags], "latin-1")
        genres = [[g for g, on in zip(GENRES_100K, row, strict=True) if on] for row in raw.select(flags).rows()]
        items = pl.DataFrame(
            {
                "item_id": raw["item_id"],
                "title": raw["title"],
                "year": raw["title"].cast(pl.String).str.extract(YEAR).cast(pl.Float64),
                "genres": pl.Series(genres, dtype=pl.List(pl.String)),
            }
        )
    return from_tables(inter, users, items, name=name)


def _read_1m(files: Members, name: str) -> Dataset:
    import polars as pl

    inter = _csv(files, "ratings.dat", "::", ["user_id", "item_id", "rating", "timestamp"])
    users = items = None
    if "users.dat" in files:
        users = _csv(files, "users.dat", "::", ["user_id", "gender", "age", "occupation", "zip"]).drop("zip")
        users = users.with_columns(pl.col("occupation").cast(pl.String))  # a code, not a quantity
    if "movies.dat" in files:
        items = _movies(_csv(files, "movies.dat", "::", ["item_id", "title", "genres"], "latin-1"))
    return from_tables(inter, users, items, name=name)


def _read_latest(files: Members, name: str) -> Dataset:
    inter = _csv(files, "ratings.csv", ",", None)
    items = None
    if "movies.csv" in files:
        items = _movies(_csv(files, "movies.csv", ",", None, quote='"').rename({"movieId": "item_id"}))
    columns = {"user_id": "userId", "item_id": "movieId"}
    if items is not None:
        items = items.rename({"item_id": "movieId"})
    return from_tables(inter, None, items, columns=columns, name=name)


def _movies(raw: "pl.DataFrame") -> "pl.DataFrame":
    """Select title, year (from a title ending in "(1995)") and genres (joined by "|")."""
    import polars as pl

    return raw.select(
        "item_id",
        "title",
        pl.col("title").str.extract(YEAR).cast(pl.Float64).alias("year"),
        pl.col("genres").str.split("|"),
    )


def _recbole_movies(raw: "pl.DataFrame") -> "pl.DataFrame":
    """Convert RecBole's ml-100k items to the official u.item: the year in the title, genres as a list."""
    import polars as pl

    # RecBole cuts "(1995)", or a final "(V)", off every title, and misspells the film "unknown" as "unkonwn" twice
    name, year = pl.col("movie_title").cast(pl.String), pl.col("release_year").cast(pl.String)
    title = (
        pl.when(year == "unkonwn")
        .then(pl.lit("unknown"))
        .when(year.is_null())
        .then(name)
        .otherwise(pl.format("{} ({})", name, year))
    )
    return raw.select(
        "item_id",
        title.alias("title"),
        title.str.extract(YEAR).cast(pl.Float64).alias("year"),
        pl.col("class").alias("genres"),
    )


def _atomic(files: Members, file: str) -> "pl.DataFrame":
    import polars as pl

    table = _csv(files, file, "\t", None, dtypes=pl.String)
    kinds = {c.partition(":")[0]: c.partition(":")[2] or "token" for c in table.columns}
    table = table.rename({c: c.partition(":")[0] for c in table.columns})
    casts = []
    for column, kind in kinds.items():
        numeric = kind == "float" or (kind == "token" and _all_integers(table[column]))
        if kind.endswith("_seq") and column not in TITLES:
            values = pl.col(column).str.strip_chars().str.split(" ")
            casts.append(values.cast(pl.List(pl.Float64)) if kind == "float_seq" else values)
        if numeric:
            casts.append(pl.col(column).cast(pl.Float64 if kind == "float" else pl.Int64, strict=True))
    try:
        return table.with_columns(casts)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file}: a numeric column holds a value that is not a number ({error}); correct it") from error


def _all_integers(series: "pl.Series") -> bool:
    """Return whether casting to integers keeps these strings distinct: "007" beside "7" would not."""
    return bool(series.is_not_null().all() and series.str.contains(r"^(0|-?[1-9]\d{0,17})$").all())


def _csv(
    files: Members,
    file: str,
    separator: str,
    columns: list[str] | None,
    encoding: str = "utf-8",
    quote: str | None = None,
    dtypes: "pl.DataType | type | None" = None,
) -> "pl.DataFrame":
    """Read one text file as a table.

    Raises:
      DataError: the file is missing, damaged, cut short, badly encoded, or has another number of columns.
    """
    import polars as pl

    if file not in files:
        raise DataError(f"{file}: missing from the dataset, which has: {', '.join(sorted(files)[:10])}")
    try:
        text = files[file]().decode(encoding)
        if text and not text.endswith("\n"):
            raise DataError(f"{file}: cut short, the last row has no line break; download the file again")
        if separator == "::":
            text, separator = text.replace("::", "\t"), "\t"
        table = pl.read_csv(
            io.BytesIO(text.encode()),
            separator=separator,
            has_header=columns is None,
            new_columns=columns,
            quote_char=quote,
            infer_schema_length=None if dtypes is None else 0,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError, *DAMAGED) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise DataError(f"{file}: cannot be read, it may be damaged or cut short ({reason})") from error
    if columns is not None and len(table.columns) != len(columns):
        raise DataError(f"{file}: expected {len(columns)} columns, found {len(table.columns)}; download the file again")
    return table


def _zip_reader(path: Path, member: str) -> Callable[[], bytes]:
    def read_member() -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)  # zipfile checks the member's CRC-32

    return read_member
