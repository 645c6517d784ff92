"""Rating and click baselines in numpy: two means, ALS fold-in, item-kNN.

Each is fitted on the training users' interactions and scores a new user's query items from that user's support set.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from metarec_jax.collaborative import factorise
from metarec_jax.metrics.scoring import Scores
from metarec_jax.tasks.candidates import Among, candidates
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
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
    """Fit a weighted mean of the user's residuals on the most similar items.

    Similarity is the shrunk cosine of the training users' residuals (Sarwar et al., WWW 2001; Koren, KDD 2008, eq. 3).
    """
    means = _means(train)
    owner = np.unique(train.user, return_inverse=True)[1]
    residual = train.target - means.mean - means.item[train.item]
    per_user = np.bincount(owner, residual) / (np.bincount(owner) + means.shrink)
    table = np.zeros((owner.max() + 1, train.items), np.float32)
    table[owner, train.item] = residual - per_user[owner]
    rated = np.zeros_like(table)
    rated[owner, train.item] = 1
    common = rated.T @ rated
    norm = np.sqrt(((table**2).T @ rated) * (rated.T @ table**2))
    similarity = (table.T @ table) / np.maximum(norm, 1e-9) * common / (common + shrink)

    def predict(items: np.ndarray, target: np.ndarray, query: np.ndarray) -> np.ndarray:
        bias = means.user(items, target)
        weight = np.maximum(similarity[np.ix_(query, items)], 0)
        if weight.shape[1] > neighbours:
            weight = np.where(weight >= -np.sort(-weight, axis=1)[:, neighbours - 1 : neighbours], weight, 0)
        rest = target - means.mean - means.item[items] - bias
        return means.mean + means.item[query] + bias + (weight @ rest) / (weight.sum(1) + ridge * 0.1)

    return predict


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
    data = train.data

    train_rating, graded = data.rating[train.index], target.levels is not None
    chosen = candidates(test, target, among, query=query)
    queries, in_query = (chosen.interaction >= 0).sum(1), chosen.mask > 0
    results = {}
    for name, make in BASELINES.items():
        of_ratings = name.endswith(OF_RATINGS)
        if of_ratings and not graded:
            continue
        encode = (lambda rating: rating) if of_ratings else target.encode
        values = encode(train_rating).astype(float)
        predict = make(Interactions(data.user[train.index], data.item[train.index], values, len(data.items)))
        # least-squares map from ratings to clicks
        line = np.polyfit(values, target.encode(train_rating), 1) if of_ratings else (1.0, 0.0)
        scores = np.zeros_like(chosen.target)
        for u in range(len(test)):
            seen = test.index[test.starts[u] : test.starts[u + 1]][queries[u] :][:support]
            predicted = predict(
                data.item[seen], encode(test.data.rating[seen]).astype(float), chosen.item[u, in_query[u]]
            )
            scores[u, in_query[u]] = np.polyval(line, predicted)
        if target.kind == "click":  # least squares on 0/1 estimates a probability, but may leave [0, 1]
            results[name] = Scores(np.clip(scores, 0, 1), chosen.target, chosen.mask)
        else:
            results[name] = Scores(target.decode(scores), target.decode(chosen.target), chosen.mask)
    return results
