"""Negatives: for data that hold only what users did, items that they did not, drawn at random."""

from dataclasses import replace
from typing import Literal

import numpy as np

from metarec_jax.data.dataset import Dataset

ROUNDS = 100  # of drawing again what was drawn twice or is known; then the user has little left


def with_negatives(
    data: Dataset,
    per_positive: int = 1,
    *,
    by: Literal["uniform", "popularity"] = "uniform",
    rating: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """The dataset with `per_positive` sampled negatives for each interaction.

    A negative is an item that the user has no interaction with, anywhere in the data, drawn at most once for a user. It
    has the time and the context of its positive, so that a protocol in time keeps the two together. A user who knows
    nearly all items gets fewer; `report["negatives"]` counts them all.

    Args:
      data: the interactions, all of them positive. A table of clicks needs a column of ratings, say 1 everywhere, and a
        protocol that takes it for a click: `ColdUsers(threshold=1)`.
      per_positive: how many for each.
      by: every item alike, or in proportion to how many interactions it has (Rendle and Freudenthaler, WSDM 2014).
      rating: what a negative is rated; below the threshold of a click.
      seed: same seed, same negatives.

    Raises:
      ValueError: `per_positive` below 1, or an unknown `by`.
    """
    if per_positive < 1 or by not in ("uniform", "popularity"):
        raise ValueError(f'need per_positive >= 1 and by "uniform" or "popularity", got {per_positive} and {by!r}')
    rng, items = np.random.default_rng(seed), len(data.items)
    source = np.repeat(np.arange(len(data.user)), per_positive)  # each negative's positive
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
        first = np.zeros(len(pair), bool)
        first[np.unique(pair, return_index=True)[1]] = True
        known = taken[np.minimum(np.searchsorted(taken, pair), len(taken) - 1)] == pair
        good = first & ~known
        kept_source.append(source[good])
        kept_item.append(drawn[good])
        taken, source = np.union1d(taken, pair[good]), source[~good]
    origin, item = np.concatenate(kept_source), np.concatenate(kept_item).astype(data.item.dtype)
    both = np.concatenate([np.arange(len(data.user)), origin])
    order = np.argsort(both, kind="stable")  # a negative stands behind its positive
    everything = both[order]
    return replace(
        data,
        user=data.user[everything],
        item=np.concatenate([data.item, item])[order],
        rating=np.concatenate([data.rating, np.full(len(item), rating, data.rating.dtype)])[order],
        timestamp=data.timestamp[everything],
        context_features={name: table[everything] for name, table in data.context_features.items()},
        report=data.report | {"negatives": len(item)},
    )
