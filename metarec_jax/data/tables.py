"""Tables: what the caller has (dict of arrays, pandas, polars, Arrow, CSV, Parquet) as a Dataset."""

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

LATEST = 10**11  # seconds; what is later must be in another unit
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
    """A dataset from tables in memory: each a dict of arrays, a pandas, polars or Arrow table.

    Two interactions of one user with one item count as one: the later (by timestamp, else by row) stays, and
    `Dataset.report["duplicates"]` tells how many went.

    Args:
      interactions: one row an interaction, with `user_id`, `item_id` and, both optional, `rating` and `timestamp`.
        Without ratings the data are positive-only (plays, purchases): every interaction has the rating 1.0.
      users: optional attributes, one row a user, keyed by `user_id`; every other column becomes a field.
      items: optional attributes, one row an item, keyed by `item_id`. Items nobody rated are in the catalogue
        too.
      columns: names of the caller's own columns, for instance `{"user_id": "customer", "rating": "stars"}`. A column
        that is named here must be there.
      clean: rules of `metarec_jax.data.cleaning`, applied in order before anything else; `Dataset.report` tells how
        many rows each touched, and is kept with a model.
      context: columns of `interactions` that tell what was around each one (device, hour); models read them as they
        read attributes.
      fields: how to encode columns of attributes or context where the default does not suit: keyword arguments of
        `Field.fit` by column, for instance `{"price": {"transform": "log"}, "poster": {"kind": "multimodal"},
        "plot": {"kind": "text"}, "seller": {"buckets": 10_000}}`.
      title: the column of `items` to show to people; it is not a field.
      name: what to call the dataset in reports.

    Raises:
      DataError: a column is missing; the table is empty; an id is missing, a float, or beyond 64 bits; a
        rating is missing, NaN, infinite or no number; an attribute table has an id twice or an infinite
        value.
      ValueError: `fields` asks what `Field.fit` does not know.
    """
    names = {c: c for c in COLUMNS} | dict(columns or {})
    if extra := set(names) - set(COLUMNS):
        raise DataError(f"columns: unknown key {sorted(extra)[0]!r}; the keys are {', '.join(COLUMNS)}")
    table = to_polars(interactions, "interactions")
    if not table.height:
        raise DataError("interactions: the table is empty; at least one interaction is needed")
    for column in columns or {}:
        _column(table, names[column], "interactions")
    report = {"rows": table.height}
    if clean:
        table, touched = apply_rules(_canonical(table, names), clean)
        names, report = {c: c for c in COLUMNS}, report | touched
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
    user_vocabulary = _vocabulary(user_ids, user_table, names["user_id"], "users")
    item_vocabulary = _vocabulary(item_ids, item_table, names["item_id"], "items")
    user_fields, user_features, _ = _attributes(user_table, names["user_id"], user_vocabulary, None, fields)
    item_fields, item_features, titles = _attributes(item_table, names["item_id"], item_vocabulary, title, fields)
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
    """A CSV (also .tsv), JSON-lines (.jsonl, .ndjson) or Parquet file as a polars table; a damaged file raises
    `DataError`."""
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
    """Raise `DataError` when the last row has neither a line break nor all its columns."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        last = file.read().rsplit(b"\n", 1)[-1].decode(errors="replace")
    if last and last.count('"') % 2 == 0 and len(next(csv.reader([last], delimiter=separator))) < width:
        raise DataError(f"{path}: the last row is cut short ({last[:60]!r}); get the file again")


def to_polars(table: Any, what: str) -> "pl.DataFrame":
    """A dict of arrays, a pandas, polars or Arrow table as polars."""
    import polars as pl

    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    if hasattr(table, "columns") and hasattr(table, "iloc"):  # pandas; without a hard need of pyarrow
        table = {str(c): table[c].to_numpy() for c in table.columns}
    if isinstance(table, Mapping):
        table = {c: _series(v, f"{what}: column {c!r}") for c, v in table.items()}
    try:
        return pl.DataFrame(table)  # Arrow tables and everything with the Arrow C stream
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what}: not a table of equally long columns of one type each ({error})") from error


def ids(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """The column of ids, checked."""
    import polars as pl

    values = _column(table, column, what)
    if values.null_count():
        row = int(values.is_null().arg_max() or 0)
        raise DataError(f"{what}: column {column!r} has no id in row {row}; drop such rows first")
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if not (values.dtype.is_integer() or values.dtype.is_float() or values.dtype == pl.String):
        raise DataError(f"{what}: column {column!r} holds {values.dtype}; ids must be integers or strings")
    wide = values.dtype in (pl.Int128, pl.UInt128)  # which numpy does not have
    return as_ids(values.to_list() if wide else values.to_numpy(), f"{what}: column {column!r}")


def numbers(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """The column as float32, checked: no null, NaN, infinite or larger value, and no text."""
    return _finite(_column(table, column, what), np.float32, f"{what}: column {column!r}")


def seconds(table: "pl.DataFrame", column: str, what: str) -> np.ndarray:
    """The column as int64 seconds, checked; dates and times count from 1970."""
    import polars as pl

    values = _column(table, column, what)
    if values.dtype in (pl.Date, pl.Datetime):
        values = values.dt.epoch("s")
    finite = _finite(values, np.float64, f"{what}: column {column!r}")
    if (late := np.abs(finite) >= LATEST).any():
        row = int(np.argmax(late))
        raise DataError(
            f"{what}: column {column!r} is {values[row]} in row {row}: in seconds that is over 3,000 years; if "
            "it is in milliseconds, divide it, or give clean=[mr.data.cleaning.milliseconds_to_seconds()]"
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
            "drop or mend them first"
        )
    return array


def _series(values: Any, where: str) -> "pl.Series":
    """One column of a dict as polars; of a column of mixed types the first row that does not fit is named."""
    import polars as pl

    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        values = values.astype("datetime64[us]")  # polars knows no datetime64[s]
    if isinstance(values, list | tuple) or (isinstance(values, np.ndarray) and values.dtype.kind == "O"):
        values = [None if is_missing(v) else v for v in values]
    try:
        return pl.Series(values=values)
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        kinds = [type(v) for v in values]
        if set(kinds) <= {int, float, type(None)} and float in kinds:  # [4, 3.5, None]
            return pl.Series(values=np.array(values, float))
        numbers = ((r, v) for r, v in enumerate(values) if type(v) is int)
        if wide := next(((r, v) for r, v in numbers if not -(2**63) <= v < 2**63), None):
            raise DataError(f"{where} holds {wide[1]} in row {wide[0]}, beyond 64 bits") from error
        first = next((k for k in kinds if k is not type(None)), None)
        row = next((r for r, k in enumerate(kinds) if k not in (first, type(None))), None)
        if row is None or first is None:
            raise DataError(f"{where} cannot be read ({error})") from error
        raise DataError(
            f"{where} mixes {first.__name__} with {kinds[row].__name__} (row {row}: {values[row]!r}); "
            "convert it to one type first"
        ) from error


def _column(table: "pl.DataFrame", column: str, what: str) -> "pl.Series":
    if column not in table.columns:
        raise DataError(
            f"{what}: column {column!r} is missing (there are: {', '.join(table.columns)}); "
            f"name yours: mr.data.from_tables(..., columns={{{column!r}: 'your name'}})"
        )
    return table[column]


def _vocabulary(raw: np.ndarray, table: "pl.DataFrame | None", key: str, what: str) -> Vocabulary:
    if table is None:
        return Vocabulary.of(raw, key)
    listed = ids(table, key, what)
    if listed.dtype.kind != raw.dtype.kind:
        raise DataError(
            f"{what}: column {key!r} is of another type than the interactions'; make both integers or strings"
        )
    unique, count = np.unique(listed, return_counts=True)
    if (count > 1).any():
        raise DataError(f"{what}: {key} {unique[count > 1][0]} stands in more than one row; keep one row each")
    return Vocabulary.of(np.concatenate([raw, listed]), key)


def _attributes(
    table: "pl.DataFrame | None", key: str, vocabulary: Vocabulary, title: str | None, options: Options
) -> tuple[tuple[Field, ...], dict[str, np.ndarray], np.ndarray | None]:
    """Fields, their features `[rows, ...]` and the titles of an attribute table."""
    if table is None:
        return (), {}, None
    rows = vocabulary.encode(ids(table, key, key))
    values = {c: _values(table[c]) for c in table.columns if c not in (key, title)}
    fields = tuple(Field.fit(c, v, **(options or {}).get(c, {})) for c, v in values.items())
    titles = None
    if title in table.columns:
        titles = np.full(len(vocabulary), "", object)
        titles[rows] = ["" if t is None else str(t) for t in table[title].to_list()]
    return fields, encode_table(fields, values, rows, len(vocabulary)), titles


def _contexts(
    table: "pl.DataFrame", columns: Sequence[str], taken: set[str], keep: np.ndarray, options: Options
) -> tuple[tuple[Field, ...], dict[str, np.ndarray]]:
    """Fields of these columns of the interactions and their features, of the rows that are kept."""
    if isinstance(columns, str) or len(set(columns)) < len(columns) or taken & set(columns):
        others = ", ".join(sorted(taken))
        raise DataError(f"context: give a list of other columns than {others}, each once; got {columns!r}")
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
        if len(lengths) == 1 and lengths[0]:  # vectors, all there: not by way of objects
            return series.explode().to_numpy().reshape(len(series), -1)
    return as_objects(series.to_list())


def _canonical(table: "pl.DataFrame", names: Mapping[str, str]) -> "pl.DataFrame":
    """The table with `COLUMNS` in the place of the caller's own names."""
    for column in ("user_id", "item_id"):
        _column(table, names[column], "interactions")
    taken = {c for c in COLUMNS if names[c] != c and c in table.columns}
    return table.drop(taken).rename({names[c]: c for c in COLUMNS if names[c] in table.columns})


def _last_of_each_pair(user: np.ndarray, item: np.ndarray, timestamp: np.ndarray) -> np.ndarray:
    """Row numbers, ascending, of the latest interaction of each user with each item."""
    order = np.lexsort((np.arange(len(user)), timestamp, item, user))
    last = np.ones(len(user), bool)
    last[:-1] = (np.diff(user[order]) != 0) | (np.diff(item[order]) != 0)
    return np.sort(order[last])
