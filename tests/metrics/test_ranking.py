"""Lists and their metrics: against scores of all items, numpy's sort, and plain counts of who chose what."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import metarec_jax as mr
from metarec_jax.collaborative import factorise
from metarec_jax.evaluation import ranking_baselines as plain
from metarec_jax.metrics import pointwise as metrics
from metarec_jax.metrics.ranking import Lists, by_support, list_metrics, lists_of, rank, top_rows
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.ranking import ranking_tasks

DATA = mr.data.synthetic(users=120, items=60, ratings_per_user=(15, 40), seed=3)
ITEMS = len(DATA.items)
SPLIT = mr.StrongGeneralisation().split(DATA, 1)
TARGET = mr.tasks.Target.fit(mr.StrongGeneralisation(), SPLIT.train)


def by_item(values):
    """A strategy that gives every user the scores `values` `[items]`, plus a little for the items of the support."""

    def adapt(params, support, key):
        return jnp.where(support.mask > 0, support.features["item_id"], 0)

    def predict(params, adapted, features):
        ids = features["item_id"]
        return params["values"][ids] + 10.0 * (ids[:, :, None] == adapted[:, None, :]).any(2)

    params = {"values": jnp.asarray(values), "tables": {"items": {"item_id": jnp.arange(ITEMS)}}}
    return Strategy(lambda key: {}, adapt, predict, lambda *_: None, ranks=True), params


def halves(histories, u, support=None):
    """A user's query positives and support, as item rows."""
    own = histories.index[histories.starts[u] : histories.starts[u + 1]]
    query, known = np.split(own, [histories.queries[u]])
    return DATA.item[query[DATA.rating[query] >= 4]], DATA.item[known[:support]]


def test_list_metrics_equal_those_of_the_full_score_matrix_with_ties():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, size=(40, 130)).astype(np.float32)
    target = (rng.random((40, 130)) < rng.random((40, 1)) * 0.5).astype(np.float32)
    target[3] = 0  # no query item: defined nowhere
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(target, order, 1) > 0
    found = list_metrics(Lists(order[:, :100], hits[:, :100], target.sum(1).astype(int)))
    for name, value in metrics.ranking_metrics(scores, target, np.ones_like(target)).items():
        np.testing.assert_allclose(np.nanmean(found[name]), value, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(np.isnan(found[name]), target.sum(1) == 0)


def test_lists_shorter_than_a_cutoff_count_as_ending():
    """Three items are left, of which the second is one of four query items."""
    lists = Lists(np.array([[5, 2, 9]]), np.array([[False, True, False]]), np.array([4]))
    found = {name: value[0] for name, value in list_metrics(lists).items()}
    best = 1 + 1 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose([found["ndcg@10"], found["ndcg@100"]], 1 / np.log2(3) / best, rtol=1e-6)
    np.testing.assert_allclose([found["recall@20"], found["hit_rate@10"], found["mrr@10"]], [0.25, 1.0, 0.5])


@pytest.mark.parametrize("support", [None, 1, 5])
def test_ranking_is_numpys_sort_without_what_was_seen(support):
    values = np.random.default_rng(0).integers(0, 40, ITEMS).astype(np.float32)  # with ties
    lists = rank(*by_item(values), SPLIT.test, TARGET, support=support, depth=20)
    assert lists.rows.shape == lists.hits.shape == (len(SPLIT.test), 20)
    for u, row in enumerate(lists.rows):
        query, known = halves(SPLIT.test, u, support)
        left = np.setdiff1d(np.arange(1, ITEMS), known)
        np.testing.assert_array_equal(row, left[np.argsort(-values[left], kind="stable")][:20])
        np.testing.assert_array_equal(lists.hits[u], np.isin(row, query))
        assert lists.positives[u] == len(query)


def test_nothing_seen_is_listed_and_nothing_twice_even_where_scores_are_not_numbers():
    scores = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    scores[0, [4, 5]], scores[1, 3] = np.nan, np.inf
    seen = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 0]])
    rows = np.asarray(top_rows(jnp.asarray(scores), jnp.asarray(seen), 12))
    for row, own in zip(rows, seen, strict=True):
        listed = row[row >= 0].tolist()
        assert len(listed) == len(set(listed))
        assert not set(listed) & {0, *own.tolist()}
    assert not {4, 5} & set(rows[0].tolist())
    assert [(row >= 0).sum() for row in rows] == [7, 10, 11]
    everything = top_rows(jnp.ones((1, 4)), jnp.arange(4)[None], 4)
    assert np.asarray(everything).tolist() == [[-1, -1, -1, -1]]


@pytest.mark.parametrize("support", [None, 3])
def test_tasks_hold_the_halves_of_the_protocol_whatever_the_batches(support):
    for size in (7, 256):
        at = 0
        for task in ranking_tasks(SPLIT.test, TARGET, support=support, batch_size=size):
            assert len(task.known.items) == size
            for u in range(size):
                known = task.known.items[u][task.known.weight[u] > 0]
                wanted = task.query.rows[u][task.query.mask[u] > 0]
                if at + u >= len(SPLIT.test):
                    assert len(known) == len(wanted) == 0
                    continue
                query, expected = halves(SPLIT.test, at + u, support)
                assert sorted(known.tolist()) == sorted(expected.tolist())
                assert sorted(wanted.tolist()) == sorted(query.tolist())
            at += size
        assert at >= len(SPLIT.test)


def test_support_sizes_are_nested_and_share_their_query():
    asked = {}

    def make(size):
        lists = lists_of(lambda task: task.known.items[:, :1], SPLIT.test, TARGET, support=size)
        asked[size] = lists.positives
        return lists

    found = by_support(make)
    assert {"ndcg@100", "ndcg@100, 1 known", "ndcg@100, 10 known", "mrr@10", "recall@50"} <= set(found)
    assert all(np.array_equal(asked[1], positives) for positives in asked.values())


def popularity(histories):
    """How many of these users rate each item 4 or more."""
    liked = histories.index[DATA.rating[histories.index] >= 4]
    return np.bincount(DATA.item[liked], minlength=ITEMS)


def test_the_popularity_baseline_equals_numpy():
    count = popularity(SPLIT.train).astype(np.float64)
    found = plain.ranking_baselines(SPLIT, TARGET, methods=["popularity"], sizes=(3, None))["popularity"]
    expected = {3: [], None: []}
    for size, values in expected.items():
        for u in range(len(SPLIT.test)):
            query, known = halves(SPLIT.test, u, size)
            left = np.setdiff1d(np.arange(1, ITEMS), known)
            ranked = left[np.argsort(-count[left], kind="stable")][:100]
            gains = np.isin(ranked, query) / np.log2(np.arange(2, len(ranked) + 2))
            values.append(gains.sum() / (1 / np.log2(np.arange(2, len(query) + 2))).sum())
    np.testing.assert_allclose(found["ndcg@100, 3 known"], expected[3], rtol=1e-5)
    np.testing.assert_allclose(found["ndcg@100"], expected[None], rtol=1e-5)


@pytest.mark.parametrize("method", plain.METHODS)
def test_baselines_list_each_item_once_and_none_that_was_seen(method):
    depths = {}
    found = plain.ranking_baselines(SPLIT, TARGET, methods=[method], sizes=(5, None), depths=depths)
    (table,), (lists,) = found.values(), depths.values()
    assert all(np.isfinite(values).all() and values.shape == (len(SPLIT.test),) for values in table.values())
    for u, row in enumerate(lists.rows):
        _, known = halves(SPLIT.test, u, 5)
        listed = row[row >= 0].tolist()
        assert len(listed) == len(set(listed)) == ITEMS - 1 - len(known)
        assert not set(listed) & {0, *known.tolist()}


def test_settings_are_chosen_on_the_validation_users_alone(monkeypatch):
    """The better of two settings on validation users is taken, though it is the worse one on test users."""
    no_ties = np.linspace(0, 0.5, ITEMS)
    known = [(popularity(part) + no_ties).astype(np.float32) for part in (SPLIT.validation, SPLIT.test)]
    monkeypatch.setitem(plain.METHODS, "told", lambda matrix, who: lambda x: np.tile(known[int(who)], (x.shape[0], 1)))
    monkeypatch.setitem(plain.GRID, "told", [{"who": 1.0}, {"who": 0.0}])
    monkeypatch.setattr(plain, "POPULARITY", (0.0,))
    found = plain.ranking_baselines(SPLIT, TARGET, methods=["told"], sizes=(None,))["told + popularity"]["ndcg@100"]
    chosen, other = (list_metrics(rank(*by_item(values), SPLIT.test, TARGET))["ndcg@100"] for values in known)
    np.testing.assert_allclose(found, chosen, rtol=1e-6)
    assert found.mean() < other.mean()


def test_baselines_are_fitted_to_training_users_alone(monkeypatch):
    given = []
    monkeypatch.setitem(plain.METHODS, "popularity", lambda matrix: given.append(matrix) or plain.popularity(matrix))
    plain.ranking_baselines(SPLIT, TARGET, methods=["popularity"], sizes=(None,))
    (matrix,) = given
    np.testing.assert_array_equal(np.asarray(matrix.sum(0)).ravel(), popularity(SPLIT.train))


@pytest.mark.parametrize("method", ["item_knn", "ease", "ials"])
def test_methods_score_as_the_plain_models_do(method):
    rng = np.random.default_rng(0)
    matrix = sp.csr_matrix((rng.random((50, 20)) < 0.3).astype(np.float32))
    supports = sp.csr_matrix((rng.random((6, 20)) < 0.2).astype(np.float32))
    x = supports.toarray()
    if method == "item_knn":
        expected = x @ factorise.item_knn(matrix, 100, 10.0).toarray()
    elif method == "ease":
        expected = x @ factorise.ease(matrix, 400.0)
    else:
        unobserved, penalty = factorise.scales(matrix)
        items = factorise.ials(matrix, 64, unobserved=unobserved, penalty=penalty).items
        v = items.astype(np.float64)
        users = [
            np.linalg.solve(
                (v.T * row) @ v + unobserved * v.T @ v + penalty * (row.sum() + unobserved * 20) * np.eye(64), v.T @ row
            )
            for row in x
        ]
        expected = np.stack(users) @ v.T
    np.testing.assert_allclose(getattr(plain, method)(matrix)(supports), expected, rtol=1e-3, atol=1e-4)
