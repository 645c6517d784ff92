"""Click metrics of blocks of users against those of all users at once, and the pooled AUC of many against its bound."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from metarec_jax.metrics.scoring import Scores, summarise
from metarec_jax.metrics.totals import _PooledAUC, summarise_blocks


def random_scores(users=23, width=40, seed=0, digits=2):
    """Scores with ties, padding, a user without positives and one without candidates."""
    rng = np.random.default_rng(seed)
    target = (rng.random((users, width)) < 0.2).astype(np.float32)
    scores = np.round(np.clip(0.3 + 0.3 * target + 0.3 * rng.normal(size=target.shape), 0, 1), digits)
    mask = (np.arange(width) < rng.integers(5, width + 1, (users, 1))).astype(np.float32)
    target[3], mask[5] = 0, 0
    return Scores(scores.astype(np.float32), target, mask)


def blocks(scores, size):
    return (Scores(*(x[start : start + size] for x in scores)) for start in range(0, len(scores.mask), size))


@pytest.mark.parametrize("size", [1, 7, 23])
def test_blocks_give_the_metrics_of_all_users_at_once(size):
    scores = random_scores()
    found, expected = summarise_blocks(blocks(scores, size)), summarise(scores, "click")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


def test_what_no_user_defines_is_nan():
    scores = random_scores()
    found = summarise_blocks(blocks(scores._replace(target=np.zeros_like(scores.target)), 10))
    assert {name for name, value in found.items() if np.isnan(value)} == {
        *("auc", "within_user_auc", "recall@5", "ndcg@5", "mrr@5", "map@5")
    }


def test_a_nan_score_is_below_all_others():
    scores = random_scores()
    scores.scores[scores.scores > 0.8] = np.nan
    low = np.where(np.isnan(scores.scores), -1, scores.scores)
    kept = scores.mask > 0
    found = summarise_blocks(blocks(scores, 7))["auc"]
    assert found == pytest.approx(roc_auc_score(scores.target[kept], low[kept]), abs=1e-6)


@pytest.mark.parametrize("digits", [1, 9])
def test_more_negatives_than_are_kept_change_the_auc_less_than_the_edges_are_apart(monkeypatch, digits):
    monkeypatch.setattr("metarec_jax.metrics.totals.NEGATIVES", 2000)
    monkeypatch.setattr("metarec_jax.metrics.totals.EDGES", 500)
    scores, pooled = random_scores(400, 60, digits=digits), _PooledAUC()
    for block in blocks(scores, 16):
        pooled.add(block)
        assert sum(map(len, pooled.negatives)) <= 2000
    kept = scores.mask > 0
    exact = roc_auc_score(scores.target[kept], scores.scores[kept])
    assert pooled.value() == pytest.approx(exact, abs=1e-6 if digits == 1 else 1 / 500)  # ties are edges themselves
