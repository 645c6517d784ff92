"""Ranking baselines with a popularity term, tuned on the validation users for each support size."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from metarec_jax.collaborative import factorise
from metarec_jax.metrics.ranking import DEPTH, SIZES, Lists, by_support, list_metrics, lists_of
from metarec_jax.tasks.ranking import RankingTask
from metarec_jax.tasks.splits import Histories, Split
from metarec_jax.tasks.target import Target

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
)  # weights of the log popularity
GRID: dict[str, list[dict[str, float]]] = {
    "popularity": [{}],
    "item-kNN": [{"neighbours": n, "shrink": s} for n in (50, 200) for s in (10.0, 50.0)],
    "EASE": [{"penalty": p} for p in (100.0, 200.0, 400.0, 800.0)],
    "iALS": [{"unobserved": a, "penalty": p} for a in (0.3, 1.0, 3.0) for p in (0.3, 1.0, 3.0, 10.0)],
}
DENSE = 6_000  # items up to which EASE stores a dense item-item matrix


def popularity(matrix: sp.csr_matrix) -> Score:
    """Return zero scores, so that only the popularity term ranks."""
    return lambda supports: np.zeros(supports.shape, np.float32)


def item_knn(matrix: sp.csr_matrix, neighbours: int = 100, shrink: float = 10.0) -> Score:
    """Sum the similarities to the support items; see `factorise.item_knn`."""
    similarity = factorise.item_knn(matrix, int(neighbours), shrink)
    return lambda supports: (supports @ similarity).toarray()


def ease(matrix: sp.csr_matrix, penalty: float = 400.0, rank: int = 512) -> Score:
    """Score by EASE (`factorise.ease`); catalogues over `DENSE` items use a low-rank form with `rank` components."""
    if matrix.shape[1] <= DENSE:
        weights = factorise.ease(matrix, penalty)
        return lambda supports: supports @ weights
    left, right = factorise.low_rank_ease(matrix, rank, penalty)
    return lambda supports: (supports @ left) @ right.T


def ials(matrix: sp.csr_matrix, unobserved: float = 1.0, penalty: float = 1.0, rank: int = 64) -> Score:
    """Score by iALS fold-in (`factorise.ials`); `unobserved` and `penalty` are multiples of `factorise.scales`."""
    usual = factorise.scales(matrix)
    unobserved, penalty = unobserved * usual[0], penalty * usual[1]
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
    depths: dict[str, Lists] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Fit, tune and evaluate ranking baselines.

    They are fitted on the training users and evaluated on the test users. Hyperparameters and the weight of log
    popularity maximise nDCG@100 on the validation users, for each support size.

    Args:
      split: training, validation and test users.
      target: mapping of ratings to targets.
      methods: names in `METHODS`.
      sizes: support sizes; None for all.
      query: query size for protocols without their own.
      graded: fit on grades of all ratings (`Target.grade`) instead of the positives only.
      tune_on: largest number of validation users.
      depths: if given, receives the lists with five support examples, by method.

    Returns:
      Metrics `[test users]` by method and name.
    """
    data, index = split.train.data, split.train.index
    rating = data.rating[index]
    value = target.grade(rating) if graded else (rating >= target.threshold).astype(np.float32)
    users = np.unique(data.user[index], return_inverse=True)[1]
    matrix = sp.csr_matrix((value, (users, data.item[index])), shape=(users.max() + 1, len(data.items)))
    matrix.eliminate_zeros()
    log_popularity = factorise.log_popularity((matrix > 0).astype(np.float32))
    validation = split.validation.take(np.arange(min(len(split.validation), tune_on)))
    results = {}
    for method in methods:
        scores = [METHODS[method](matrix, **setting) for setting in GRID[method]]
        choice = {}
        for size in sizes:
            ndcg = []
            for score in scores:
                ndcg += _ndcg_by_weight(score, log_popularity, validation, target, query, size)
            choice[size] = divmod(int(np.argmax(ndcg)), len(POPULARITY))

        def make(size: int | None, scores: Any = scores, choice: Any = choice) -> Lists:
            setting, weight = choice[size]

            def lists_of_task(task: RankingTask) -> np.ndarray:
                return _lists(scores[setting], [POPULARITY[weight]], log_popularity, task)[0]

            return lists_of(lists_of_task, split.test, target, query=query, support=size)

        name = method if method == "popularity" else f"{method} + popularity"
        results[name] = by_support(make, sizes)
        if depths is not None and 5 in sizes:
            depths[name] = make(5)
    return results


def _ndcg_by_weight(
    score: Score, log_popularity: np.ndarray, histories: Histories, target: Target, query: int, size: int | None
) -> list[float]:
    """Compute nDCG@100 for each weight of the log popularity; scores are computed once."""
    ndcg_by_weight: list[list[np.ndarray]] = [[] for _ in POPULARITY]

    def recommend(task: RankingTask) -> np.ndarray:
        lists = _lists(score, POPULARITY, log_popularity, task)
        wanted = np.where(task.query.mask > 0, task.query.rows, -2)
        for per_batch, rows in zip(ndcg_by_weight, lists, strict=True):
            hits = (rows[:, :, None] == wanted[:, None, :]).any(2)
            per_batch.append(list_metrics(Lists(rows, hits, (wanted > 0).sum(1)))["ndcg@100"])
        return lists[0]

    lists_of(recommend, histories, target, query=query, support=size)
    return [float(np.nanmean(np.concatenate(per_batch))) for per_batch in ndcg_by_weight]


def _lists(score: Score, weights: Sequence[float], log_popularity: np.ndarray, task: RankingTask) -> list[np.ndarray]:
    """Return the best items by `score + weight * log popularity` for each weight; without a support, by popularity."""
    known = task.known
    users, place = np.nonzero(known.weight > 0)
    liked = known.target[users, place] > 0
    rows = known.items[users, place]
    supports = sp.csr_matrix(
        (np.ones(int(liked.sum()), np.float32), (users[liked], rows[liked])),
        shape=(len(known.items), len(log_popularity)),
    )
    scores, lists = np.asarray(score(supports)), []
    for weight in weights:
        total = scores + max(weight, 1e-6) * log_popularity
        total[:, 0] = -np.inf
        total[users, rows] = -np.inf
        depth = min(DEPTH, total.shape[1] - 1)
        top = np.argpartition(-total, depth - 1, axis=1)[:, :depth]
        values = np.take_along_axis(total, top, 1)
        order = np.lexsort((top, -values))
        lists.append(np.where(np.isneginf(np.take_along_axis(values, order, 1)), -1, np.take_along_axis(top, order, 1)))
    return lists
