"""iALS with an empirical Bayes prior: the formulas of its docstring in float64, and what is new."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.collaborative import factorise
from metarec_jax.data.schema import fields_of
from metarec_jax.models import MODELS
from metarec_jax.strategies.observed import tables
from metarec_jax.tasks.observed import observe

RANK, ITEMS = 3, 24
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def data():
    """Users of two groups, one of even and one of odd items; the items 22 and 23 have fields and no interaction."""
    rng = np.random.default_rng(0)
    group, kinds = np.arange(60) % 2, np.array(["even", "odd"])[np.arange(ITEMS) % 2]
    items = np.concatenate([rng.permutation(np.arange(g, 22, 2))[:8] for g in group])
    ratings = np.where(rng.random(len(items)) < 0.8, 5, 2)
    people = {"user_id": np.arange(60), "group": np.array(["a", "b"])[group]}
    table = {"user_id": np.repeat(np.arange(60), 8), "item_id": items, "rating": ratings}
    return mr.data.from_tables(table, people, {"item_id": np.arange(ITEMS), "kind": kinds})


@pytest.fixture(scope="module")
def observed(data):
    histories = mr.tasks.Histories.of(data, np.arange(1, len(data.users)))
    return observe(histories, mr.tasks.Target("ranking", 4.0))


def made(jitted, data, observed, **options):
    """The strategy and parameters away from their initial zeros."""
    strategy = jitted(mr.ials(MODELS["design"](fields_of(data)), rank=RANK, **options))
    params = jax.tree.map(
        lambda x: 0.03 * jnp.cos(1 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), strategy.init(KEY)
    )
    return strategy, {**params, "tables": tables(strategy, observed)}


def support(observed, rows, target, user=0, mask=None):
    """Examples `[1, n]` of these items, of one of the observed users."""
    rows = np.atleast_2d(rows).astype(np.int32)
    found = {name: table[rows] for name, table in observed.features.items()}
    for name, table in observed.profile.items():
        found[f"user/{name}"] = np.broadcast_to(table[user], (*rows.shape, *table.shape[1:]))
    found["order"] = np.arange(rows.shape[1], dtype=np.int32)[None]
    mask = np.ones(rows.shape, np.float32) if mask is None else np.atleast_2d(mask).astype(np.float32)
    return mr.Examples(found, np.atleast_2d(target).astype(np.float32), mask)


def number(params, name, n):
    """A smooth function of the number of positives, as `metarec_jax.strategies.smooth.at` documents it."""
    a, b, c = np.asarray(params[name], np.float64)
    return 10 * (a + b * (np.log1p(n) / 2 - 1) + c * (2 / (1 + n) - 0.3))


def by_hand(params, observed, rows, target, prior_mean, everything):
    """H and u of the docstring, in float64."""
    fitted = {name: np.asarray(x, np.float64) for name, x in params["tables"]["fitted"].items()}
    rows, t = np.asarray(rows, int), np.asarray(target, np.float64)
    n = np.clip(t, 0, 1).sum()
    v = fitted["vectors"][rows].reshape(-1, RANK)
    w = np.exp(np.asarray(params["weight"], np.float64)[rows] + (10 * float(params["dislike"]) - 0.7) * (1 - t))
    prior = fitted["penalty"] * np.exp(number(params, "penalty", n)) * np.eye(RANK)
    prior += 0.03 * np.exp(number(params, "prior", n)) * fitted["precision"]
    everything = everything * np.exp(number(params, "unobserved", n))
    h = (v.T * w) @ v + everything * fitted["vectors"].T @ fitted["vectors"] + prior
    pulled = (1 + number(params, "mean", n)) * prior @ prior_mean
    return h, np.linalg.solve(h, v.T @ (w * t) + pulled), 8 * np.exp(number(params, "scale", n)), n


@pytest.mark.parametrize("rows", [[], [4], [4, 6, 9, 15, 2]], ids=len)
def test_adapting_and_the_deviation_follow_the_docstring(rows, data, observed, jitted):
    strategy, params = made(jitted, data, observed)
    target = [1.0, 1.0, 0.25, 0.0, 0.75][: len(rows)]
    padded = [*rows, 0, 0], [*target, 0.5, 0.0]
    known = support(observed, *padded, user=1, mask=[*np.ones(len(rows)), 0, 0])
    adapted = strategy.adapt(params, known, KEY)
    group = np.zeros(1 + 2 + 1)  # 1, unknown, "a", "b"
    group[[0, 1 + int(observed.profile["group"][1])]] = 1
    prior_mean = group @ np.asarray(params["tables"]["fitted"]["mean"], np.float64)
    h, u, tau, n = by_hand(params, observed, rows, target, prior_mean, factorise.scales(observed.confidences())[0])
    np.testing.assert_allclose(adapted.mean[0], tau * u, rtol=2e-4, atol=1e-5)
    every = support(observed, np.arange(1, 1 + ITEMS), np.zeros(ITEMS), user=1).features
    vectors = np.asarray(params["tables"]["fitted"]["vectors"], np.float64)[1:]
    log_popularity = np.asarray(params["tables"]["log_popularity"], np.float64)[1:]
    expected = tau * vectors @ u + (0.3 + number(params, "popularity", n)) * log_popularity
    np.testing.assert_allclose(strategy.predict(params, adapted, every)[0], expected, rtol=2e-4, atol=1e-5)
    spread = tau * np.sqrt(np.einsum("nf,fg,ng->n", vectors, np.linalg.inv(h), vectors))
    np.testing.assert_allclose(strategy.deviation(params, adapted, every)[0], spread, rtol=1e-3, atol=1e-5)


def test_older_examples_weigh_less_with_a_half_life(data, observed, jitted):
    fading, params = made(jitted, data, observed, half_life=2.0)
    plain, same = made(jitted, data, observed)
    of_count = {name: jnp.zeros(3) for name in ("unobserved", "penalty", "prior", "mean", "scale")}
    known = support(observed, [3, 5, 8], [1.0, 1.0, 1.0])
    halved = known._replace(mask=np.array([[0.5, 0.5**0.5, 1.0]], np.float32))  # two, one and no place ago
    found = fading.adapt(params | of_count | {"half_life": jnp.zeros(())}, known, KEY)
    expected = plain.adapt(same | of_count, halved, KEY)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-6)


def test_the_item_side_gives_the_scores_of_predict(data, observed, jitted):
    strategy, params = made(jitted, data, observed)
    adapted = strategy.adapt(params, support(observed, [4, 6], [1.0, 0.0]), KEY)
    items = dict(observed.features)
    items["item_id"] = np.where(np.arange(len(data.items)) % 5 == 0, 0, items["item_id"])  # some are new
    whole = {name: table[None] for name, table in items.items()}
    expected = strategy.predict(params, adapted, whole)
    np.testing.assert_allclose(strategy.score(params, adapted, strategy.items(params, items)), expected, rtol=1e-5)


def test_a_new_item_is_scored_by_its_fields(data, observed, jitted):
    strategy, params = made(jitted, data, observed)
    tables = params["tables"]
    rows = data.items.encode([23])
    fresh = {name: np.asarray(table[rows])[None] for name, table in observed.features.items()}
    fresh["item_id"] = np.zeros((1, 1), np.int32)
    adapted = strategy.adapt(params, support(observed, [2, 4], [1.0, 1.0]), KEY)
    score = float(strategy.predict(params, adapted, fresh)[0, 0])
    columns = np.zeros(1 + 3)
    columns[[0, 1 + int(observed.features["item/kind"][rows[0]])]] = 1
    content = np.asarray(tables["fitted"]["content"], np.float64)
    own = columns @ content @ np.asarray(adapted.mean[0], np.float64)
    expected = own + float(adapted.popularity[0]) * float(tables["log_popularity"][0])
    np.testing.assert_allclose(score, expected, rtol=1e-4)
    # in the catalogue, an item that nobody chose is known by its fields, too
    np.testing.assert_allclose(tables["fitted"]["vectors"][rows[0]], columns @ content, rtol=1e-4, atol=1e-6)


def test_prior_and_content_are_ridge_regressions(data, observed, jitted):
    _, params = made(jitted, data, observed)
    fitted = params["tables"]["fitted"]
    matrix = observed.confidences()
    vectors = factorise.ials(matrix, RANK)

    def ridge(x, y, weight):
        """Penalty 30 but for the constant."""
        x, penalty = x.astype(np.float64), np.diag([1e-3, *np.full(x.shape[1] - 1, 30.0)])
        return np.linalg.solve((x.T * weight) @ x + penalty, (x.T * weight) @ y)

    def one_hot(codes):
        return np.concatenate([np.ones((len(codes), 1)), np.eye(3)[codes] * (codes > 0)[:, None]], 1)

    people, kinds = one_hot(observed.profile["group"]), one_hot(observed.features["item/kind"])
    mean = ridge(people, vectors.users, np.ones(len(people)))
    np.testing.assert_allclose(fitted["mean"], mean, rtol=1e-3, atol=1e-5)
    weight = np.asarray(matrix.sum(0)).ravel()
    np.testing.assert_allclose(fitted["content"], ridge(kinds, vectors.items, weight), rtol=1e-3, atol=1e-5)
    covariance = np.cov((vectors.users - people @ mean).T)
    covariance += (1e-6 + 1e-3 * np.trace(covariance) / RANK) * np.eye(RANK)
    np.testing.assert_allclose(fitted["precision"] @ covariance, np.eye(RANK), atol=1e-2)


def test_without_a_history_attributes_choose_the_items_of_the_users_group(data, observed, jitted):
    strategy, params = made(jitted, data, observed)
    params |= jax.tree.map(jnp.zeros_like, {name: x for name, x in params.items() if name != "tables"})
    nothing = [support(observed, [0], [0.0], user, mask=[0]) for user in (0, 1)]
    every = support(observed, data.items.encode(np.arange(ITEMS - 2).tolist()), np.zeros(ITEMS - 2)).features
    even, odd = (strategy.predict(params, strategy.adapt(params, own, KEY), every)[0] for own in nothing)
    assert np.mean(even[::2]) > np.mean(even[1::2])
    assert np.mean(odd[1::2]) > np.mean(odd[::2])


def test_bad_settings_are_refused(data):
    design, linear = (MODELS[name](fields_of(data)) for name in ("design", "linear"))
    for wrong in ({"rank": 0}, {"sweeps": 0}, {"penalty": -1.0}, {"unobserved": 0.0}):
        with pytest.raises(ValueError, match="need positive numbers"):
            mr.ials(design, **wrong)
    with pytest.raises(ValueError, match='model="design"'):
        mr.ials(linear)
