"""Metrics of recommended lists equal plain loops over the definitions."""

import itertools
import math

import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.metrics.pairwise import cosine_distances

from metarec_jax.metrics import lists as metrics

ITEMS = 12


@pytest.fixture
def lists() -> np.ndarray:
    """Lists of 5, 3, 1 and no items."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(ITEMS)[:5] for _ in range(4)])
    return np.where(np.arange(5) < np.array([5, 3, 1, 0])[:, None], rows, -1)


def test_coverage_and_gini_count_what_is_recommended(lists):
    count = np.array([(lists == i).sum() for i in range(ITEMS)])
    np.testing.assert_allclose(metrics.coverage(lists, ITEMS), (count > 0).mean())
    mean_difference = np.abs(count[:, None] - count[None]).mean()  # the other definition of the index
    np.testing.assert_allclose(metrics.gini(lists, ITEMS), mean_difference / (2 * count.mean()), rtol=1e-6)
    np.testing.assert_allclose(metrics.gini(np.arange(ITEMS)[None], ITEMS), 0, atol=1e-6)
    assert np.isnan(metrics.gini(np.full((2, 3), -1), ITEMS))


def test_novelty_is_the_mean_surprise_in_bits(lists):
    popularity = np.linspace(0, 0.5, ITEMS)  # item 0 is unknown to everybody: half of the least share
    share = [popularity[1] / 2, *popularity[1:]]
    found = np.asarray(metrics.novelty(lists, popularity))
    for value, row in zip(found, lists, strict=True):
        bits = [-math.log2(share[i]) for i in row if i >= 0]
        np.testing.assert_allclose(value, np.mean(bits) if bits else math.nan, rtol=1e-5)


def test_the_popularity_rank_is_the_mean_rank_of_a_lists_items(lists):
    popularity = np.random.default_rng(0).integers(0, 5, ITEMS)  # with ties
    found = np.asarray(metrics.popularity_rank(lists, popularity))
    rank = scipy.stats.rankdata(-popularity)
    for value, row in zip(found, lists, strict=True):
        np.testing.assert_allclose(value, rank[row[row >= 0]].mean() if row.max() >= 0 else math.nan, rtol=1e-6)
    np.testing.assert_allclose(metrics.popularity_rank(np.arange(3)[:, None], np.array([0.3, 0.9, 0.3])), [2.5, 1, 2.5])


def jaccard(lists) -> float:
    """Mean over the pairs of which one list is not empty."""
    sets = [set(row[row >= 0].tolist()) for row in np.asarray(lists)]
    values = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2) if a | b]
    return np.mean(values) if values else math.nan


@pytest.mark.parametrize("users", [2, metrics.BLOCK - 1, metrics.BLOCK, 2 * metrics.BLOCK + 7])
def test_likeness_is_the_mean_jaccard_index_of_all_pairs(users):
    rng = np.random.default_rng(users)
    lists = np.where(rng.random((users, 5)) < 0.8, rng.integers(0, 40, (users, 5)), -1)  # some items twice
    lists[:: max(2, users // 3)] = -1
    np.testing.assert_allclose(metrics.likeness(lists), jaccard(lists), rtol=1e-5)
    np.testing.assert_allclose(metrics.likeness(np.tile([4, 7, 9], (users, 1))), 1)
    np.testing.assert_allclose(metrics.likeness(np.arange(3 * users).reshape(users, 3)), 0)


def test_likeness_without_a_pair_is_nan():
    assert np.isnan(metrics.likeness(np.array([[1, 2]])))
    assert np.isnan(metrics.likeness(np.full((3, 2), -1)))


def test_diversity_is_the_mean_cosine_distance_of_pairs(lists):
    vectors = np.random.default_rng(1).normal(size=(ITEMS, 4)).astype(np.float32)
    vectors[lists[0, 0]] = 0
    found = np.asarray(jax.jit(metrics.diversity)(lists, vectors))
    for value, row in zip(found, lists, strict=True):
        own = vectors[row[row >= 0]]
        if len(own) < 2:
            assert np.isnan(value)
            continue
        pairs = cosine_distances(own)[np.triu_indices(len(own), 1)]
        np.testing.assert_allclose(value, pairs.mean(), rtol=1e-5)
    same = np.asarray(metrics.diversity(np.array([[3, 3, 3]]), vectors))
    np.testing.assert_allclose(same, 0, atol=1e-6)
