"""Draws from the posterior have its mean and its deviation, and a user's draw depends on that user's key alone."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.inference.predictor import Predictor
from metarec_jax.strategies.catalogue import score

DRAWS = 4000
DATA = mr.data.synthetic(users=100, items=60)
NOISE = {  # variance of the noise, which the deviation holds and a draw does not
    "ials": lambda params: 0.0,
    "stack": lambda params: 0.0,
    "als": lambda params: params["tables"]["fitted"]["noise"],
    "alpaca": lambda params: jnp.exp(2 * params["log_noise"]),
}
OPTIONS = {"ials": {"rank": 6, "sweeps": 1}, "stack": {"members": ["ials", "ease"], "options": [{"rank": 6}, {}]}}


SOME = [("ials", 3), ("als", 40), ("alpaca", 3)]


@pytest.mark.parametrize(
    ("name", "length"),
    [x if x in SOME else pytest.param(*x, marks=pytest.mark.grid) for x in product(NOISE, (3, 40))],
)
def test_draws_have_the_mean_and_the_deviation_of_the_posterior(name, length):
    objective = "ranking" if name in ("ials", "stack") else "rating"
    trained = mr.train(
        DATA, name, objective=objective, epochs=1, progress=False, buckets=1, ratings=None,
        strategy_options=OPTIONS.get(name), model_options={"width": 4} if name == "alpaca" else None,
    ).trained  # fmt: skip
    predictor = Predictor(trained)
    strategy, ranker = trained.strategy, predictor.ranker
    known = predictor.batch([predictor.person([(i, 3.0 + i % 3) for i in range(1, length + 1)])], None)
    rows = np.arange(1, 9)[None]

    def scores(adapted, users):
        many = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), users, 0), known)
        return score(strategy, ranker.params, ranker.tables, adapted, many, jnp.repeat(rows, users, 0))

    adapted = ranker.adapt(known)
    keys = jax.vmap(jax.random.key)(jnp.arange(DRAWS, dtype=jnp.uint32))
    copies = jax.tree.map(lambda x: jnp.repeat(x, DRAWS, 0), adapted)
    drawn = jax.jit(lambda strength: strategy.sample(ranker.params, copies, keys, strength))
    found = np.asarray(scores(drawn(1.0), DRAWS))
    features = {name: table[rows] for name, table in ranker.tables.items()}
    features["order"] = jnp.full(rows.shape, length, jnp.int32)
    features |= {f"user/{n}": jnp.repeat(jnp.asarray(x)[:, None], 8, 1) for n, x in known.user.items()}
    deviation = np.asarray(jax.jit(strategy.deviation)(ranker.params, adapted, features))[0]
    spread = np.sqrt(deviation**2 - np.asarray(NOISE[name](ranker.params)))
    mean = np.asarray(scores(adapted, 1))[0]
    assert np.abs(found.mean(0) - mean).max() < 5 * spread.max() / DRAWS**0.5
    np.testing.assert_allclose(found.std(0), spread, rtol=0.06)
    np.testing.assert_allclose(scores(drawn(0.0), DRAWS)[:2], [mean, mean], rtol=1e-4, atol=1e-5)
    twice = np.asarray(scores(drawn(2.0), DRAWS))
    np.testing.assert_allclose(twice - mean, 2 * (found - mean), rtol=1e-2, atol=1e-3)
    alone = jax.tree.map(lambda x: x[:1], copies)
    one = jax.jit(strategy.sample)(ranker.params, alone, keys[7:8], 1.0)
    np.testing.assert_allclose(scores(one, 1)[0], found[7], rtol=1e-3, atol=1e-4)
