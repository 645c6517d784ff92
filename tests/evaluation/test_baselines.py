"""The plain baselines against hand computation, plain loops and data whose truth is known."""

import tracemalloc

import numpy as np
import pytest

from metarec_jax.collaborative import factorise
from metarec_jax.data.simulation import synthetic
from metarec_jax.evaluation.baselines import BASELINES, Interactions, als_fold_in, item_knn, score_baselines, two_means
from metarec_jax.tasks.splits import ColdUsers
from metarec_jax.tasks.target import Target


def random_train(seed: int, users: int = 9, items: int = 7) -> Interactions:
    """Users 1, 4, 7, ... with random ratings; item row 0 and the last row are never rated."""
    rng = np.random.default_rng(seed)
    pairs = [(3 * u + 1, i) for u in range(users) for i in range(1, items - 1) if rng.random() < 0.6]
    user, item = np.array(pairs).T
    return Interactions(user, item, rng.normal(3, 1, len(pairs)), items)


def plain_means(train: Interactions) -> tuple[float, list[float]]:
    mean = sum(train.target) / len(train.target)
    item = []
    for i in range(train.items):
        own = [t - mean for j, t in zip(train.item, train.target, strict=True) if i == j]
        item.append(sum(own) / (len(own) + 5))
    return mean, item


TASK = (np.array([1, 3, 4]), np.array([5.0, 2.0, 4.5]), np.array([2, 6, 5]))


def test_two_means_equal_a_hand_computation():
    """Mean 3; item 1 has 4 and 5: 3 / 7; item 2 has 0: -3 / 6; user: (4 - 3 - 3 / 7) / 6."""
    train = Interactions(np.array([1, 2, 1]), np.array([1, 1, 2]), np.array([4.0, 5.0, 0.0]), 4)
    found = two_means(train)(np.array([1]), np.array([4.0]), np.array([1, 2, 3]))
    user = (4 - 3 - 3 / 7) / 6
    np.testing.assert_allclose(found, [3 + 3 / 7 + user, 3 - 3 / 6 + user, 3 + user])


@pytest.mark.parametrize("name", BASELINES)
def test_without_support_the_item_mean_stays(name):
    train = random_train(0)
    mean, item = plain_means(train)
    found = BASELINES[name](train)(np.zeros(0, int), np.zeros(0), np.array([1, 2, 6]))
    np.testing.assert_allclose(found, [mean + item[i] for i in (1, 2, 6)])


@pytest.mark.parametrize("name", BASELINES)
def test_an_item_nobody_rated_gets_the_mean_and_the_users_bias(name):
    train = random_train(1)
    mean, item = plain_means(train)
    items, target, _ = TASK
    bias = sum(t - mean - item[i] for i, t in zip(items, target, strict=True)) / (len(items) + 5)
    np.testing.assert_allclose(BASELINES[name](train)(items, target, np.array([0, 6])), [mean + bias] * 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [1, 3])
def test_als_equals_plain_loops(seed, rank):
    train = random_train(seed)
    mean, item_mean = plain_means(train)
    rest = [t - mean - item_mean[i] for i, t in zip(train.item, train.target, strict=True)]
    users = sorted(set(train.user.tolist()))
    rows = {u: [n for n, v in enumerate(train.user) if v == u] for u in users}
    bias = {u: sum(rest[n] for n in rows[u]) / (len(rows[u]) + 5) for u in users}
    rest = [r - bias[u] for r, u in zip(rest, train.user.tolist(), strict=True)]

    def ridge_fit(x: list[np.ndarray], y: list[float]) -> np.ndarray:
        """min |x w - y|^2 + 2 |w|^2 as one augmented least-squares problem."""
        if not x:
            return np.zeros(rank)
        stacked = np.vstack([np.array(x), np.sqrt(2.0) * np.eye(rank)])
        return np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(rank)]), rcond=None)[0]

    vectors = list(np.random.default_rng(seed).normal(0, 0.1, (train.items, rank)))
    for _ in range(4):
        factor = {u: ridge_fit([vectors[train.item[n]] for n in rows[u]], [rest[n] for n in rows[u]]) for u in users}
        for i in range(train.items):
            of_item = [n for n, j in enumerate(train.item) if j == i]
            vectors[i] = ridge_fit([factor[train.user[n]] for n in of_item], [rest[n] for n in of_item])

    items, target, query = TASK
    own = [t - mean - item_mean[i] for i, t in zip(items, target, strict=True)]
    new = sum(own) / (len(own) + 5)
    fitted = ridge_fit([vectors[i] for i in items], [r - new for r in own])
    expected = [mean + item_mean[q] + new + vectors[q] @ fitted for q in query]
    found = als_fold_in(train, rank=rank, ridge=2.0, sweeps=4, seed=seed)(*TASK)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_grouped_least_squares_satisfy_the_normal_equations_of_each_group():
    rng = np.random.default_rng(0)
    group, x, y = rng.integers(0, 5, 60), rng.normal(size=(60, 3)), rng.normal(size=60)
    group[group == 3] = 4  # a group without rows
    found = factorise.least_squares(group, x, y, 6, 0.7)
    for g in range(6):
        own = group == g
        np.testing.assert_allclose(x[own].T @ (y[own] - x[own] @ found[g]), 0.7 * found[g], atol=1e-12)
    assert not found[[3, 5]].any()


def test_als_converges_to_a_fixed_point():
    train = random_train(2)
    late, later = (als_fold_in(train, rank=2, ridge=0.5, sweeps=n)(*TASK) for n in (2000, 2500))
    early = als_fold_in(train, rank=2, ridge=0.5, sweeps=1)(*TASK)
    np.testing.assert_allclose(late, later, atol=1e-6)
    assert np.abs(early - late).max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("neighbours", [2, 40])
def test_item_knn_equals_plain_loops(seed, neighbours):
    train = random_train(seed, users=15)
    mean, item_mean = plain_means(train)
    rating = {(u, i): t for u, i, t in zip(train.user.tolist(), train.item.tolist(), train.target, strict=True)}
    users = sorted({u for u, _ in rating})
    rest = {}
    for u in users:
        own = {i: t - mean - item_mean[i] for (v, i), t in rating.items() if v == u}
        bias = sum(own.values()) / (len(own) + 5)
        rest |= {(u, i): r - bias for i, r in own.items()}

    def similarity(i: int, j: int) -> float:
        both = [u for u in users if (u, i) in rest and (u, j) in rest]
        dot = sum(rest[u, i] * rest[u, j] for u in both)
        norm = np.sqrt(sum(rest[u, i] ** 2 for u in both) * sum(rest[u, j] ** 2 for u in both))
        return dot / norm * len(both) / (len(both) + 20) if both else 0.0

    items, target, query = np.array([1, 3, 4, 5]), np.array([5.0, 2.0, 4.5, 3.0]), np.array([2, 5, 6])
    own = [t - mean - item_mean[i] for i, t in zip(items, target, strict=True)]
    new = sum(own) / (len(own) + 5)
    expected = []
    for q in query:
        near = sorted(((max(similarity(q, i), 0.0), r - new) for i, r in zip(items, own, strict=True)), reverse=True)
        near = near[:neighbours]
        shift = sum(w * r for w, r in near) / (sum(w for w, _ in near) + 0.5)
        expected.append(mean + item_mean[q] + new + shift)
    found = item_knn(train, neighbours=neighbours)(items, target, query)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def dense_item_knn(train, items, target, query, neighbours, shrink=20.0, ridge=5.0):
    """Item-kNN with dense matrices `[users, items]` and `[items, items]`."""
    mean, item_mean = plain_means(train)
    item_mean, owner = np.array(item_mean), np.unique(train.user, return_inverse=True)[1]
    residual = train.target - mean - item_mean[train.item]
    per_user = np.bincount(owner, residual) / (np.bincount(owner) + 5)
    table, rated = np.zeros((2, owner.max() + 1, train.items))
    table[owner, train.item] = residual - per_user[owner]
    rated[owner, train.item] = 1
    common = rated.T @ rated
    norm = np.sqrt(((table**2).T @ rated) * (rated.T @ table**2))
    similarity = (table.T @ table) / np.maximum(norm, 1e-9) * common / (common + shrink)
    bias = (target - mean - item_mean[items]).sum() / (len(items) + 5)
    weight = np.maximum(similarity[np.ix_(query, items)], 0).astype(np.float32)
    if len(items) > neighbours:
        weight = np.where(weight >= -np.sort(-weight, axis=1)[:, neighbours - 1 : neighbours], weight, 0)
    rest = target - mean - item_mean[items] - bias
    return mean + item_mean[query] + bias + (weight @ rest) / (weight.sum(1) + ridge * 0.1)


@pytest.mark.parametrize("tile", [1, 70, 1 << 22])
@pytest.mark.parametrize("neighbours", [3, 40])
def test_item_knn_in_tiles_equals_dense_matrices(monkeypatch, tile, neighbours):
    monkeypatch.setattr("metarec_jax.evaluation.baselines.CELLS", tile)
    monkeypatch.setattr("metarec_jax.evaluation.baselines.COLUMNS", 500 if tile == 1 else 1 << 28)
    train, rng = random_train(3, users=40, items=30), np.random.default_rng(1)
    again = rng.integers(len(train.user), size=30)  # repeated pairs: the last counts
    user, item = (np.concatenate([x, x[again]]) for x in (train.user, train.item))
    train = Interactions(user, item, np.concatenate([train.target, rng.normal(3, 1, 30)]), train.items)
    predict = item_knn(train, neighbours=neighbours)
    for size, query in ((0, 5), (2, 30), (12, 4), (25, 30)):
        items, asked = rng.permutation(30)[:size], rng.permutation(30)[:query]
        target = rng.normal(3, 1, size)
        expected = dense_item_knn(train, items, target, asked, neighbours)
        np.testing.assert_allclose(predict(items, target, asked), expected, rtol=1e-5)


def test_item_knn_holds_no_table_of_items(monkeypatch):
    monkeypatch.setattr("metarec_jax.evaluation.baselines.COLUMNS", 1 << 22)
    monkeypatch.setattr("metarec_jax.evaluation.baselines.CELLS", 1 << 18)
    rng, items = np.random.default_rng(0), 8000
    user, item = np.unique(rng.integers(0, [1000, items], (30_000, 2)), axis=0).T
    train = Interactions(user, item, rng.normal(3, 1, len(user)), items)
    tracemalloc.start()
    item_knn(train)(np.arange(100, 300), rng.normal(3, 1, 200), np.arange(items))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 < items * items * 4 / 10


def test_neighbours_and_factors_find_tastes_that_two_means_cannot():
    """The best possible error is the noise, 0.3; item and user means miss the whole product of tastes."""
    data = synthetic(users=400, items=60, ratings_per_user=(20, 40), noise=0.3, seed=0)
    protocol = ColdUsers(target="rating")
    split = protocol.split(data)
    results = score_baselines(split.train, split.test, Target.fit(protocol, split.train))
    rmse = {n: float(np.sqrt(((s.scores - s.target) ** 2)[s.mask > 0].mean())) for n, s in results.items()}
    assert 0.3 < rmse["ALS fold-in"] < 0.75 * rmse["two means"]
    assert 0.3 < rmse["item-kNN"] < 0.75 * rmse["two means"]


@pytest.mark.parametrize("name", BASELINES)
def test_the_order_of_training_rows_and_the_numbering_of_users_do_not_matter(name):
    train = random_train(4)
    order = np.random.default_rng(0).permutation(len(train.user))
    other = Interactions(1000 - train.user[order], train.item[order], train.target[order], train.items)
    np.testing.assert_allclose(BASELINES[name](other)(*TASK), BASELINES[name](train)(*TASK), rtol=1e-5)
