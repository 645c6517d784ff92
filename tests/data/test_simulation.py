"""Synthetic ratings follow the model that their documentation states."""

import numpy as np
import pytest
from scipy import stats

from metarec_jax.data.simulation import synthetic


@pytest.fixture(scope="module")
def large():
    return synthetic(users=3000, items=300, ratings_per_user=(20, 60), noise=0.7, seed=4)


def test_ratings_are_the_truth_plus_normal_noise(large):
    assert large.truth is not None
    residual = large.rating - large.truth[large.user, large.item]
    n = len(residual)
    assert abs(residual.mean()) < 4 * 0.7 / np.sqrt(n)
    assert abs(residual.std() - 0.7) < 4 * 0.7 / np.sqrt(2 * n)
    assert stats.kstest(residual / 0.7, "norm").pvalue > 1e-3


def test_without_noise_ratings_are_the_truth():
    data = synthetic(noise=0.0)
    assert data.truth is not None
    np.testing.assert_allclose(data.rating, data.truth[data.user, data.item], rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_truth_is_two_biases_and_a_product_of_that_rank(rank):
    truth = synthetic(users=150, items=60, rank=rank).truth
    assert truth is not None
    assert np.isnan(truth[0]).all()
    assert np.isnan(truth[:, 0]).all()
    inner = truth[1:, 1:]
    centred = inner - inner.mean(0) - inner.mean(1, keepdims=True) + inner.mean()
    singular = np.linalg.svd(centred, compute_uv=False)
    assert singular[rank - 1] > 1e-3
    assert singular[rank] < 1e-9


def test_variances_are_as_stated():
    """Per user, truth ~ N(3.5 + b_i, 0.3^2 + |q_i|^2 / rank); per item E|q_i|^2 / rank = 1 + 0.3^2."""
    truth = synthetic(users=4000, items=500, rank=3, genres=400, ratings_per_user=(1, 2), seed=1).truth
    assert truth is not None
    inner = truth[1:, 1:]
    assert abs(inner.mean(0).mean() - 3.5) < 0.05
    assert abs(inner.mean(0).std() - 0.3) < 0.04
    assert abs(inner.var(0).mean() - (0.3**2 + 1 + 0.3**2)) < 0.15


def test_items_of_one_genre_are_alike(large):
    assert large.truth is not None
    taste = large.truth[1:, 1:] - large.truth[1:, 1:].mean(0)
    correlation = np.corrcoef(taste.T)
    genre = large.item_features["genre"][1:]
    same = (genre[:, None] == genre) & ~np.eye(len(genre), dtype=bool)
    assert correlation[same].mean() > correlation[genre[:, None] != genre].mean() + 0.3


def test_each_user_rates_distinct_items_and_a_uniform_number_of_them(large):
    pairs = large.user.astype(np.int64) * 1000 + large.item
    assert len(np.unique(pairs)) == len(pairs)
    counts = np.bincount(large.user)[1:]
    assert stats.chisquare(np.bincount(counts, minlength=61)[20:]).pvalue > 1e-3
    assert counts.min() == 20
    assert counts.max() == 60


def test_the_dataset_is_well_formed(large):
    assert large.user.dtype == large.item.dtype == np.int32
    assert large.rating.dtype == np.float32
    assert large.timestamp.dtype == np.int64
    assert large.user.min() == large.item.min() == 1
    assert (large.users.encode(np.arange(1, 3001)) == np.arange(1, 3001)).all()
    assert len(large.titles) == len(large.items) == len(large.item_features["genre"]) == 301
    (field,) = large.item_fields
    names = field.vocabulary.ids[large.item_features["genre"][1:] - 1]
    assert all(title.endswith(f"({name})") for title, name in zip(large.titles[1:], names, strict=True))


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    one, same, other = synthetic(seed=1), synthetic(seed=1), synthetic(seed=2)
    for name in ("user", "item", "rating", "timestamp", "truth"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.truth, other.truth, equal_nan=True)


@pytest.mark.parametrize("bounds", [(0, 5), (6, 5), (5, 11)])
def test_impossible_numbers_of_ratings_are_refused(bounds):
    with pytest.raises(ValueError, match=r"1 <= low <= high <= items \(10\)"):
        synthetic(items=10, ratings_per_user=bounds)
