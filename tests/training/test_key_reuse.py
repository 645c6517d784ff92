"""Keys: no random key is used twice, from the initial parameters to the last step and to serving."""

import jax
import pytest

import metarec_jax as mr

DATA = mr.data.synthetic(users=40, items=40, seed=0)
QUICK = {"epochs": 2, "buckets": 1, "progress": False, "batch_size": 16}
COLD = mr.ColdUsers(query=3, minimum=5)


def _one_and_grid(first: str, others: str) -> list:
    return [first, *(pytest.param(name, marks=pytest.mark.grid) for name in others.split())]


@pytest.mark.parametrize("strategy", _one_and_grid("prototypes", "alpaca melu anp ensemble mwuf mamo cavia"))
def test_training_for_clicks_uses_each_key_once(strategy):
    with jax.debug_key_reuse(True):
        trained = mr.train(DATA, strategy, protocol=COLD, **QUICK)
        trained.recommend([3, 17], k=3)


@pytest.mark.parametrize("strategy", _one_and_grid("stack", "ridge in_context softmax_ridge"))
def test_training_for_rankings_uses_each_key_once(strategy):
    with jax.debug_key_reuse(True):
        trained = mr.train(DATA, strategy, ratings=None, **QUICK)
        trained.recommend([3, 17], k=3)
        if trained.strategy.sample is not None:
            trained.recommend([3, 17], k=3, explore="thompson")
