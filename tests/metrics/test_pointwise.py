"""Every metric equals scikit-learn or a plain loop, on random inputs with ties and masked entries."""

import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytrec_eval
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve

from metarec_jax.metrics import pointwise as metrics
from metarec_jax.metrics import roc

USERS, CANDIDATES = 12, 9
POINTWISE = ("rmse", "mae", "log_loss", "accuracy", "precision", "recall", "f1", "auc", "calibration_error")
RANKING = ("precision_at", "recall_at", "f1_at", "hit_rate_at", "map_at", "ndcg_at", "mrr_at")
SEEDS = range(3)


def case(seed: int, ties: bool = True, stars: bool = False, candidates: int = CANDIDATES):
    """Scores in (0, 1), targets and a random mask; of some users nothing or one class is left."""
    rng = np.random.default_rng(seed)
    scores = rng.random((USERS, candidates))
    if ties:
        scores = (np.floor(scores * 5) + 0.5) / 5  # 0.5 among them
    target = rng.integers(1, 6, scores.shape) if stars else rng.random(scores.shape) < 0.4
    mask = rng.random(scores.shape) < 0.7
    mask[0] = False
    target[1] = stars
    mask[2, 1:] = False
    return scores.astype(np.float32), target.astype(np.float32), mask.astype(np.float32)


def kept(scores, target, mask):
    """One list of (score, target) a user."""
    return [
        [(float(s), float(t)) for s, t, m in zip(*rows, strict=True) if m]
        for rows in zip(scores, target, mask, strict=True)
    ]


def flat(scores, target, mask):
    return scores[mask > 0], target[mask > 0]


def ranked(user):
    """Targets by falling score; of equal scores the earlier candidate first (sorted is stable)."""
    return [t for _, t in sorted(user, key=lambda pair: -pair[0])]


def plain_precision(user, k):
    return sum(ranked(user)[:k]) / k if user else math.nan


def plain_recall(user, k):
    positives = sum(t for _, t in user)
    return sum(ranked(user)[:k]) / positives if positives else math.nan


def plain_ndcg(user, k):
    def dcg(gains):
        return sum(g / math.log2(rank + 1) for rank, g in enumerate(gains[:k], 1))

    best = dcg(sorted((t for _, t in user), reverse=True))
    return dcg(ranked(user)) / best if best else math.nan


def plain_mrr(user, k):
    places = [rank for rank, t in enumerate(ranked(user), 1) if t > 0]
    return math.nan if not places else 1 / places[0] if places[0] <= k else 0.0


def plain_f1(user, k):
    p, r = plain_precision(user, k), plain_recall(user, k)
    return 2 * p * r / (p + r) if p + r else p + r  # 0, or NaN without positives


def plain_hit_rate(user, k):
    return float(any(ranked(user)[:k])) if any(t for _, t in user) else math.nan


def plain_map(user, k):
    targets = ranked(user)
    at_hits = [sum(targets[:rank]) / rank for rank, t in enumerate(targets[:k], 1) if t]
    return sum(at_hits) / sum(targets) if sum(targets) else math.nan


def plain_auc(user):
    positives, negatives = [s for s, t in user if t > 0.5], [s for s, t in user if t <= 0.5]
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    return sum(wins) / len(wins) if wins else math.nan


PLAIN = {
    "precision_at": plain_precision,
    "recall_at": plain_recall,
    "f1_at": plain_f1,
    "hit_rate_at": plain_hit_rate,
    "map_at": plain_map,
    "ndcg_at": plain_ndcg,
    "mrr_at": plain_mrr,
}


def binned_error(target, scores):
    """Expected calibration error from scikit-learn's curve of ten equal bins."""
    share, confidence = calibration_curve(target, scores, n_bins=10)
    count = np.histogram(scores, bins=np.linspace(0, 1, 11))[0]
    return np.average(np.abs(share - confidence), weights=count[count > 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_overall_metrics_equal_scikit_learn(seed):
    arrays = case(seed)
    scores, target = (x.astype(float) for x in flat(*arrays))
    clicked, guessed = target > 0.5, scores >= 0.5
    expected = {
        "rmse": sklearn.root_mean_squared_error(target, scores),
        "mae": sklearn.mean_absolute_error(target, scores),
        "log_loss": sklearn.log_loss(target, scores),
        "accuracy": sklearn.accuracy_score(clicked, guessed),
        "precision": sklearn.precision_score(clicked, guessed),
        "recall": sklearn.recall_score(clicked, guessed),
        "f1": sklearn.f1_score(clicked, guessed),
        "calibration_error": binned_error(target, scores),
        "auc": sklearn.roc_auc_score(target, scores),
    }
    np.testing.assert_allclose(jax.jit(metrics.auc)(*arrays), expected["auc"], rtol=2e-6)  # and on the device
    assert set(expected) == set(POINTWISE)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(metrics, name)(*arrays), value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ties", [False, True])
def test_within_user_auc_equals_scikit_learn_and_all_pairs(seed, ties):
    arrays = case(seed, ties)
    found = np.asarray(metrics.within_user_auc(*arrays))
    by_sorting = jax.vmap(roc._auc)(*(jnp.asarray(x) for x in arrays))
    np.testing.assert_allclose(by_sorting, found, rtol=1e-6)  # what tables of many candidates take
    users = kept(*arrays)
    np.testing.assert_allclose(found, [plain_auc(u) for u in users], rtol=1e-6)
    assert np.isnan(found[:3]).all()
    for value, user in zip(found, users, strict=True):
        if not np.isnan(value):
            np.testing.assert_allclose(
                value, sklearn.roc_auc_score([t for _, t in user], [s for s, _ in user]), rtol=1e-6
            )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("k", [1, 5, CANDIDATES, CANDIDATES + 3])
def test_ranking_metrics_equal_a_plain_loop(name, k, seed):
    arrays = case(seed)
    found = getattr(metrics, name)(k, *arrays)
    np.testing.assert_allclose(found, [PLAIN[name](u, k) for u in kept(*arrays)], rtol=1e-6)


TREC = {  # trec_eval's names: ours
    "P_5": partial(metrics.precision_at, 5),
    "recall_5": partial(metrics.recall_at, 5),
    "success_5": partial(metrics.hit_rate_at, 5),
    "map_cut_5": partial(metrics.map_at, 5),
    "recip_rank": partial(metrics.mrr_at, CANDIDATES),
    "ndcg_cut_5": partial(metrics.ndcg_at, 5),
}


def trec(measures, scores, target, mask, depth=None):
    """trec_eval's measures of the users with a positive, and the rows of these users.

    Ties are broken by the order of the candidates, as ours are. With `depth` only so many are retrieved.
    """
    users = {str(i): user for i, user in enumerate(kept(scores, target, mask)) if any(t for _, t in user)}
    qrels = {u: {str(j): int(t) for j, (_, t) in enumerate(user)} for u, user in users.items()}
    best = {u: sorted(range(len(user)), key=lambda j: -user[j][0])[:depth] for u, user in users.items()}
    run = {u: {str(j): -float(rank) for rank, j in enumerate(order)} for u, order in best.items()}
    expected = pytrec_eval.RelevanceEvaluator(qrels, set(measures)).evaluate(run)
    return {name: np.array([expected[u][name] for u in users]) for name in measures}, [int(u) for u in users]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gains", ["click", "linear", "exponential"])
def test_ranking_metrics_equal_trec_eval(seed, gains):
    scores, target, mask = case(seed, stars=gains != "click")
    graded = np.exp2(target) - 1 if gains == "exponential" else target
    expected, rows = trec(TREC, scores, graded, mask)
    if gains == "click":
        for theirs, ours in TREC.items():
            found = np.asarray(ours(scores, target, mask))[rows]
            np.testing.assert_allclose(found, expected[theirs], rtol=1e-6, err_msg=theirs)
    else:
        found = np.asarray(metrics.ndcg_at(5, scores, target, mask, gain=gains))[rows]
        np.testing.assert_allclose(found, expected["ndcg_cut_5"], rtol=1e-6)


def liang(user, k):
    """Recall@R and nDCG@R of 0/1 targets by the formulas of Liang et al. (WWW 2018, section 4)."""
    found, positives = np.array(ranked(user)[:k]), int(sum(t for _, t in user))
    if not positives:
        return math.nan, math.nan
    discount = np.log2(np.arange(len(found)) + 2)
    best = (1 / np.log2(np.arange(min(k, positives)) + 2)).sum()
    return found.sum() / min(k, positives), ((2**found - 1) / discount).sum() / best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 5, CANDIDATES, CANDIDATES + 3])
def test_normalised_recall_and_ndcg_equal_the_formulas_of_liang_et_al(seed, k):
    arrays = case(seed)
    expected = np.array([liang(user, k) for user in kept(*arrays)])
    np.testing.assert_allclose(metrics.recall_at(k, *arrays, normalised=True), expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.ndcg_at(k, *arrays), expected[:, 1], rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ranking_table_equals_trec_eval(seed):
    arrays = case(seed, candidates=250)
    arrays[1][::2] *= arrays[1][::2].cumsum(1) <= 15  # users with few positives and with many: both sides of min(k, .)
    expected, rows = trec(["ndcg_cut_10", "ndcg_cut_100", "recall_20", "recall_50", "success_10"], *arrays)
    positives = (arrays[1] * arrays[2]).sum(1)[rows]
    assert positives.min() < 20
    assert positives.max() > 50
    wanted = {
        "ndcg@10": expected["ndcg_cut_10"],
        "ndcg@100": expected["ndcg_cut_100"],
        "recall@20": expected["recall_20"] * positives / np.minimum(20, positives),
        "recall@50": expected["recall_50"] * positives / np.minimum(50, positives),
        "hit_rate@10": expected["success_10"],
        "mrr@10": trec(["recip_rank"], *arrays, depth=10)[0]["recip_rank"],
    }
    table = metrics.ranking_metrics(*arrays)
    assert set(table) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(table[name], values.mean(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reliability_curve_equals_scikit_learn(seed):
    arrays = case(seed)
    scores, target = (x.astype(float) for x in flat(*arrays))
    confidence, share, count = (np.asarray(x) for x in metrics.reliability(*arrays, bins=7))
    expected = calibration_curve(target, scores, n_bins=7)
    np.testing.assert_allclose(share[count > 0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(confidence[count > 0], expected[1], rtol=1e-6)
    assert count.sum() == len(scores)
    assert np.isnan(share[count == 0]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_ndcg_of_ratings_equals_a_plain_loop_and_scikit_learn(seed):
    arrays = case(seed, ties=False, stars=True)
    found = np.asarray(metrics.ndcg_at(5, *arrays))
    for value, user in zip(found, kept(*arrays), strict=True):
        np.testing.assert_allclose(value, plain_ndcg(user, 5), rtol=1e-6)
        if len(user) > 1:
            scores, target = zip(*user, strict=True)
            np.testing.assert_allclose(value, sklearn.ndcg_score([target], [scores], k=5), rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_mrr_within_all_candidates_equals_scikit_learn_where_one_item_is_right(seed):
    rng = np.random.default_rng(seed)
    scores, target = rng.random((6, 8)), np.eye(8)[rng.integers(8, size=6)]
    found = metrics.mean_defined(metrics.mrr_at(8, scores, target, np.ones((6, 8))))
    np.testing.assert_allclose(found, sklearn.label_ranking_average_precision_score(target, scores), rtol=1e-6)


@jax.jit
def every_metric(scores, target, mask):
    values = {name: getattr(metrics, name)(scores, target, mask) for name in (*POINTWISE, "within_user_auc")}
    values |= {name: getattr(metrics, name)(5, scores, target, mask) for name in RANKING}
    tables = {"click": metrics.click_metrics, "rating": metrics.rating_metrics, "ranking": metrics.ranking_metrics}
    for kind, table in tables.items():
        values |= {f"{kind} {name}": value for name, value in table(scores, target, mask).items()}
    return values


@pytest.mark.parametrize("clicks", [np.float32, np.int32])
def test_every_metric_is_a_strongly_typed_float32(clicks):
    """A weakly typed array takes the type of what it is combined with, and compiles its users twice."""
    scores, target, mask = case(0)
    values = every_metric(scores, target.astype(clicks), mask)
    weak = {name for name, x in values.items() if x.weak_type or x.dtype != jnp.float32}
    assert not weak


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30, 0.5])
def test_masked_entries_never_matter(junk):
    scores, target, mask = case(0)
    before = every_metric(scores, target, mask)
    rng = np.random.default_rng(1)
    for spoil in ((True, False), (False, True), (True, True)):
        new = [
            np.where((mask > 0) | (not s), x, np.float32(junk)) for x, s in zip((scores, target), spoil, strict=True)
        ]
        for name, value in every_metric(*new, mask).items():
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    # nor how many there are, nor where
    wide = np.zeros((USERS + 2, CANDIDATES + 4), np.float32)
    columns = np.sort(rng.permutation(CANDIDATES + 4)[:CANDIDATES])
    padded = []
    for x, fill in ((scores, junk), (target, junk), (mask, 0.0)):
        grown = np.full_like(wide, fill)
        grown[:USERS, columns] = x
        padded.append(grown)
    for name, value in every_metric(*padded).items():
        value = value[:USERS] if jnp.ndim(value) else value
        np.testing.assert_allclose(value, before[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", POINTWISE)
def test_junk_in_masked_numpy_entries_raises_no_warning(name):
    """Outside jit numpy itself would compute with it; warnings are errors here."""
    scores, target, mask = case(0)
    metric = getattr(metrics, name)
    expected = metric(scores, target, mask)
    for junk in (np.float32(np.inf), np.float32(1e30)):
        spoilt = (np.where(mask > 0, x, junk) for x in (scores, target))
        np.testing.assert_array_equal(metric(*spoilt, mask), expected)


@pytest.mark.parametrize("worst", [np.inf, -np.inf])
def test_infinite_scores_rank_as_the_highest_and_the_lowest(worst):
    scores, target, mask = case(2)
    infinite = np.where(np.arange(CANDIDATES) % 3 == 0, np.float32(worst), scores)
    finite = np.where(np.arange(CANDIDATES) % 3 == 0, np.float32(np.sign(worst) * 1e6), scores)
    np.testing.assert_array_equal(metrics.auc(infinite, target, mask), metrics.auc(finite, target, mask))
    np.testing.assert_array_equal(
        metrics.within_user_auc(infinite, target, mask), metrics.within_user_auc(finite, target, mask)
    )
    for name in RANKING:
        metric = getattr(metrics, name)
        np.testing.assert_array_equal(metric(5, infinite, target, mask), metric(5, finite, target, mask))


def test_a_nan_score_ranks_below_every_other_and_above_padding():
    scores, target, mask = case(3)
    spoilt = np.where(np.arange(CANDIDATES) % 2 == 0, np.float32(np.nan), scores)
    lowest = np.where(np.arange(CANDIDATES) % 2 == 0, np.float32(-1e6), scores)
    for name in ("auc", "within_user_auc"):
        metric = getattr(metrics, name)
        np.testing.assert_array_equal(metric(spoilt, target, mask), metric(lowest, target, mask))
    for name in RANKING:
        metric = getattr(metrics, name)
        np.testing.assert_array_equal(metric(5, spoilt, target, mask), metric(5, lowest, target, mask))
    for name in ("rmse", "mae", "log_loss"):
        assert np.isnan(getattr(metrics, name)(spoilt, target, mask))


def test_what_is_not_defined_is_nan():
    scores, target, mask = case(0)
    nothing = every_metric(scores, target, np.zeros_like(mask))
    assert {name for name, value in nothing.items() if not np.isnan(value).all()} == {"f1", "click f1"}
    one_class = every_metric(scores, np.zeros_like(target), mask)
    undefined = {"auc", "within_user_auc", "recall_at", "ndcg_at", "mrr_at"}
    for name in undefined:
        assert np.isnan(one_class[name]).all(), name
    assert not np.isnan(one_class["precision_at"][1:]).any()


def test_means_leave_out_users_for_whom_a_metric_is_not_defined():
    arrays = case(1)
    table = metrics.click_metrics(*arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "within_user_auc": np.nanmean([plain_auc(u) for u in kept(*arrays)]),
            "precision@5": np.nanmean([plain_precision(u, 5) for u in kept(*arrays)]),
            "recall@5": np.nanmean([plain_recall(u, 5) for u in kept(*arrays)]),
            "ndcg@5": np.nanmean([plain_ndcg(u, 5) for u in kept(*arrays)]),
            "mrr@5": np.nanmean([plain_mrr(u, 5) for u in kept(*arrays)]),
        }
    for name, value in expected.items():
        np.testing.assert_allclose(table[name], value, rtol=1e-6, err_msg=name)
    for name in ("auc", "log_loss", "accuracy", "f1"):
        np.testing.assert_allclose(table[name], getattr(metrics, name)(*arrays), rtol=1e-6, err_msg=name)
    assert np.isnan(metrics.mean_defined(jnp.full(3, jnp.nan)))


def test_the_rating_table_holds_the_metrics_it_names():
    arrays = case(1, stars=True)
    table = metrics.rating_metrics(*arrays)
    assert set(table) == {"rmse", "mae", "ndcg@5"}
    scores, target = (x.astype(float) for x in flat(*arrays))
    np.testing.assert_allclose(table["rmse"], sklearn.root_mean_squared_error(target, scores), rtol=1e-6)
    np.testing.assert_allclose(table["mae"], sklearn.mean_absolute_error(target, scores), rtol=1e-6)
    np.testing.assert_allclose(table["ndcg@5"], np.nanmean([plain_ndcg(u, 5) for u in kept(*arrays)]), rtol=1e-6)


def test_certain_probabilities_have_a_finite_log_loss():
    certain = np.array([[0.0, 1.0, 1.0, 0.0]])
    found = metrics.log_loss(certain, np.array([[1.0, 0.0, 1.0, 0.0]]), np.ones((1, 4)))
    np.testing.assert_allclose(found, -np.log(1e-7) / 2, rtol=0.01)


def test_auc_of_many_scores_keeps_five_digits():
    """Ranks are summed in float32."""
    rng = np.random.default_rng(0)
    target = rng.random((400, 1000)) < 0.3
    scores = (rng.normal(size=target.shape) + 0.5 * target).astype(np.float32)
    found = metrics.auc(scores, target.astype(np.float32), np.ones_like(scores))
    np.testing.assert_allclose(found, sklearn.roc_auc_score(target.ravel(), scores.ravel()), atol=1e-5)
