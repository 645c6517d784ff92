"""Field: how one attribute of users or items becomes numbers, on the data it is fitted to and on new ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary, is_missing
from metarec_jax.errors import DataError

MAX_VALUES = 32  # of a multi-valued field that one row may have


@dataclass(frozen=True, eq=False)
class Field:
    """One encoded attribute.

    Attributes:
      name: column name; also the key in a batch's features.
      kind: "categorical" (one int32 code a row), "multi" (int32 codes `[width]`, 0 = no more values), or
        "dense" (float32 `[width]`, standardised; a missing value becomes the mean).
      size: number of codes, the unknown code 0 included (1 for dense fields).
      width: values a row has (1 for categorical).
      vocabulary: the raw values behind the codes (None for dense fields).
      mean, scale: `[width]` what standardises a dense field.
    """

    name: str
    kind: str
    size: int
    width: int
    vocabulary: Vocabulary | None = None
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None

    @classmethod
    def fit(cls, name: str, values: np.ndarray) -> "Field":
        """Choose a kind from the values: strings and booleans are categorical, lists of strings or integers
        multi-valued, numbers and vectors of numbers dense."""
        kind = _kind(values, name)
        if kind == "categorical":
            vocabulary = Vocabulary.of([str(v) for v in values if not is_missing(v)], name)
            return cls(name, kind, len(vocabulary), 1, vocabulary)
        if kind == "multi":
            vocabulary = Vocabulary.of([str(v) for row in values for v in _listed(row)], name)
            longest = max((len(_listed(row)) for row in values), default=1)
            return cls(name, kind, len(vocabulary), min(max(longest, 1), MAX_VALUES), vocabulary)
        dense = _dense(values, name, None)
        count = np.maximum(np.isfinite(dense).sum(0), 1)
        mean = np.nansum(dense, 0) / count
        scale = np.sqrt(np.nansum((dense - mean) ** 2, 0) / count)
        varies = scale > 1e-7 * np.abs(mean)  # a constant's deviation is rounding, and not always 0
        return cls(name, kind, 1, dense.shape[1], None, mean, np.where(varies, scale, 1.0))

    def encode(self, values: Any) -> np.ndarray:
        """Codes `[n]` (categorical), `[n, width]` (multi) or float32 `[n, width]` (dense) of raw `values`
        `[n]`.

        A value never seen gets code 0; a missing dense value the mean (0 after standardising). An infinite
        dense value, or one that is no number, raises `DataError`.
        """
        values = np.asarray(values) if not isinstance(values, list) else as_objects(values)
        if self.kind == "dense":
            assert self.mean is not None
            assert self.scale is not None
            dense = (_dense(values, self.name, self.width) - self.mean) / self.scale
            return np.nan_to_num(dense, nan=0.0).astype(np.float32)
        assert self.vocabulary is not None
        if self.kind == "categorical":
            missing = np.array([is_missing(v) for v in values], bool)
            codes = self.vocabulary.encode(["" if is_missing(v) else str(v) for v in values])
            return np.where(missing, 0, codes).astype(np.int32)
        codes = np.zeros((len(values), self.width), np.int32)
        for i, row in enumerate(values):
            known = self.vocabulary.encode([str(v) for v in _listed(row)])
            known = known[known != UNKNOWN][: self.width]
            codes[i, : len(known)] = known
        return codes

    def unknown(self) -> np.ndarray:
        """The encoded row of an entity about which nothing is known."""
        return np.zeros(
            () if self.kind == "categorical" else self.width, np.float32 if self.kind == "dense" else np.int32
        )


def encode_table(
    fields: tuple[Field, ...], columns: dict[str, np.ndarray], rows: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """Feature arrays `[size, ...]` with `columns` written at `rows`; every other row is unknown."""
    features = {}
    for field in fields:
        table = np.repeat(field.unknown()[None], size, axis=0)
        table[rows] = field.encode(columns[field.name])
        features[field.name] = table
    return features


def as_objects(values: list[Any]) -> np.ndarray:
    """A list as a one-axis object array, whatever its elements are."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _listed(row: Any) -> list[Any]:
    """The values of one row of a multi-valued field; a lone string is one value."""
    if isinstance(row, str):
        return [row]
    return [] if is_missing(row) else [value for value in row if not is_missing(value)]


def _kind(values: np.ndarray, name: str) -> str:
    if values.dtype.kind in "US" or values.dtype.kind == "b":
        return "categorical"
    if values.dtype.kind in "iuf":
        return "dense"
    first = next((v for v in values if not is_missing(v)), None)
    if first is None or isinstance(first, str | bool | np.bool_):
        return "categorical"
    if isinstance(first, list | tuple | np.ndarray):
        inner = next((v for row in values if not is_missing(row) for v in row), None)
        return "dense" if isinstance(inner, float | np.floating) else "multi"
    if isinstance(first, int | float | np.number):
        return "dense"
    raise DataError(f"column {name!r} holds {type(first).__name__}; use strings, numbers, or lists of either")


def _dense(values: np.ndarray, name: str, width: int | None) -> np.ndarray:
    """float64 `[n, width]`; NaN where missing."""
    rows = [np.atleast_1d(np.nan if is_missing(v) else np.asarray(v)) for v in values]
    if width is None:
        width = max((len(row) for row, v in zip(rows, values, strict=True) if not is_missing(v)), default=1)
    dense = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if is_missing(values[i]):
            continue
        if len(row) != width:
            raise DataError(f"column {name!r}: row {i} has {len(row)} values where the others have {width}")
        try:
            dense[i] = row
        except (TypeError, ValueError) as error:
            raise DataError(f"column {name!r}: row {i} holds {values[i]!r}, which is no number") from error
        if np.isinf(dense[i]).any():
            raise DataError(f"column {name!r}: row {i} is infinite; replace it by a number or leave it empty")
    return dense
