"""Plain models of implicit feedback: stationary points of their losses, dense computations, the package implicit."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse as sp

import metarec_jax as mr
from metarec_jax.collaborative import factorise
from metarec_jax.data.fields import Field
from metarec_jax.models import MODELS
from metarec_jax.tasks.observed import Observed


def confidences(users=40, items=15, share=0.3, seed=0, ones=False):
    """Sparse confidences from 0.2 to 1; column 0, the last row and the last column are empty."""
    rng = np.random.default_rng(seed)
    dense = (rng.random((users, items)) < share) * (1.0 if ones else rng.uniform(0.2, 1, (users, items)))
    dense[:, [0, -1]] = 0
    dense[-1] = 0
    return sp.csr_matrix(dense.astype(np.float32))


def ials_loss(dense, users, items, unobserved, penalty):
    """The loss that the docstring of `ials` states, in float64."""
    scores = users @ items.T
    fit = (dense * (1 - scores) ** 2).sum() + unobserved * (scores**2).sum()
    by_user = dense.sum(1) + unobserved * dense.shape[1]
    by_item = dense.sum(0) + unobserved * dense.shape[0]
    return fit + penalty * (by_user @ (users**2).sum(1) + by_item @ (items**2).sum(1))


def central(function, x, step=1e-5):
    """Central differences of a function of an array."""
    found = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        found[i] = (function(up) - function(down)) / (2 * step)
    return found


@pytest.mark.parametrize(("unobserved", "penalty"), [(0.3, 0.02), (0.05, 0.1)])
def test_ials_ends_at_a_stationary_point_of_its_loss(unobserved, penalty):
    matrix = confidences()
    dense = matrix.toarray().astype(np.float64)
    one = factorise.ials(matrix, 3, unobserved=unobserved, penalty=penalty, sweeps=1)
    users, items = (x.astype(np.float64) for x in one)
    by_users = central(lambda x: ials_loss(dense, x, items, unobserved, penalty), users)
    assert np.abs(by_users).max() < 1e-4  # the users are solved last
    users, items = (
        x.astype(np.float64) for x in factorise.ials(matrix, 3, unobserved=unobserved, penalty=penalty, sweeps=300)
    )
    assert np.abs(users @ items.T).max() > 0.1  # not the point where all vectors are 0
    by_users = central(lambda x: ials_loss(dense, x, items, unobserved, penalty), users)
    by_items = central(lambda y: ials_loss(dense, users, y, unobserved, penalty), items)
    assert max(np.abs(by_users).max(), np.abs(by_items).max()) < 1e-3


def test_each_sweep_of_ials_lowers_its_loss():
    matrix = confidences()
    dense = matrix.toarray().astype(np.float64)
    losses = [
        ials_loss(dense, *factorise.ials(matrix, 4, unobserved=0.2, penalty=0.05, sweeps=sweeps), 0.2, 0.05)
        for sweeps in range(1, 7)
    ]
    assert (np.diff(losses) <= 1e-4).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_fold_in_solves_every_row_as_numpy_does(share):
    """Rows of all lengths, more than are solved together, empty ones among them."""
    rng = np.random.default_rng(1)
    dense = (rng.random((200, 12)) < share * rng.random((200, 1))) * rng.uniform(0.2, 1, (200, 12))
    dense[[0, 77, 199]] = 0
    vectors, unobserved, penalty = rng.normal(size=(12, 4)).astype(np.float32), 0.25, 0.03
    found = factorise.fold_in(sp.csr_matrix(dense.astype(np.float32)), vectors, unobserved, penalty)
    v = vectors.astype(np.float64)
    for row, own in zip(found, dense, strict=True):
        ridge = penalty * (own.sum() + unobserved * 12)
        expected = np.linalg.solve((v.T * own) @ v + unobserved * v.T @ v + ridge * np.eye(4), v.T @ own)
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)
    assert not found[[0, 77, 199]].any()


def test_fold_in_equals_that_of_implicit_where_the_penalties_are_equal():
    """Of implicit's loss an interaction takes the place of an unobserved one, of ours it comes on top of it: with one
    confidence c for all, implicit's vectors at confidence 1 + c / a are ours times 1 + a / c."""
    als = pytest.importorskip("implicit.als")
    rng = np.random.default_rng(0)
    vectors, unobserved, penalty, c = rng.normal(size=(20, 4)).astype(np.float32), 0.4, 0.05, 0.8
    rows = sp.csr_matrix((rng.random((6, 20)) < 0.3).astype(np.float32))
    ours = factorise.fold_in(c * rows, vectors, unobserved, penalty)
    for i, own in enumerate(ours):
        row = rows[i]
        ridge = penalty * (c * row.nnz + unobserved * 20)
        with factorise.one_thread():
            model = als.AlternatingLeastSquares(4, ridge / unobserved, dtype=np.float32, num_threads=1)
        model.item_factors = vectors
        with factorise.one_thread():
            theirs = model.recalculate_user(0, (1 + c / unobserved) * row)
        np.testing.assert_allclose(theirs, own * (1 + unobserved / c), rtol=1e-3, atol=1e-5)


def test_scales_are_those_of_movielens_and_the_penalty_of_an_empty_user_falls_with_short_histories():
    rng = np.random.default_rng(0)
    user, item = np.divmod(rng.permutation(943 * 1682)[:55_375], 1682)  # as many positives
    movielens = sp.csr_matrix((np.ones(55_375, np.float32), (user, item)), shape=(943, 1682))
    np.testing.assert_allclose(factorise.scales(movielens), [0.3, 0.01], rtol=0.02)
    for users, items, density in ((943, 1682, 0.035), (200, 3000, 0.001), (50, 10, 0.5)):
        matrix = sp.csr_matrix((rng.random((users, items)) < density).astype(np.float32))
        unobserved, penalty = factorise.scales(matrix)
        np.testing.assert_allclose(unobserved * users * items / matrix.sum(), 8.6, rtol=1e-6)
        np.testing.assert_allclose(unobserved * penalty * items, min(5.0, matrix.sum() / users / 5), rtol=1e-6)
    assert np.isfinite(factorise.scales(sp.csr_matrix((3, 4), dtype=np.float32))).all()


def test_ease_is_least_squares_of_each_column_on_the_others():
    matrix, penalty = confidences(), 3.0
    x = matrix.toarray().astype(np.float64)
    found = factorise.ease(matrix, penalty)
    assert not np.diag(found).any()
    for j in range(x.shape[1]):
        others = np.delete(x, j, 1)
        stacked = np.concatenate([others, np.sqrt(penalty) * np.eye(others.shape[1])])
        target = np.append(x[:, j], np.zeros(others.shape[1]))
        np.testing.assert_allclose(np.delete(found[:, j], j), scipy.linalg.lstsq(stacked, target)[0], atol=1e-5)


def test_low_rank_ease_at_full_rank_is_ease_off_the_diagonal():
    matrix = confidences(ones=True)  # two columns are empty, hence its rank is below min(users, items) - 1
    full = factorise.ease(matrix, 3.0)
    left, right = factorise.low_rank_ease(matrix, 100, 3.0)
    product = left @ right.T
    np.fill_diagonal(product, 0)
    np.testing.assert_allclose(product, full, atol=1e-5)
    few = factorise.low_rank_ease(matrix, 4, 3.0)
    assert few.users.shape == few.items.shape == (15, 4)


@pytest.mark.parametrize("cells", [1, 100, 1 << 22])
@pytest.mark.parametrize(("neighbours", "shrink"), [(100, 10.0), (4, 10.0), (3, 0.0)])
def test_item_knn_equals_a_dense_computation(neighbours, shrink, cells, monkeypatch):
    monkeypatch.setattr(factorise, "CELLS", cells)
    matrix = confidences()
    x = matrix.toarray().astype(np.float64)
    norm = np.sqrt((x**2).sum(0))
    similarity = x.T @ x / np.maximum(norm[:, None] * norm + shrink, 1e-12)
    np.fill_diagonal(similarity, 0)
    for j in range(len(similarity)):
        similarity[np.argsort(-similarity[:, j], kind="stable")[neighbours:], j] = 0
    np.testing.assert_allclose(factorise.item_knn(matrix, neighbours, shrink).toarray(), similarity, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Method expects CSR")  # implicit's own call
def test_item_knn_without_shrinkage_is_implicits_cosine_recommender():
    neighbours = pytest.importorskip("implicit.nearest_neighbours")
    matrix = confidences(share=0.5)
    with factorise.one_thread():
        model = neighbours.CosineRecommender(K=6, num_threads=1)
        model.fit(matrix, show_progress=False)
    theirs = model.similarity.toarray().T  # of each item its nearest ones, itself the first of them
    assert (np.diag(theirs) > 0.99).sum() == 13
    np.fill_diagonal(theirs, 0)
    np.testing.assert_allclose(factorise.item_knn(matrix, 5, 0.0).toarray(), theirs, atol=1e-6)


def test_log_popularity_is_finite_for_items_that_nobody_chose():
    matrix = confidences(ones=True)
    found = factorise.log_popularity(matrix)
    counts = matrix.toarray().sum(0) + 1
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log(counts / counts.sum()), rtol=1e-5)
    assert np.isfinite(factorise.log_popularity(sp.csr_matrix((3, 5)))).all()


def test_too_large_a_matrix_is_refused_in_gigabytes_before_it_is_allocated():
    factorise.check_memory("a matrix", 100, 100, "take less")
    with pytest.raises(mr.DataError, match=r"^a matrix needs 3\.0 GB, more than the limit of 2\.0 GB; take less$"):
        factorise.check_memory("a matrix", 3_000_000_000, 2_000_000_000, "take less")
    assert factorise.dense_bytes(1000, 3) == 3 * np.zeros((1000, 1000), np.float32).nbytes


def test_ease_over_a_million_items_is_refused_before_it_is_allocated():
    items = 1_000_001
    strategy = mr.ease(MODELS["design"]({"item_id": Field("item_id", "categorical", items, 1)}))
    one = np.ones(3, np.float32)
    features = {"item_id": np.arange(items, dtype=np.int32)}
    observed = Observed(np.arange(3), np.array([1, 5, 9]), one, one > 0, features, {}, 3)
    tracemalloc.start()
    with pytest.raises(mr.DataError, match=r'ease over 1,000,000 items needs 12,000\.\d GB.*"rank".*strategy="ials"'):
        strategy.fit(observed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e8
