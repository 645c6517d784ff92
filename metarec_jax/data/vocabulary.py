"""Vocabulary: maps raw ids (64-bit integers or strings) to dense int32 rows.

Row 0 stands for every unseen id. Unbounded ids can be hashed to a fixed number of rows instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.data.hashing import hashed
from metarec_jax.errors import DataError

UNKNOWN = 0  # row of ids that are not in the vocabulary


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Mapping of sorted unique ids to rows: id `ids[r - 1]` has row `r`.

    With `buckets`, id x has row 1 + hash(x) mod buckets.

    Attributes:
      ids: `[n]` int64 or numpy unicode strings, sorted, unique. Empty for a hashed vocabulary; its dtype still tells
        integers from strings.
      name: what the ids are, for error messages ("item_id").
      buckets: number of rows of a hashed vocabulary besides row 0; None if every id has its own row.

    Example:
      >>> items = mr.data.Vocabulary.of(["tea", "rye", "tea"])
      >>> items.encode(["rye", "tea", "oil"])  # oil is unknown
      array([1, 2, 0], dtype=int32)
      >>> items.decode(np.array([2, 1])).tolist()
      ['tea', 'rye']
    """

    ids: np.ndarray
    name: str = "id"
    buckets: int | None = None

    @classmethod
    def of(cls, values: Any, name: str = "id") -> "Vocabulary":
        """Build the vocabulary of all distinct `values`."""
        return cls(np.unique(as_ids(values, name)), name)

    @classmethod
    def hashed(cls, buckets: int, name: str = "id", *, integers: bool = False) -> "Vocabulary":
        """Build a vocabulary for unbounded ids: nothing is stored, and ids may collide.

        Of n ids, about n - b (1 - exp(-n / b)) share a row with an earlier id, with b buckets: 1 in 10 at n = b / 5.
        Rows are the same in every process and on every machine. No id is unknown, and rows cannot be decoded.

        Args:
          buckets: number of rows besides row 0.
          name: what the ids are, for error messages.
          integers: whether the ids are integers instead of strings.

        Raises:
          ValueError: `buckets` is not between 1 and 2^31 - 2.

        References:
          Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009.
        """
        if isinstance(buckets, bool) or not isinstance(buckets, int) or not 1 <= buckets <= 2**31 - 2:
            raise ValueError(f"buckets must be an integer from 1 to 2^31 - 2, got {buckets!r}")
        return cls(np.zeros(0, np.int64 if integers else np.str_), name, buckets)

    def __len__(self) -> int:
        """Return the number of rows, including the unknown row."""
        return (len(self.ids) if self.buckets is None else self.buckets) + 1

    def encode(self, values: Any) -> np.ndarray:
        """Map raw ids to int32 rows `[n]`; 0 for unknown ids.

        Raises:
          DataError: ids are invalid, or integers for a vocabulary of strings (or the reverse).
        """
        values = as_ids(values, self.name)
        if not len(values) or (self.buckets is None and not len(self.ids)):
            return np.full(len(values), UNKNOWN, np.int32)
        if values.dtype.kind != self.ids.dtype.kind:
            kinds = {"i": "integers", "U": "strings"}
            raise DataError(
                f"{self.name}: this data has {kinds[self.ids.dtype.kind]} as ids but got "
                f"{kinds[values.dtype.kind]} (first: {values[0]!r}); convert them before the call"
            )
        if self.buckets is not None:
            return (1 + hashed(values) % np.uint64(self.buckets)).astype(np.int32)
        position = np.minimum(np.searchsorted(self.ids, values), len(self.ids) - 1)
        return np.where(self.ids[position] == values, position + 1, UNKNOWN).astype(np.int32)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Map rows to raw ids.

        Raises:
          DataError: a row is 0 (unknown), or the vocabulary is hashed.
        """
        rows = np.asarray(rows)
        if self.buckets is not None:
            raise DataError(f"{self.name}: hashed ids cannot be told from their rows; use Vocabulary.of")
        if np.any(rows == UNKNOWN):
            raise DataError(f"{self.name}: row 0 stands for unknown ids and cannot be decoded; mask it first")
        return self.ids[rows - 1]


def as_ids(values: Any, name: str) -> np.ndarray:
    """Validate ids; return them as an int64 or unicode array `[n]`.

    Raises:
      DataError: floats, nulls, mixed types or integers beyond 64 bits; the message names the first such row.
    """
    # numpy would silently convert ["a", 1] to strings and [1, 2.5] to floats: keep objects, to validate each
    array = np.asarray(values, object if isinstance(values, list | tuple) else None)
    if array.ndim != 1:
        raise DataError(f"{name}: expected one id a row, got an array of shape {array.shape}")
    if array.size == 0 and array.dtype.kind in "fO":  # no element determines the type
        return np.zeros(0, np.int64)
    if array.dtype.kind in "fO":
        array = _from_objects(array, name)
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        row = int(np.argmax(array > np.iinfo(np.int64).max))
        raise DataError(f"{name}: row {row} holds {array[row]}, above 2^63 - 1; pass such ids as strings")
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind == "S":
        return _decoded(array, name)
    if array.dtype.kind == "U":
        return array.astype(np.str_)
    raise DataError(f"{name}: ids must be integers or strings, got {array.dtype}; convert the column first")


def _decoded(array: np.ndarray, name: str) -> np.ndarray:
    """Decode bytes as UTF-8."""
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        row, value = next((r, v) for r, v in enumerate(array.tolist()) if not _is_utf8(v))
        raise DataError(f"{name}: row {row} holds {value!r}, which is not UTF-8; decode the column first") from error


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _from_objects(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an object array to int64 or strings; an error names the first invalid row."""
    items: Sequence[Any] = array.tolist()
    strings = isinstance(items[0], str)
    for row, value in enumerate(items):
        if isinstance(value, bool) or not isinstance(value, str if strings else int | np.integer):
            if array.dtype.kind == "f":  # a column is float because of a gap or a fraction: name that row
                gap = np.isnan(array)
                row = int(np.argmax(gap if gap.any() else array % 1 != 0))
            what = "missing" if is_missing(items[row]) else repr(items[row])
            raise DataError(f"{name}: the id in row {row} is {what}; every id must be an integer, or every id a string")
        if not isinstance(value, str) and not -(2**63) <= value < 2**63:
            raise DataError(f"{name}: row {row} holds {value}, beyond 64 bits; pass such ids as strings")
    return np.array(items, dtype=np.str_ if strings else np.int64)


def is_missing(value: Any) -> bool:
    """Return whether a value is None, NaN, or pandas' NA or NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))
