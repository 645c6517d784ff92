"""Plain methods of ranking, each with a popularity term, tuned on the validation users for each support size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from metarec_jax import factorise
from metarec_jax.data.splits import Split
from metarec_jax.data.target import Target
from metarec_jax.evaluation.ranking import DEPTH, SIZES, Lists, by_support, list_metrics, lists_of
from metarec_jax.strategies.ranked import RankingTask

Score = Callable[[sp.csr_matrix], np.ndarray]  # supports [users, items] -> scores [users, items]
POPULARITY = (
    0.0,
    0.003,
    0.01,
    0.02,
    0.04,
    0.07,
    0.1,
    0.2,
)  # weights of the log popularity, in units of a score's spread
GRID: dict[str, list[dict[str, float]]] = {
    "popularity": [{}],
    "item-kNN": [{"neighbours": n, "shrink": s} for n in (50, 200) for s in (10.0, 50.0)],
    "EASE": [{"penalty": p} for p in (100.0, 200.0, 400.0, 800.0)],
    "iALS": [{"unobserved": a, "penalty": p} for a in (0.1, 0.3, 1.0) for p in (0.003, 0.01, 0.03)],
}
DENSE = 20_000  # items up to which EASE has a matrix of items by items


def popularity(matrix: sp.csr_matrix) -> Score:
    """Scores of 0: only the popularity term counts."""
    return lambda supports: np.zeros(supports.shape, np.float32)


def item_knn(matrix: sp.csr_matrix, neighbours: int = 100, shrink: float = 10.0) -> Score:
    """Sum of the similarities to the support; see `metarec_jax.factorise.item_knn`."""
    similarity = factorise.item_knn(matrix, int(neighbours), shrink)
    return lambda supports: (supports @ similarity).toarray()


def ease(matrix: sp.csr_matrix, penalty: float = 400.0, rank: int = 512) -> Score:
    """See `metarec_jax.factorise.ease`; of `rank` components where the catalogue is large."""
    if matrix.shape[1] <= DENSE:
        weights = factorise.ease(matrix, penalty)
        return lambda supports: supports @ weights
    left, right = factorise.low_rank_ease(matrix, rank, penalty)
    return lambda supports: (supports @ left) @ right.T


def ials(matrix: sp.csr_matrix, unobserved: float = 0.3, penalty: float = 0.01, rank: int = 64) -> Score:
    """See `metarec_jax.factorise.ials`."""
    items = factorise.ials(matrix, rank, unobserved=unobserved, penalty=penalty).items
    return lambda supports: factorise.fold_in(supports, items, unobserved, penalty) @ items.T


METHODS: Mapping[str, Callable[..., Score]] = {
    "popularity": popularity, "item-kNN": item_knn, "EASE": ease, "iALS": ials,
}  # fmt: skip


def ranking_baselines(
    split: Split,
    target: Target,
    *,
    methods: Sequence[str] = tuple(METHODS),
    sizes: Sequence[int | None] = SIZES,
    query: int = 10,
    graded: bool = False,
    tune_on: int = 1024,
) -> dict[str, dict[str, np.ndarray]]:
    """`[test users]` of each metric, by method: fitted on the training users, tuned on the validation users.

    Settings and the weight of log popularity are chosen for each support size by nDCG@100.

    Args:
      split: training, validation and test users.
      target: ratings to targets.
      methods: names in `METHODS`.
      sizes: support sizes, None for all.
      query: query size of protocols without their own.
      graded: fit on what all ratings say (`Target.grade`) in place of the positives alone.
      tune_on: at most so many validation users.
    """
    data, index = split.train.data, split.train.index
    rating = data.rating[index]
    value = target.grade(rating) if graded else (rating >= target.threshold).astype(np.float32)
    users = np.unique(data.user[index], return_inverse=True)[1]
    matrix = sp.csr_matrix((value, (users, data.item[index])), shape=(users.max() + 1, len(data.items)))
    matrix.eliminate_zeros()
    log_popularity = factorise.log_popularity((matrix > 0).astype(np.float32))
    validation = split.validation.take(np.arange(min(len(split.validation), tune_on)))
    found = {}
    for method in methods:
        scores = [METHODS[method](matrix, **setting) for setting in GRID[method]]
        choice = {}
        for size in sizes:
            tried = []
            for score in scores:
                tried += _ndcg_by_weight(score, log_popularity, validation, target, query, size)
            choice[size] = divmod(int(np.argmax(tried)), len(POPULARITY))

        def make(size: int | None, scores: Any = scores, choice: Any = choice) -> Lists:
            setting, weight = choice[size]
            own = _recommend(scores[setting], POPULARITY[weight], log_popularity)
            return lists_of(own, split.test, target, query=query, support=size)

        name = method if method == "popularity" else f"{method} + popularity"
        found[name] = by_support(make, sizes)
    return found


def _ndcg_by_weight(
    score: Score, log_popularity: np.ndarray, histories: Any, target: Target, query: int, size: int | None
) -> list[float]:
    return [
        float(
            np.nanmean(
                list_metrics(
                    lists_of(_recommend(score, weight, log_popularity), histories, target, query=query, support=size)
                )["ndcg@100"]
            )
        )
        for weight in POPULARITY
    ]


def _recommend(score: Score, weight: float, log_popularity: np.ndarray) -> Callable[[RankingTask], np.ndarray]:
    """The best items by `score + weight log popularity`; of a user without a support by popularity."""

    def recommend(task: RankingTask) -> np.ndarray:
        known = task.known
        users, place = np.nonzero((known.weight > 0) & (known.target > 0))
        rows = known.items[users, place]
        supports = sp.csr_matrix(
            (np.ones(len(rows), np.float32), (users, rows)), shape=(len(known.items), len(log_popularity))
        )
        found = np.asarray(score(supports)) + max(weight, 1e-6) * log_popularity
        found[:, 0] = -np.inf
        seen_users, seen_place = np.nonzero(known.weight > 0)
        found[seen_users, known.items[seen_users, seen_place]] = -np.inf
        depth = min(DEPTH, found.shape[1] - 1)
        top = np.argpartition(-found, depth - 1, axis=1)[:, :depth]
        order = np.lexsort((top, -np.take_along_axis(found, top, 1)))
        top = np.take_along_axis(top, order, 1)
        return np.where(np.isneginf(np.take_along_axis(found, top, 1)), -1, top)

    return recommend
