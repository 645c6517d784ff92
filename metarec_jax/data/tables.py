"""Tables (dict of arrays, pandas, polars, Arrow, CSV, JSON lines, Parquet) to a Dataset."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_jax.data.cleaning import Rule
from metarec_jax.data.cleaning import clean as apply_rules
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field, as_objects, encode_table
from metarec_jax.data.vocabulary import Vocabulary, as_ids, is_missing
from metarec_jax.errors import DataError

if TYPE_CHECKING:
    import polars as pl

LATEST = 10**11  # seconds; larger timestamps must be in another unit
COLUMNS = ("user_id", "item_id", "rating", "timestamp")
Options = Mapping[str, Mapping[str, Any]] | None


def from_tables(
    interactions: Any,
    users: Any = None,
    items: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    clean: Sequence[Rule] = (),
    context: Sequence[str] = (),
    fields: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "title",
    name: str = "tables",
) -> Dataset:
    """Build a dataset from tables in memory: dicts of arrays, pandas, polars or Arrow tables.

    Of several interactions of one user with one item the latest is kept (by timestamp, then by row);
    `Dataset.report["duplicates"]` counts those dropped.

    Args:
      interactions: one row an interaction, with `user_id`, `item_id` and, both optional, `rating` and `timestamp`.
        Without ratings the data are positive-only (plays, purchases): every rating is 1.0.
      users: optional attributes, one row a user, keyed by `user_id`; every other column becomes a field.
      items: optional attributes, one row an item, keyed by `item_id`. Items without an interaction join the catalogue,
        too.
      columns: names of your own columns, for instance `{"user_id": "customer", "rating": "stars"}`. A column named here
        must exist.
      clean: rules of `metarec_jax.data.cleaning`, applied in order before anything else. `Dataset.report`, which is
        saved with a model, counts the rows that each rule touched.
      context: columns of `interactions` that describe the context of each interaction (device, hour). Models read them
        like attributes.
      fields: non-default encodings of attribute or context columns: keyword arguments of `Field.fit` by column, for
        instance `{"price": {"transform": "log"}, "poster": {"kind": "multimodal"}, "plot": {"kind": "text"}, "seller":
        {"buckets": 10_000}}`.
      title: the column of `items` with display names; it is not a field.
      name: the dataset's name in reports.

    Raises:
      DataError: a column is missing; the table is empty; an id is missing, a float, or beyond 64 bits; a rating is
        missing, NaN, infinite or not a number; an attribute table has a duplicate id or an infinite value.
      ValueError: `fields` has an option that `Field.fit` rejects.

    Example:
      >>> plays = {"customer": ["ann", "ann", "bob"], "item_id": [10, 11, 10], "rating": [5, 2, 4]}
      >>> items = {"item_id": [10, 11, 12], "title": ["Alien", "Heat", "Up"], "genre": ["horror", "crime", "family"]}
      >>> data = mr.data.from_tables(plays, items=items, columns={"user_id": "customer"}, name="films")
      >>> data
      Dataset(films: 3 interactions, 2 users, 3 items)
      >>> data.rating, [field.name for field in data.item_fields]
      (array([5., 2., 4.], dtype=float32), ['genre'])
    """
    table, names, report = _cleaned(interactions, columns or {}, clean)
    user_ids, item_ids = (ids(table, names[c], "interactions") for c in ("user_id", "item_id"))
    if names["rating"] in table.columns:
        rating = numbers(table, names["rating"], "interactions")
    else:
        rating = np.ones(table.height, np.float32)
    if names["timestamp"] in table.columns:
        timestamp = seconds(table, names["timestamp"], "interactions")
    else:
        timestamp = np.zeros(table.height, np.int64)

    user_table = None if users is None else to_polars(users, "users")
    item_table = None if items is None else to_polars(items, "items")
    user_vocabulary = vocabulary(user_ids, user_table, names["user_id"], "users")
    item_vocabulary = vocabulary(item_ids, item_table, names["item_id"], "items")
    user_fields, user_features, _ = attributes(user_table, names["user_id"], user_vocabulary, None, fields)
    item_fields, item_features, titles = attributes(item_table, names["item_id"], item_vocabulary, title, fields)
    user, item = user_vocabulary.encode(user_ids), item_vocabulary.encode(item_ids)
    keep = _last_of_each_pair(user, item, timestamp)
    context_fields, context_features = _contexts(table, context, set(names.values()), keep, fields)
    known = {f.name for f in (*user_fields, *item_fields, *context_fields)}
    if unknown := set(fields or ()) - known:
        raise DataError(f"fields: there is no column {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    return Dataset(
        name=name,
        user=user[keep],
        item=item[keep],
        rating=rating[keep],
        timestamp=timestamp[keep],
        users=user_vocabulary,
        items=item_vocabulary,
        user_fields=user_fields,
        user_features=user_features,
        item_fields=item_fields,
        item_features=item_features,
        context_fields=context_fields,
        context_features=context_features,
        titles=titles,
        report=report | {"duplicates": table.height - len(keep) + report.get("duplicates", 0)},
    )


def read_table(path: str | Path) -> "pl.DataFrame":
    """Read a CSV (also .tsv), JSON-lines (.jsonl, .ndjson) or Parquet file as a polars table.

    Raises:
      DataError: the file is missing, damaged, cut short, or of another format.

    Example:
      >>> import polars as pl
      >>> pl.DataFrame({"user_id": [1, 2], "item_id": ["tea", "rye"]}).write_csv("plays.csv")
      >>> mr.data.read_table("plays.csv").to_dicts()
      [{'user_id': 1, 'item_id': 'tea'}, {'user_id': 2, 'item_id': 'rye'}]
    """
    import polars as pl

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        if path.suffix in (".parquet", ".pq"):
            return pl.read_parquet(path)
        if path.suffix in (".jsonl", ".ndjson"):
            return pl.read_ndjson(path, infer_schema_length=None)
        if path.suffix in (".csv", ".tsv"):
            separator = "\t" if path.suffix == ".tsv" else ","
            table = pl.read_csv(path, separator=separator, infer_schema_length=None)
            _refuse_cut_row(path, separator, table.width)
            return table
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read, it may be damaged or cut short ({error})") from error
    raise DataError(f"{path}: unknown kind of table {path.suffix!r}; use .csv, .tsv, .jsonl or .parquet")


def _refuse_cut_row(path: Path, separator: str, width: int) -> None:
    """Raise `DataError` if the last row lacks both a line break and some of its columns."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        last = file.read().rsplit(b"\n", 1)[-1].decode(errors="replace")
    if last and last.count('"') % 2 == 0 and len(next(csv.reader([last], delimiter=separator))) < width:
        raise DataError(f"{path}: the last row is cut short ({last[:60]!r}); download or write the file again")


def to_polars(table: Any, what: str) -> "pl.DataFrame":
    """Convert a dict of arrays, a pandas, polars or Arrow table to a polars table.

    Args:
      table: the table.
      what: its name in error messages.

    Raises:
      DataError: it is not a table, or a column mixes types.
    """
    import polars as pl

    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    if hasattr(table, "columns") and hasattr(table, "iloc"):  # pandas, converted without pyarrow
        table = {str(c): table[c].to_numpy() for c in table.columns}
    if isinstance(table, Mapping):
        table = {c: _series(v, f"{what}: column {c!r}") for c, v in table.items()}
    try:
        return pl.DataFrame(table)  # also Arrow tables and objects with an Arrow C stream
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what}: not a table of equally long columns of one type each ({error})") from error


def ids(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """Return a column as validated int64 or string ids `[rows]`.

    Raises:
      DataError: the column is missing, or an id is missing, a float or beyond 64 bits.
    """
    import polars as pl

    values = _column(table, column, what)
    if values.null_count():
        row = int(values.is_null().arg_max() or 0)
        raise DataError(f"{what}: column {column!r} has no id in row {row}; drop rows without an id first")
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if not (values.dtype.is_integer() or values.dtype.is_float() or values.dtype == pl.String):
        raise DataError(f"{what}: column {column!r} holds {values.dtype}; ids must be integers or strings")
    wide = values.dtype in (pl.Int128, pl.UInt128)  # numpy has no such types
    return as_ids(values.to_list() if wide else values.to_numpy(), f"{what}: column {column!r}")


def numbers(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """Return a column as finite float32 `[rows]`.

    Raises:
      DataError: the column is missing, or a value is null, NaN, infinite, too large for float32, or text.
    """
    return _finite(_column(table, column, what), np.float32, f"{what}: column {column!r}")


def seconds(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """Return a column as validated int64 seconds `[rows]`; dates and times count from 1970.

    Raises:
      DataError: the column is missing, or a value is not finite or not in seconds.
    """
    import polars as pl

    values = _column(table, column, what)
    if values.dtype in (pl.Date, pl.Datetime):
        values = values.dt.epoch("s")
    finite = _finite(values, np.float64, f"{what}: column {column!r}")
    if (late := np.abs(finite) >= LATEST).any():
        row = int(np.argmax(late))
        raise DataError(
            f"{what}: column {column!r} is {values[row]} in row {row}: expected seconds, but that is over 3,000 years; "
            "if it is in milliseconds, divide by 1000 or pass clean=[mr.data.cleaning.milliseconds_to_seconds()]"
        )
    return finite.astype(np.int64)


def _finite(values: "pl.Series", dtype: type, where: str) -> np.ndarray:
    if not values.dtype.is_numeric() and values.null_count() < len(values):
        raise DataError(f"{where} holds {values.dtype}, not numbers; convert it first")
    with np.errstate(over="ignore"):
        array: np.ndarray = values.cast(float).to_numpy().astype(dtype)
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{where} is {values[row]} in row {row} ({bad.sum()} such rows), not a finite number; "
            "drop or correct them first"
        )
    return array


def _series(values: Any, where: str) -> "pl.Series":
    """Convert one column of a dict to polars; an error names the first row of another type."""
    import polars as pl

    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        values = values.astype("datetime64[us]")  # polars has no datetime64[s]
    if isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.dtype.kind == "O"):
        values = [None if is_missing(v) else v for v in values]
    try:
        return pl.Series(values=values)
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        types = [type(v) for v in values]
        if set(types) <= {int, float, type(None)} and float in types:  # [4, 3.5, None]
            return pl.Series(values=np.array(values, float))
        numbers = ((r, v) for r, v in enumerate(values) if type(v) is int)
        if wide := next(((r, v) for r, v in numbers if not -(2**63) <= v < 2**63), None):
            raise DataError(
                f"{where} holds {wide[1]} in row {wide[0]}, beyond 64 bits; convert it to strings"
            ) from error
        first = next((k for k in types if k is not type(None)), None)
        row = next((r for r, k in enumerate(types) if k not in (first, type(None))), None)
        if row is None or first is None:
            raise DataError(f"{where} cannot be read ({error})") from error
        raise DataError(
            f"{where} mixes {first.__name__} with {types[row].__name__} (row {row}: {values[row]!r}); "
            "convert it to one type first"
        ) from error


def _column(table: "pl.DataFrame", column: str, what: str) -> "pl.Series":
    if column not in table.columns:
        raise DataError(
            f"{what}: column {column!r} is missing (there are: {', '.join(table.columns)}); "
            f"name yours: mr.data.from_tables(..., columns={{{column!r}: 'your name'}})"
        )
    return table[column]


def vocabulary(raw: np.ndarray, table: "pl.DataFrame | None", key: str, what: str) -> Vocabulary:
    """Return the vocabulary of raw ids and of the ids of an attribute table.

    Raises:
      DataError: the table has another type of ids, or an id twice.
    """
    if table is None:
        return Vocabulary.of(raw, key)
    listed = ids(table, key, what)
    if listed.dtype.kind != raw.dtype.kind:
        raise DataError(
            f"{what}: column {key!r} has another type than that of the interactions; make both integers or strings"
        )
    unique, count = np.unique(listed, return_counts=True)
    if (count > 1).any():
        raise DataError(f"{what}: {key} {unique[count > 1][0]} stands in more than one row; keep one row each")
    return Vocabulary.of(np.concatenate([raw, listed]), key)


def attributes(
    table: "pl.DataFrame | None", key: str, known: Vocabulary, title: str | None, options: Options
) -> tuple[tuple[Field, ...], dict[str, np.ndarray], np.ndarray | None]:
    """Return the fields, the features `[rows, ...]` and the titles of an attribute table."""
    if table is None:
        return (), {}, None
    rows = known.encode(ids(table, key, key))
    values = {c: _values(table[c]) for c in table.columns if c not in (key, title)}
    fields = tuple(Field.fit(c, v, **(options or {}).get(c, {})) for c, v in values.items())
    titles = None
    if title in table.columns:
        titles = np.full(len(known), "", object)
        titles[rows] = ["" if t is None else str(t) for t in table[title].to_list()]
    return fields, encode_table(fields, values, rows, len(known)), titles


def _contexts(
    table: "pl.DataFrame", columns: Sequence[str], taken: set[str], keep: np.ndarray, options: Options
) -> tuple[tuple[Field, ...], dict[str, np.ndarray]]:
    """Return the fields of context columns, and their features for the rows in `keep`."""
    if isinstance(columns, str) or len(set(columns)) < len(columns) or taken & set(columns):
        others = ", ".join(sorted(taken))
        raise DataError(f"context: give a list of distinct columns other than {others}; got {columns!r}")
    values = {c: _values(_column(table, c, "interactions")[keep]) for c in columns}
    fields = tuple(Field.fit(c, v, **(options or {}).get(c, {})) for c, v in values.items())
    return fields, {f.name: f.encode(values[f.name]) for f in fields}


def _values(series: "pl.Series") -> np.ndarray:
    import polars as pl

    if series.dtype.is_numeric() and not series.null_count():
        return series.to_numpy()
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    if series.dtype in (pl.List(pl.Float32), pl.List(pl.Float64)):
        lengths = series.list.len().unique()
        if len(lengths) == 1 and lengths[0]:  # equally long vectors without gaps: no detour through objects
            return series.explode().to_numpy().reshape(len(series), -1)
    return as_objects(series.to_list())


def _cleaned(
    interactions: Any, columns: Mapping[str, str], rules: Sequence[Rule]
) -> tuple["pl.DataFrame", dict[str, str], dict[str, int]]:
    """Return the cleaned interactions, the names of their `COLUMNS`, and the counts of the rows that rules touched."""
    names = {c: c for c in COLUMNS} | dict(columns)
    if extra := set(names) - set(COLUMNS):
        raise DataError(f"columns: unknown key {sorted(extra)[0]!r}; the keys are {', '.join(COLUMNS)}")
    table = to_polars(interactions, "interactions")
    if not table.height:
        raise DataError("interactions: the table is empty; at least one interaction is needed")
    for column in columns:
        _column(table, names[column], "interactions")
    report = {"rows": table.height}
    if not rules:
        return table, names, report
    cleaned, touched = apply_rules(_canonical(table, names), rules)
    return cleaned, {c: c for c in COLUMNS}, report | touched


def _canonical(table: "pl.DataFrame", names: Mapping[str, str]) -> "pl.DataFrame":
    """Rename the caller's columns to `COLUMNS`, dropping columns whose names would collide."""
    for column in ("user_id", "item_id"):
        _column(table, names[column], "interactions")
    taken = {c for c in COLUMNS if names[c] != c and c in table.columns}
    return table.drop(taken).rename({names[c]: c for c in COLUMNS if names[c] in table.columns})


def _last_of_each_pair(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Return ascending row numbers of the latest interaction of each user with each item."""
    order = np.lexsort((np.arange(len(user)), timestamp, item, user))
    last = np.ones(len(user), bool)
    last[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    return np.sort(order[last])
