"""Field: encodes one attribute of users, items or contexts as numbers.

An encoding is fitted once and then applied to new values.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_jax.data.hashing import grams
from metarec_jax.data.normalise import knots, transformed
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary, as_ids, is_missing
from metarec_jax.errors import DataError

MAX_VALUES = 32  # codes a row of a multi-valued field
MAX_GRAMS = 64  # codes a row of a text field
KINDS = ("categorical", "multi", "text", "dense", "multimodal")
NUMBERS = ("dense", "multimodal")


@dataclass(frozen=True, eq=False)
class Field:
    """One encoded attribute.

    Attributes:
      name: column name, and the key in the features of a batch.
      kind: "categorical" (one int32 code a row); "multi" (int32 codes `[width]`, 0 for padding); "dense" (float32
        `[width]`, standardised numbers or soft bins; a missing value becomes the mean, or no bin); or "multimodal"
        (float32 `[width]`: a vector, standardised and divided by the square root of its length, followed by a 1; all
        zeros if missing).
      size: number of codes, including the unknown code 0 (1 for numeric fields).
      width: values a row (1 for categorical).
      vocabulary: raw values of the codes (None for numeric fields).
      mean, scale: statistics that standardise the numbers, `[width]`; `[width - 1]` for multimodal.
      transform: transform before standardising, see `metarec_jax.data.normalise.transformed`.
      knots: fitted knots of the transform.
      gram: for text fields, the n-gram length, in letters; 0 for words only.

    Example:
      >>> colour = mr.data.Field.fit("colour", np.array(["red", "blue", "red"]))
      >>> colour.encode(np.array(["blue", "red", "green"]))  # green is unknown
      array([1, 2, 0], dtype=int32)
      >>> price = mr.data.Field.fit("price", np.array([1.0, 3.0]))  # mean 2, standard deviation 1
      >>> price.encode(np.array([4.0, np.nan])).tolist()
      [[2.0], [0.0]]
    """

    name: str
    kind: str
    size: int
    width: int
    vocabulary: Vocabulary | None = None
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None
    transform: str | None = None
    knots: np.ndarray | None = None
    gram: int | None = None

    @classmethod
    def fit(
        cls,
        name: str,
        values: np.ndarray,
        *,
        kind: str | None = None,
        buckets: int | None = None,
        transform: str | None = None,
        gram: int = 3,
    ) -> "Field":
        """Fit the encoding of a column.

        Args:
          name: column name.
          values: `[n]` raw values, or `[n, width]` numbers.
          kind: one of `KINDS`. By default strings and booleans are categorical, lists of strings or integers
            multi-valued, and numbers and vectors of numbers dense. "multimodal" is for embeddings of an image, sound or
            text that some rows lack: models weigh those present by a learned gate. "text" hashes the words of a text
            and their n-grams to a multi-valued field.
          buckets: hash the values to this number of codes instead of one code for each value (default for texts: 8192).
          transform: "log", "clip" or "quantile", for numbers with heavy tails; "bins" for a learned transform
            (`metarec_jax.data.normalise.transformed`).
          gram: n-gram length of a text, in letters; 0 for whole words only.

        Raises:
          DataError: values are of the wrong kind, of several lengths, or infinite; or no row has a vector.
          ValueError: `kind` or `transform` is unknown, or an option does not apply to the kind.
        """
        if kind not in (None, *KINDS):
            raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        kind = kind or _kind(values, name)
        if transform is not None and kind not in NUMBERS:
            raise ValueError(f"{name}: a transform is for numbers, this field is {kind}")
        if buckets is not None and kind in NUMBERS:
            raise ValueError(f"{name}: buckets are for values that are no numbers; this field is {kind}")
        if kind == "text":
            hashes = Vocabulary.hashed(8192 if buckets is None else buckets, name)
            return cls(name, "multi", len(hashes), MAX_GRAMS, hashes, gram=gram)
        if kind == "categorical":
            texts, missing = _texts(values, name)
            vocabulary = Vocabulary.of(texts[~missing], name) if buckets is None else Vocabulary.hashed(buckets, name)
            return cls(name, kind, len(vocabulary), 1, vocabulary)
        if kind == "multi":
            flat, counts = _flat(values)
            vocabulary = Vocabulary.of(flat, name) if buckets is None else Vocabulary.hashed(buckets, name)
            return cls(name, kind, len(vocabulary), min(int(counts.max(initial=1)), MAX_VALUES), vocabulary)
        numbers = _dense(values, name, None)
        if kind == "multimodal" and np.isnan(numbers).all():
            raise DataError(f"column {name!r}: no row has a vector, so its length is unknown; leave the column out")
        if kind == "multimodal" and transform == "bins":
            raise ValueError(f"{name}: bins are for plain numbers, not for a multimodal vector")
        fitted = knots(numbers, transform)
        numbers = transformed(numbers, transform, fitted)
        if transform == "bins":  # bins are already shares in [0, 1]
            zero = np.zeros(numbers.shape[1])
            return cls(name, kind, 1, numbers.shape[1], None, zero, zero + 1, transform, fitted)
        count = np.maximum(np.isfinite(numbers).sum(0), 1)
        mean = np.nansum(numbers, 0) / count
        scale = np.sqrt(np.nansum((numbers - mean) ** 2, 0) / count)
        varies = scale > 1e-7 * np.abs(mean)  # rounding gives a constant column a tiny deviation
        width = numbers.shape[1] + (kind == "multimodal")
        return cls(name, kind, 1, width, None, mean, np.where(varies, scale, 1.0), transform, fitted)

    def encode(self, values: Any) -> np.ndarray:
        """Encode raw values.

        An unseen value gets code 0. A missing dense value becomes the mean (0 after standardising), a missing
        multimodal vector zeros.

        Args:
          values: `[n]` raw values.

        Returns:
          Codes `[n]` (categorical) or `[n, width]` (multi), or float32 `[n, width]` (numeric).

        Raises:
          DataError: a value is infinite or of the wrong kind.
        """
        values = np.asarray(values) if not isinstance(values, list) else as_objects(values)
        if self.kind in NUMBERS:
            assert self.mean is not None
            assert self.scale is not None
            raw = len(self.mean) if self.transform != "bins" or self.knots is None else self.knots.shape[1]
            dense = _dense(values, self.name, raw)
            present = ~np.isnan(dense).all(1, keepdims=True)
            dense = np.nan_to_num((transformed(dense, self.transform, self.knots) - self.mean) / self.scale, nan=0.0)
            if self.kind == "multimodal":
                dense = np.concatenate([dense / len(self.mean) ** 0.5, present], 1)
            return dense.astype(np.float32)
        assert self.vocabulary is not None
        if self.kind == "categorical":
            texts, missing = _texts(values, self.name)
            return np.where(missing, UNKNOWN, self.vocabulary.encode(texts)).astype(np.int32)
        if self.gram is not None:
            values = as_objects([None if is_missing(v) else grams(self._text(v), self.gram) for v in values])
        flat, counts = _flat(values)
        known, row = self.vocabulary.encode(flat), np.repeat(np.arange(len(counts)), counts)
        known, row = known[known != UNKNOWN], row[known != UNKNOWN]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        codes = np.zeros((len(values), self.width), np.int32)
        kept = place < self.width
        codes[row[kept], place[kept]] = known[kept]
        return codes

    def unseen(self, value: Any) -> list[str]:
        """Return the categories of one raw value that have no code; none for numbers, texts and hashed fields.

        Raises:
          DataError: the value is of the wrong kind.
        """
        self.encode([value])
        if self.vocabulary is None or self.vocabulary.buckets is not None or is_missing(value):
            return []
        categories = _listed(value) if self.kind == "multi" else [value]
        return [str(v) for v in categories if self.vocabulary.encode(np.array([str(v)]))[0] == UNKNOWN]

    def unknown(self) -> np.ndarray:
        """Return the encoded row of an entity without known attributes."""
        return np.zeros(
            () if self.kind == "categorical" else self.width, np.float32 if self.kind in NUMBERS else np.int32
        )

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise DataError(f"column {self.name!r} holds {value!r}, which is no text; convert it to a string")
        return value


def encode_table(
    fields: tuple[Field, ...], columns: dict[str, np.ndarray], rows: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """Encode an attribute table as feature arrays `[size, ...]`.

    Args:
      fields: the encoders.
      columns: raw values `[n]` by field name.
      rows: `[n]` rows of the values; all other rows are unknown.
      size: number of rows.
    """
    features = {}
    for field in fields:
        table = np.repeat(field.unknown()[None], size, axis=0)
        table[rows] = field.encode(columns[field.name])
        features[field.name] = table
    return features


def as_objects(values: list[Any]) -> np.ndarray:
    """Convert a list to a one-dimensional object array, whatever its elements."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _texts(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values as strings `[n]`, and a mask of the missing ones."""
    if values.dtype.kind == "S":
        values = as_ids(values, f"column {name!r}")
    if values.dtype.kind != "O":
        missing = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)
        return values.astype(np.str_), missing
    missing = np.array([is_missing(v) for v in values], bool)
    return np.array(["" if m else str(v) for v, m in zip(values, missing, strict=True)], np.str_), missing


def _flat(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the strings of all rows of a multi-valued field, concatenated, and the number of values a row `[n]`."""
    rows = [_listed(row) for row in values]
    return np.array([str(v) for row in rows for v in row], np.str_), np.array([len(row) for row in rows], int)


def _listed(row: Any) -> list[Any]:
    """Return the values of one row of a multi-valued field; a lone string is one value."""
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
    """Return float64 `[n, width]`; NaN where missing."""
    if values.dtype.kind in "iufb" and values.ndim <= 2:
        dense = values.astype(float).reshape(len(values), -1 if len(values) else width or 1)
        if width is not None and dense.shape[1] != width:
            raise DataError(f"column {name!r}: row 0 has {dense.shape[1]} values where the others have {width}")
    else:
        dense = _dense_objects(values, name, width)
    if (infinite := np.isinf(dense).any(1)).any():
        row = int(infinite.argmax())
        raise DataError(f"column {name!r}: row {row} is infinite; replace it by a number or leave it empty")
    return dense


def _dense_objects(values: np.ndarray, name: str, width: int | None) -> np.ndarray:
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
    return dense
