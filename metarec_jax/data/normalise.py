"""Normalisation: rating scales, user centring, and transforms of heavy-tailed numbers."""

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
    """Build the cleaning rule that maps ratings linearly from one scale to another.

        r' = c + (r - a) (d - c) / (b - a),  [a, b] the source, [c, d] the target

    Args:
      source, target: (lowest, highest), or a name in `SCALES`; in `(5, 1)`, 1 is the best rating.

    Raises:
      ValueError: a scale is unknown, or its ends are equal or not finite.
      DataError: when applied, a rating lies outside the source scale (drop it first with `cleaning.rating_between`).

    Example:
      >>> plays = {"user_id": [1, 1], "item_id": [7, 8], "rating": [0.0, 75.0]}
      >>> mr.data.from_tables(plays, clean=[mr.data.rescale("percent", "stars")]).rating  # 1 + 0.75 * 4
      array([1., 4.], dtype=float32)
    """
    import polars as pl

    (a, b), (c, d) = _scale(source), _scale(target)

    def apply(table: "pl.DataFrame") -> tuple["pl.DataFrame", int]:
        rating = table["rating"].cast(pl.Float64)
        outside = ~rating.is_between(min(a, b), max(a, b)).fill_null(True)
        if outside.any():
            row = int(outside.arg_max() or 0)
            raise DataError(
                f"clean: rating {rating[row]} is outside {a:g} to {b:g} ({outside.sum()} such rows); drop these rows "
                "first, with rating_between"
            )
        mapped = c + (rating - a) * ((d - c) / (b - a))
        return table.with_columns(mapped.alias("rating")), int((mapped != rating).sum())

    return Rule("rescale", apply, ("rating",))


def centre_users(middle: float, weight: float = 1.0) -> Rule:
    """Build the cleaning rule that subtracts a user's running mean from each rating.

        r'_t = r_t - (w m + sum_{s<t} r_s) / (w + t),  t = 0, 1, ... by time, then by row

    The mean is over the user's earlier ratings, shrunk to `middle`. The rule is causal: a rating depends on earlier
    ratings only. Where queries may precede their support (`ColdUsers` draws them at random), a centred support rating
    contains information about query ratings: use the rule with time-based protocols only.

    Args:
      middle: m, the prior mean.
      weight: w, the pseudo-count of the prior mean.

    Raises:
      ValueError: `weight` is not above 0.

    Example:
      The running means of the user are 3 (the prior), then (3 + 5) / 2 = 4, then (3 + 5 + 4) / 3 = 4:

      >>> plays = {"user_id": [1, 1, 1], "item_id": [7, 8, 9], "rating": [5, 4, 1], "timestamp": [1, 2, 3]}
      >>> mr.data.from_tables(plays, clean=[mr.data.centre_users(3.0)]).rating
      array([ 2.,  0., -3.], dtype=float32)
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
    """Fit the knots of a transform.

    Args:
      values: `[n, width]` numbers; NaN is missing.
      transform: one of `TRANSFORMS`, or None.

    Returns:
      `[knots, width]`, or None for transforms without knots.

    Raises:
      ValueError: `transform` is unknown.
    """
    if transform is not None and transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if transform in (None, "log"):
        return None
    at = {"clip": np.array([0.01, 0.99]), "quantile": np.linspace(0, 1, 101), "bins": np.linspace(0, 1, BINS + 1)}
    known = [column[~np.isnan(column)] for column in values.T]
    return np.stack([np.quantile(k, at[transform]) if len(k) else np.zeros(len(at[transform])) for k in known], -1)


def transformed(values: np.ndarray, transform: str | None, fitted: np.ndarray | None) -> np.ndarray:
    """Transform numbers with heavy tails; NaN stays NaN.

    "log": sign(x) log(1 + |x|). "clip": clip to the 1st and 99th percentile. "quantile": the empirical distribution
    function of the fitted values, interpolated linearly between percentiles; equal percentiles share their mean rank.
    "bins": soft binning by hat functions at nine quantiles; each value activates the two neighbouring knots. A linear
    layer on top of the bins is a piecewise linear function of the number, clipped at both ends, which the meta-gradient
    learns with all other parameters.

    Args:
      values: `[n, width]` numbers.
      transform: one of `TRANSFORMS`, or None.
      fitted: knots from `knots`.

    Returns:
      `[n, width]`; for "bins" `[n, width * knots]`.

    References:
      Gorishniy et al., On Embeddings for Numerical Features in Tabular Deep Learning, NeurIPS 2022 (their piecewise
      linear encoding is a cumulative sum of the hat functions used here).
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
    """Compute the hat functions `[n, knots]` of the distinct knots; of equal knots only the first has one."""
    distinct, place = np.unique(at, return_index=True)
    hats = np.zeros((len(values), len(at)))
    for k, unit in zip(place, np.eye(len(distinct)), strict=True):
        hats[:, k] = np.interp(values, distinct, unit)
    return np.where(np.isnan(values)[:, None], np.nan, hats)


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
        raise ValueError(f"a scale needs two different finite numbers (lowest, highest), got {scale}")
    return low, high
