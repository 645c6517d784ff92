"""Rating and click baselines in numpy: two means, ALS fold-in, item-kNN.

Each is fitted on the training users' interactions and scores a new user's query items from that user's support set.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from metarec_jax.collaborative import factorise
from metarec_jax.metrics.scoring import Scores
from metarec_jax.tasks.candidates import Among, Candidates, candidates
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

CELLS = 1 << 22  # query x support items compared at once
COLUMNS = 1 << 28  # bytes of item similarities that are kept
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Score = Callable[[Histories, Candidates], Scores]
BASELINES: dict[str, Callable[["Interactions"], Predict]] = {}


class Interactions(NamedTuple):
    """The training users' interactions.

    Attributes:
      user, item: `[n]` rows.
      target: `[n]` targets.
      items: number of item rows.
    """

    user: np.ndarray
    item: np.ndarray
    target: np.ndarray
    items: int


class _Means(NamedTuple):
    mean: float
    item: np.ndarray
    shrink: float

    def user(self, items: np.ndarray, target: np.ndarray) -> float:
        """Return the shrunk mean of a user's residuals after the item means."""
        return float((target - self.mean - self.item[items]).sum() / (len(items) + self.shrink))


def _means(train: Interactions, item_shrink: float = 5.0, user_shrink: float = 5.0) -> _Means:
    return _Means(*factorise.means(train.item, train.target, train.items, item_shrink), user_shrink)


def two_means(train: Interactions) -> Predict:
    """Fit global mean + shrunk item mean + shrunk user mean (the baseline of Koren, KDD 2008, eq. 1)."""
    means = _means(train)

    def predict(items: np.ndarray, target: np.ndarray, query: np.ndarray) -> np.ndarray:
        return means.mean + means.item[query] + means.user(items, target)

    return predict


def als_fold_in(train: Interactions, rank: int = 8, ridge: float = 5.0, sweeps: int = 15, seed: int = 0) -> Predict:
    """Fit matrix factorisation of the residuals after the two means by alternating least squares.

    A new user's factor is the ridge solution on the support set (Zhou et al., 2008).
    """
    shrink = 5.0
    mean, item_bias, vectors = factorise.explicit_als(
        train.user, train.item, train.target, train.items, rank, penalty=ridge, shrink=shrink, sweeps=sweeps, seed=seed
    )
    means = _Means(mean, item_bias, shrink)

    def predict(items: np.ndarray, target: np.ndarray, query: np.ndarray) -> np.ndarray:
        bias = means.user(items, target)
        x = vectors[items]
        factor = np.linalg.solve(x.T @ x + ridge * np.eye(rank), x.T @ (target - means.mean - means.item[items] - bias))
        return means.mean + means.item[query] + bias + vectors[query] @ factor

    return predict


def item_knn(train: Interactions, neighbours: int = 40, shrink: float = 20.0, ridge: float = 5.0) -> Predict:
    """Fit a weighted mean of the user's residuals r on the most similar items, shrunk to 0.

        sum_j s_ij r_j / (sum_j s_ij + ridge / 10),  over the `neighbours` items j most similar to i

    The divisor 10 scales `ridge` to a sum of similarities, each at most 1; its default adds 0.5 to the denominator.
    Similarity is the shrunk cosine of the training users' residuals (Sarwar et al., WWW 2001; Koren, KDD 2008, eq. 3).
    """
    means = _means(train)
    owner = np.unique(train.user, return_inverse=True)[1]
    residual = train.target - means.mean - means.item[train.item]
    per_user = np.bincount(owner, residual) / (np.bincount(owner) + means.shrink)
    similar = _similarity(owner, train.item, residual - per_user[owner], train.items, shrink)

    def predict(items: np.ndarray, target: np.ndarray, query: np.ndarray) -> np.ndarray:
        bias = means.user(items, target)
        rest = target - means.mean - means.item[items] - bias
        size = max(CELLS // max(len(query), 1), neighbours)
        tiles = [slice(start, start + size) for start in range(0, len(items), size)]
        least = np.zeros((len(query), 1), np.float32)  # weight of the last neighbour
        if len(items) > neighbours:
            best = np.zeros((len(query), 0), np.float32)
            for tile in tiles:
                best = np.concatenate([best, similar(query, items[tile])], 1)
                best = np.partition(best, -neighbours, axis=1)[:, -neighbours:]
            least = best.min(1, keepdims=True)
        total, weights = np.zeros(len(query)), np.zeros(len(query))
        for tile in tiles:
            weight = similar(query, items[tile])
            weight = np.where(weight >= least, weight, 0)
            total += weight @ rest[tile]
            weights += weight.sum(1)
        return means.mean + means.item[query] + bias + total / (weights + ridge / 10)

    return predict


def _similarity(
    owner: np.ndarray, item: np.ndarray, value: np.ndarray, items: int, shrink: float
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return `similar(rows, columns)`, the shrunk cosines `[rows, columns]` of items; negative ones are 0.

    With the residuals x and the users U_ij who rated both items:

        s_ij = sum_U x_i x_j / sqrt(sum_U x_i^2 sum_U x_j^2) * |U_ij| / (|U_ij| + shrink)

    Columns are computed when they are asked for. The memory is that of the interactions and of `COLUMNS` bytes.

    Args:
      owner, item, value: `[interactions]` user rows, item rows and residuals; of repeated pairs the last counts.
      items: number of item rows.
      shrink: see above.
    """
    last = len(owner) - 1 - np.unique((owner * items + item)[::-1], return_index=True)[1]
    by_user = sp.csr_matrix((value[last], (owner[last], item[last])), shape=(int(owner.max()) + 1, items))
    by_item = by_user.tocsc()

    @lru_cache(maxsize=max(COLUMNS // (4 * items), 1))
    def column(i: int) -> np.ndarray:
        """Return the similarities of an item to all items, `[items]`."""
        span = slice(*by_item.indptr[i : i + 2])
        theirs = by_user[by_item.indices[span]]  # the interactions of the users who rated the item
        own = np.repeat(by_item.data[span], np.diff(theirs.indptr))
        weights = own * theirs.data, own**2, theirs.data**2
        product, own_square, other_square = (np.bincount(theirs.indices, x, items) for x in weights)
        common = np.bincount(theirs.indices, minlength=items)
        norm = np.maximum(np.sqrt(own_square * other_square), 1e-9)
        return np.maximum(product / norm * common / (common + shrink), 0).astype(np.float32)

    def similar(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        if len(rows) < len(columns):  # the matrix is symmetric
            return np.stack([column(row)[columns] for row in rows.tolist()])
        return np.stack([column(i)[rows] for i in columns.tolist()], axis=1)

    return similar


BASELINES |= {"two means": two_means, "ALS fold-in": als_fold_in, "item-kNN": item_knn}
OF_RATINGS = " of ratings"  # suffix of baselines that are fitted on ratings to predict clicks
BASELINES |= {name + OF_RATINGS: make for name, make in BASELINES.items()}


def score_baselines(
    train: Histories,
    test: Histories,
    target: Target,
    *,
    query: int = 10,
    support: int | None = None,
    among: Among = "query",
) -> dict[str, Scores]:
    """Score the baselines on the same tasks as a model: training users, support sets and candidates.

    Args:
      train, test: training and test users.
      target: mapping of ratings to targets.
      query: largest query size.
      support: largest support size (None: all).
      among: the items among which queries are ranked, see `metarec_jax.tasks.candidates`.
    """
    chosen = candidates(test, target, among, query=query)
    return {name: score(test, chosen) for name, score in fit_baselines(train, target, support)}


def fit_baselines(train: Histories, target: Target, support: int | None = None) -> Iterator[tuple[str, Score]]:
    """Fit the baselines one by one; yield the name of each, and the function that scores users on candidates.

    Args:
      train: training users.
      target: mapping of ratings to targets.
      support: largest support size (None: all).
    """
    data, train_rating, graded = train.data, train.data.rating[train.index], target.levels is not None
    for name, make in BASELINES.items():
        of_ratings = name.endswith(OF_RATINGS)
        if of_ratings and not graded:
            continue
        encode = (lambda rating: rating) if of_ratings else target.encode
        values = encode(train_rating).astype(float)
        predict = make(Interactions(data.user[train.index], data.item[train.index], values, len(data.items)))
        # least-squares map from ratings to clicks
        line = np.polyfit(values, target.encode(train_rating), 1) if of_ratings else (1.0, 0.0)
        yield name, partial(_score, predict, encode, line, target, support)


def _score(
    predict: Predict,
    encode: Callable[[np.ndarray], np.ndarray],
    line: np.ndarray | tuple[float, float],
    target: Target,
    support: int | None,
    test: Histories,
    chosen: Candidates,
) -> Scores:
    """Score the candidates of each user from the user's support set."""
    data, queries, in_query = test.data, (chosen.interaction >= 0).sum(1), chosen.mask > 0
    scores = np.zeros_like(chosen.target)
    for u in range(len(test)):
        seen = test.index[test.starts[u] : test.starts[u + 1]][queries[u] :][:support]
        predicted = predict(data.item[seen], encode(data.rating[seen]).astype(float), chosen.item[u, in_query[u]])
        scores[u, in_query[u]] = np.polyval(line, predicted)
    if target.kind == "click":  # least squares on 0/1 estimates a probability, but may leave [0, 1]
        return Scores(np.clip(scores, 0, 1), chosen.target, chosen.mask)
    return Scores(target.decode(scores), target.decode(chosen.target), chosen.mask)
