"""Transitions: tables against counts by hand, probabilities, and a next item that follows from the last."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import metarec_jax as mr
from metarec_jax.collaborative import item_to_item
from metarec_jax.collaborative.item_to_item import Sequences
from metarec_jax.strategies.transitions import _adam, _evidence, _gates, _scores, _start

ITEMS, LENGTH, USERS = 30, 12, 150


@pytest.fixture(scope="module")
def recommender():
    """Users who go from item i to i + 1, nine times of ten."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random((USERS, LENGTH)) < 0.9, 1, 3)
    items = (rng.integers(ITEMS, size=(USERS, 1)) + np.cumsum(steps, 1)) % ITEMS
    table = {
        "user_id": np.repeat(np.arange(USERS), LENGTH),
        "item_id": items.ravel(),
        "rating": np.ones(items.size),
        "timestamp": np.tile(np.arange(LENGTH) * 60, USERS),
    }
    tags = {"item_id": np.arange(ITEMS), "tag": [f"tag {i % 5}" for i in range(ITEMS)]}
    data = mr.data.from_tables(table, items=tags)
    options = {"size": 20, "rank": 8, "steps": 50}
    return mr.train(data, "transitions", protocol=mr.NextItem(), strategy_options=options, progress=False)


def test_the_next_item_follows_from_the_last(recommender):
    best = [recommender.recommend([(i, 1.0), ((i + 1) % ITEMS, 1.0)], k=1)[0].item for i in range(ITEMS)]
    assert np.mean([item == (i + 2) % ITEMS for i, item in enumerate(best)]) > 0.9


def test_probabilities_sum_to_one_but_for_rows_that_are_cut_and_a_history_without_items_gets_popularity(recommender):
    fitted = recommender.params["tables"]["fitted"]
    history = jnp.array([[0, 0, 3], [5, 6, 7], [0, 0, 0]], jnp.int32)
    p = np.exp(np.asarray(_scores(fitted, history, history > 0), np.float64))
    assert (p.sum(1) <= 1 + 1e-5).all()
    assert (p.sum(1) > 0.9).all()
    np.testing.assert_allclose(p[2], fitted["popularity"], rtol=1e-5, atol=1e-12)


def test_saved_and_loaded_it_recommends_the_same(recommender, tmp_path):
    recommender.save(tmp_path / "model")
    history = [(3, 1.0), (4, 1.0)]
    assert mr.load(tmp_path / "model").recommend(history, k=5) == recommender.recommend(history, k=5)


def test_a_new_item_is_finite_and_last(recommender):
    more = recommender.add_items({"item_id": [99], "tag": ["tag 1"]})
    ranked = more.recommend([(3, 1.0)], k=ITEMS)
    assert np.isfinite([r.score for r in ranked]).all()
    assert ranked[-1].item == 99


def test_transitions_count_pairs_by_distance():
    sequences = Sequences(np.array([0, 4, 6]), np.array([1, 2, 3, 1, 2, 3]), 4)
    found = item_to_item.transitions(sequences, 2, lambda d: 1 / d).toarray()
    wanted = np.zeros((4, 4))
    for users in ([1, 2, 3, 1], [2, 3]):
        for i, a in enumerate(users):
            for d in (1, 2):
                if i + d < len(users) and users[i + d] != a:
                    wanted[a, users[i + d]] += 1 / d
    np.testing.assert_allclose(found, wanted)


def test_the_last_item_is_held_out():
    before, last = Sequences(np.array([0, 3, 4, 6]), np.array([1, 2, 3, 3, 2, 1]), 4).without_last()
    np.testing.assert_array_equal(last, [3, 1])
    np.testing.assert_array_equal(before.items, [1, 2, 2])
    np.testing.assert_array_equal(before.starts, [0, 2, 3])


def test_products_keep_the_largest_entries_without_the_diagonal():
    rng = np.random.default_rng(0)
    a = sp.csr_matrix(rng.random((6, 6)) * (rng.random((6, 6)) < 0.6))
    found, dense = item_to_item.product(a, a, 2).toarray(), (a @ a).toarray()
    dense[np.arange(6), np.arange(6)] = dense[:, 0] = 0
    for row, kept in zip(dense, found, strict=True):
        best = np.sort(row)[-2:]
        np.testing.assert_allclose(np.sort(kept[kept > 0]), best[best > 0], rtol=1e-6)


def test_vectors_have_the_cosines_of_a_truncated_svd():
    rng = np.random.default_rng(0)
    items = np.concatenate([1 + rng.choice(11, 5, replace=False) for _ in range(40)])
    sequences = Sequences(np.arange(41) * 5, items, 12)
    x = np.zeros((40, 12))
    x[np.repeat(np.arange(40), 5), items] = 1 / np.sqrt(5 * np.bincount(items, minlength=12)[items])
    _, values, right = np.linalg.svd(x, full_matrices=False)
    wanted = right[:4].T * np.sqrt(values[:4])
    wanted /= np.maximum(np.linalg.norm(wanted, axis=1, keepdims=True), 1e-9)
    found = item_to_item.vectors(sequences, 4, power=20)
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-3)


def test_items_without_attributes_have_empty_rows_wherever_they_stand():
    codes = [np.array([[0, 0], [1, 2], [2, 2], [0, 0]]), np.array([0, 1, 0, 0])]
    rows = item_to_item.attribute_rows(codes).toarray()
    idf = np.log(4 / np.array([1, 2, 1]))  # of the two values of one field, and the one of the other
    first = idf / np.linalg.norm(idf)
    np.testing.assert_allclose(rows[:, [1, 2, 4]], [[0, 0, 0], first, [0, 1, 0], [0, 0, 0]], rtol=1e-6)
    assert not rows[:, [0, 3]].any()


@pytest.mark.parametrize("options", [{"experts": ("luck",)}, {"lags": 0}, {"experts": ()}])
def test_bad_settings_are_refused(options):
    fields = mr.models.fields_of(mr.data.synthetic(users=20, items=50))
    with pytest.raises(ValueError, match=r"experts|need numbers"):
        mr.transitions(mr.models.design(fields), **options)


def test_the_evidence_is_what_dense_tables_hold():
    rng = np.random.default_rng(0)
    tables = [sp.csr_matrix(rng.random((9, 9)) * (rng.random((9, 9)) < 0.4)) for _ in range(2)]
    history, target = np.array([[0, 3, 5], [2, 4, 8]]), np.array([7, 1])
    popularity = np.append(0, rng.random(8))
    of_target, of_seen, popular, popular_seen = _evidence(tables, popularity, history, target)
    for k, dense in enumerate(t.toarray() for t in tables):
        np.testing.assert_allclose(of_target[..., k], dense[history, target[:, None]], rtol=1e-6)
        np.testing.assert_allclose(of_seen[..., k], [dense[np.ix_(h, h)].sum(1) for h in history], rtol=1e-6)
    np.testing.assert_allclose(popular, popularity[target])
    np.testing.assert_allclose(popular_seen, popularity[history].sum(1))


def test_users_that_fill_up_do_not_move_the_gates():
    rng = np.random.default_rng(0)
    tables = {"counts": jnp.arange(9.0), "values": [jnp.ones((9, 1))] * 2}
    history, evidence = (
        rng.integers(1, 9, (4, 3)),
        (rng.random((4, 3, 2)), rng.random((4, 3, 2)) / 9, *rng.random((2, 4)) / 9),
    )
    real = np.array([1.0, 1.0, 1.0, 0.0])
    some = jax.tree.map(lambda x: x[:3], (history, history > 0, evidence, real))
    whole = _adam(_start(2), tables, (history, history > 0, evidence, real), 20)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), whole, _adam(_start(2), tables, some, 20))


def test_half_a_positive_has_half_the_gates(recommender):
    fitted = recommender.params["tables"]["fitted"]
    history, weight = jnp.array([[5, 6, 7]], jnp.int32), jnp.array([[1.0, 0.5, 1.0]])
    (whole,), (popular,) = _gates(fitted, fitted["gates"], history, jnp.ones((1, 3)))
    (half,), (other,) = _gates(fitted, fitted["gates"], history, weight)
    np.testing.assert_allclose(half / other, whole / popular * weight[0][:, None], rtol=1e-5)
    slope = jax.grad(lambda w: _scores(fitted, history, w)[0, 8])(weight)
    assert np.isfinite(slope).all()
    assert slope[0, 2] > 0


def test_a_network_with_parameters_is_refused():
    fields = mr.models.fields_of(mr.data.synthetic(users=20, items=50))
    with pytest.raises(ValueError, match="design"):
        mr.transitions(mr.models.linear(fields))


def test_it_has_nothing_to_train(recommender):
    assert not jax.tree.leaves({k: v for k, v in recommender.params.items() if k != "tables"})
    assert recommender.history == []
