"""Metrics of recommended lists equal plain loops over the definitions."""

import math

import jax
import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances

from metarec_jax.evaluation import lists as metrics

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
