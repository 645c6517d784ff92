"""Item-kNN: the formula of its docstring in float64, its neighbours, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.collaborative import factorise
from metarec_jax.strategies.catalogue import adapt, score, score_shared
from metarec_jax.strategies.observed import tables
from metarec_jax.tasks.observed import observe
from metarec_jax.tasks.ranking import Known

DATA = mr.data.synthetic(users=60, items=40)
MODEL = mr.models.design(mr.models.fields_of(DATA))


@pytest.fixture(scope="module")
def observed():
    split = mr.StrongGeneralisation(threshold=3.5).split(DATA, 0)
    return observe(split.train, mr.tasks.Target("ranking", 3.5, levels=(1.0, 2.0, 3.0, 4.0, 5.0)))


@pytest.mark.parametrize("neighbours", [40, 6])
def test_scores_are_weighted_sums_of_similarities(observed, neighbours):
    strategy = mr.item_knn(MODEL, neighbours=neighbours, shrink=5.0)
    params = {**strategy.init(jax.random.key(0)), "tables": jax.device_put(tables(strategy, observed))}
    params["weight"] = 0.1 * jnp.cos(jnp.arange(41.0))
    params |= {"scale": jnp.array([0.01, 0, 0]), "sharpness": jnp.array([-0.1, 0, 0])}
    params |= {"popularity": jnp.array([0.02, 0, 0]), "dislike": jnp.array(0.03)}
    known = Known.blank(2, 4, (), ())
    known.items[0, :3], known.target[0, :3], known.weight[0, :3] = [3, 7, 9], [1, 1, 0.25], 1
    items = params["tables"]["items"]
    adapted = adapt(strategy, params, items, known)
    found = score_shared(strategy, params, adapted, known, items)

    x = observed.confidences().toarray().astype(np.float64)
    norm = np.linalg.norm(x, axis=0)
    s = x.T @ x / (np.outer(norm, norm) + 5.0)
    s[np.diag_indices(41)] = 0
    s = np.where(s >= np.sort(s, axis=0)[-neighbours], s, 0)  # the nearest of each item, then of each row
    s = np.where(s >= np.sort(s, axis=1)[:, [-neighbours]], s, 0)
    label = np.array([1, 1, 0.25])
    weight = np.exp(np.asarray(params["weight"])[[3, 7, 9]] + (0.3 - 0.7) * (1 - label)) * label
    popular = factorise.log_popularity(observed.positives())
    wanted = 4 * np.exp(0.1) * np.log1p(30 * np.exp(-1.0) * weight @ s[[3, 7, 9]]) + (0.1 + 0.2) * popular
    np.testing.assert_allclose(found[0, 1:], wanted[1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], 0.3 * popular, rtol=1e-5)  # without a history
    rows = np.tile(np.arange(41, dtype=np.int32), (2, 1))
    np.testing.assert_allclose(score(strategy, params, items, adapted, known, rows), found, rtol=1e-5)


@pytest.mark.parametrize("options", [{"neighbours": 0}, {"shrink": -1.0}, {"half_life": 0.0}])
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"need neighbours|half_life must be"):
        mr.item_knn(MODEL, **options)
