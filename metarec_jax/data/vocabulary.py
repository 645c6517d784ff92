"""Vocabulary: raw ids (64-bit integers or strings) to dense int32 rows.

Row 0 is kept for every id never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.errors import DataError

UNKNOWN = 0  # the row of an id that the vocabulary does not have


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Sorted unique ids; id `ids[r - 1]` has row `r`.

    Attributes:
      ids: `[n]` int64 or numpy unicode strings, sorted, unique.
      name: what the ids are, for messages ("item_id").
    """

    ids: np.ndarray
    name: str = "id"

    @classmethod
    def of(cls, values: Any, name: str = "id") -> "Vocabulary":
        """The vocabulary of all distinct `values`."""
        return cls(np.unique(as_ids(values, name)), name)

    def __len__(self) -> int:
        """Number of rows, the unknown row included."""
        return len(self.ids) + 1

    def encode(self, values: Any) -> np.ndarray:
        """Rows `[n]` int32 of raw ids; 0 where an id is unknown. Ids of another type raise `DataError`."""
        values = as_ids(values, self.name)
        if not len(values) or not len(self.ids):
            return np.full(len(values), UNKNOWN, np.int32)
        if values.dtype.kind != self.ids.dtype.kind:
            kinds = {"i": "integers", "U": "strings"}
            raise DataError(
                f"{self.name}: this data has {kinds[self.ids.dtype.kind]} as ids but got "
                f"{kinds[values.dtype.kind]} (first: {values[0]!r}); convert them before the call"
            )
        position = np.minimum(np.searchsorted(self.ids, values), len(self.ids) - 1)
        return np.where(self.ids[position] == values, position + 1, UNKNOWN).astype(np.int32)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Raw ids of `rows`, none of which may be 0 (the unknown row stands for no id)."""
        rows = np.asarray(rows)
        if np.any(rows == UNKNOWN):
            raise DataError(f"{self.name}: row 0 stands for unknown and has no id")
        return self.ids[rows - 1]


def as_ids(values: Any, name: str) -> np.ndarray:
    """`values` as an int64 or unicode array `[n]`.

    Floats, nulls, mixed types and integers of 2^63 or more raise `DataError`, which names the first such row.
    """
    # of the list ["a", 1] numpy would make strings, of [1, 2.5] floats: as objects they are seen one by one
    array = np.asarray(values, object if isinstance(values, list | tuple) else None)
    if array.ndim != 1:
        raise DataError(f"{name}: expected one id a row, got an array of shape {array.shape}")
    if array.size == 0 and array.dtype.kind in "fO":  # no element tells the type
        return np.zeros(0, np.int64)
    if array.dtype.kind in "fO":
        array = _from_objects(array, name)
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        row = int(np.argmax(array > np.iinfo(np.int64).max))
        raise DataError(f"{name}: row {row} holds {array[row]}, above 2^63 - 1; pass such ids as strings")
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind in "US":
        return array.astype(np.str_)
    raise DataError(f"{name}: ids must be integers or strings, got {array.dtype}; convert the column first")


def _from_objects(array: np.ndarray, name: str) -> np.ndarray:
    """An object array as int64 or str; the first row that does not fit is named."""
    items: Sequence[Any] = array.tolist()
    strings = isinstance(items[0], str)
    for row, value in enumerate(items):
        if isinstance(value, bool) or not isinstance(value, str if strings else int | np.integer):
            if array.dtype.kind == "f":  # what made the column float is a gap, else a fraction
                gap = np.isnan(array)
                row = int(np.argmax(gap if gap.any() else array % 1 != 0))
            what = "missing" if is_missing(items[row]) else repr(items[row])
            raise DataError(f"{name}: the id in row {row} is {what}; every id must be an integer, or every id a string")
        if not isinstance(value, str) and not -(2**63) <= value < 2**63:
            raise DataError(f"{name}: row {row} holds {value}, beyond 64 bits; pass such ids as strings")
    return np.array(items, dtype=np.str_ if strings else np.int64)


def is_missing(value: Any) -> bool:
    """None, NaN, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))
