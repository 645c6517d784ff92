"""Negative sampling for positive-only data."""

from dataclasses import replace
from typing import Literal

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError

ROUNDS = 100  # of redrawing rejected items; a user still short then has interacted with nearly all items


def with_negatives(
    data: Dataset,
    per_positive: int = 1,
    *,
    by: Literal["uniform", "popularity"] = "uniform",
    rating: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Add `per_positive` sampled negatives for each interaction.

    A negative is an item without any interaction of the user in the data; each is drawn at most once for a user. It
    gets the timestamp and the context of its positive, so that time-based protocols keep the two together. A user who
    knows nearly all items may get fewer. `report["negatives"]` counts all negatives.

    Args:
      data: the interactions, all of them positive. Click tables need a rating column, for instance 1 everywhere, and a
        protocol whose threshold it reaches: `ColdUsers(threshold=1)`.
      per_positive: negatives for each positive.
      by: "uniform" over items, or in proportion to an item's number of interactions (Rendle and Freudenthaler, WSDM
        2014).
      rating: the rating of a negative; below the click threshold.
      seed: random seed.

    Raises:
      DataError: there are no interactions.
      ValueError: `per_positive` is below 1, or `by` is unknown.

    Example:
      Ann's only negative is rye, Bob's is tea:

      >>> plays = {"user_id": ["ann", "bob"], "item_id": ["tea", "rye"], "rating": [1, 1]}
      >>> data = mr.data.with_negatives(mr.data.from_tables(plays))
      >>> data.items.decode(data.item).tolist(), data.rating.tolist()
      (['tea', 'rye', 'rye', 'tea'], [1.0, 0.0, 1.0, 0.0])
    """
    if per_positive < 1 or by not in ("uniform", "popularity"):
        raise ValueError(f'need per_positive >= 1 and by "uniform" or "popularity", got {per_positive} and {by!r}')
    if not len(data.rating):
        raise DataError(f"{data.name} has no interactions, so that there is nothing to add negatives to")
    rng, items = np.random.default_rng(seed), len(data.items)
    source = np.repeat(np.arange(len(data.user)), per_positive)  # the positive of each negative
    taken = np.unique(data.user.astype(np.int64) * items + data.item)
    cumulated = np.cumsum(np.bincount(data.item, minlength=items)[1:]) if by == "popularity" else None
    kept_source, kept_item = [], []
    for _ in range(ROUNDS):
        if not len(source):
            break
        if cumulated is None:
            drawn = rng.integers(1, items, len(source))
        else:
            drawn = 1 + np.searchsorted(cumulated, rng.integers(0, cumulated[-1], len(source)), side="right")
        pair = data.user[source].astype(np.int64) * items + drawn
        first_draw = np.zeros(len(pair), bool)
        first_draw[np.unique(pair, return_index=True)[1]] = True
        interacted = taken[np.minimum(np.searchsorted(taken, pair), len(taken) - 1)] == pair
        accepted = first_draw & ~interacted
        kept_source.append(source[accepted])
        kept_item.append(drawn[accepted])
        taken, source = np.union1d(taken, pair[accepted]), source[~accepted]
    origin, item = np.concatenate(kept_source), np.concatenate(kept_item).astype(data.item.dtype)
    positive_of = np.concatenate([np.arange(len(data.user)), origin])
    order = np.argsort(positive_of, kind="stable")  # each negative directly after its positive
    row_of = positive_of[order]
    return replace(
        data,
        user=data.user[row_of],
        item=np.concatenate([data.item, item])[order],
        rating=np.concatenate([data.rating, np.full(len(item), rating, data.rating.dtype)])[order],
        timestamp=data.timestamp[row_of],
        context_features={name: table[row_of] for name, table in data.context_features.items()},
        report=data.report | {"negatives": len(item)},
    )
