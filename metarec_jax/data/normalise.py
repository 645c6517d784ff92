"""Normalising: ratings from one scale to another, and numbers whose few large values would drown the rest."""

from typing import TYPE_CHECKING

import numpy as np

from metarec_jax.data.cleaning import Rule
from metarec_jax.errors import DataError

if TYPE_CHECKING:
    import polars as pl

SCALES = {"stars": (1.0, 5.0), "ten": (0.0, 10.0), "percent": (0.0, 100.0), "unit": (0.0, 1.0), "thumbs": (-1.0, 1.0)}
TRANSFORMS = ("log", "clip", "quantile", "bins")
BINS = 8
Scale = str | tuple[float, float]


def rescale(source: Scale, target: Scale = "stars") -> Rule:
    """The cleaning rule that maps ratings from one scale to another, lowest to lowest and highest to highest.

        r' = c + (r - a) (d - c) / (b - a),  [a, b] the source, [c, d] the target

    Args:
      source, target: (lowest, highest), or a name in `SCALES`; `(5, 1)` is a scale on which 1 is best.

    Raises:
      ValueError: an unknown name, or a scale of one number.
      DataError: when applied, a rating lies outside the source (drop it first with `cleaning.rating_between`).
    """
    import polars as pl

    (a, b), (c, d) = _scale(source), _scale(target)

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        rating = table["rating"].cast(pl.Float64)
        outside = ~rating.is_between(min(a, b), max(a, b)).fill_null(True)
        if outside.any():
            row = int(outside.arg_max() or 0)
            raise DataError(
                f"clean: rating {rating[row]} is outside {a:g} to {b:g} ({outside.sum()} such rows); drop such rows "
                "first with rating_between"
            )
        mapped = c + (rating - a) * ((d - c) / (b - a))
        return table.with_columns(mapped.alias("rating")), int((mapped != rating).sum())

    return Rule("rescale", apply, ("rating",))


def centre_users(middle: float, weight: float = 1.0) -> Rule:
    """The cleaning rule that takes from each rating the mean of the same user's earlier ones, shrunk to `middle`.

        r'_t = r_t - (w m + sum_{s<t} r_s) / (w + t),  t = 0, 1, ... by time, else by row

    Nothing later than a rating changes it. Where queries are not later than their support (`ColdUsers` draws them at
    random), a support rating's mean holds earlier queries: centre only for protocols in time.

    Args:
      middle: m, what a user's first rating is measured from.
      weight: w, the ratings that it is worth.
    """
    import polars as pl

    if not weight > 0:
        raise ValueError(f"weight must be above 0, got {weight}")

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        rows = table.with_row_index("_row")
        rows = rows.sort([c for c in ("timestamp", "_row") if c in rows.columns])
        rating = pl.col("rating").cast(pl.Float64)
        before = rating.cum_sum().over("user_id") - rating
        mean = (weight * middle + before) / (weight + pl.int_range(pl.len()).over("user_id"))
        return rows.with_columns(rating - mean).sort("_row").drop("_row"), table.height

    return Rule("centre users", apply, ("rating",))


def knots(values: np.ndarray, transform: str | None) -> np.ndarray | None:
    """What a transform remembers of the values `[n, width]` it is fitted to, `[knots, width]`; NaN is no value."""
    if transform is not None and transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if transform in (None, "log"):
        return None
    at = {"clip": np.array([0.01, 0.99]), "quantile": np.linspace(0, 1, 101), "bins": np.linspace(0, 1, BINS + 1)}
    known = [column[~np.isnan(column)] for column in values.T]
    return np.stack([np.quantile(k, at[transform]) if len(k) else np.zeros(len(at[transform])) for k in known], -1)


def transformed(values: np.ndarray, transform: str | None, fitted: np.ndarray | None) -> np.ndarray:
    """Values `[n, width]` with lighter tails, of "bins" `[n, width * knots]`; NaN stays NaN.

    "log": sign(x) log(1 + |x|). "clip": to the 1st and 99th percentile. "quantile": the share of the fitted values that
    lie below, by linear interpolation between percentiles (of equal ones the middle). "bins": soft binning, how far a
    value belongs to each of nine quantiles, of which the two next to it share it: a linear layer on top is any
    piecewise linear function of the number, clipped at both ends, and is learned by the meta-gradient with all else.

    References:
      Gorishniy et al., On Embeddings for Numerical Features in Tabular Deep Learning, NeurIPS 2022 (their piecewise
      linear encoding adds up the hat functions used here).
    """
    if transform == "log":
        return np.sign(values) * np.log1p(np.abs(values))
    if fitted is None:
        return values
    if transform == "clip":
        return np.clip(values, fitted[0], fitted[1])
    columns = zip(values.T, fitted.T, strict=True)
    if transform == "bins":
        return np.concatenate([_hats(column, at) for column, at in columns], -1)
    return np.stack([_rank(column, at) for column, at in columns], -1)


def _hats(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`[n, knots]` the hat functions of the distinct knots; of equal knots all but the first have none."""
    distinct, place = np.unique(at, return_index=True)
    found = np.zeros((len(values), len(at)))
    for k, one in zip(place, np.eye(len(distinct)), strict=True):
        found[:, k] = np.interp(values, distinct, one)
    return np.where(np.isnan(values)[:, None], np.nan, found)


def _rank(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    distinct, place, count = np.unique(at, return_inverse=True, return_counts=True)
    return np.interp(values, distinct, np.bincount(place, np.linspace(0, 1, len(at))) / count)


def _scale(scale: Scale) -> tuple[float, float]:
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale!r}; use (lowest, highest) or one of {', '.join(SCALES)}")
        return SCALES[scale]
    low, high = map(float, scale)
    if low == high or not np.isfinite([low, high]).all():
        raise ValueError(f"a scale needs two different finite numbers, got {scale}")
    return low, high
