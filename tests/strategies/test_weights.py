"""What an example of a support weighs: against numpy, and a half-life in every closed-form learner that has one."""

import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.strategies.weights import example_weights, weigh
from metarec_jax.types import Examples


@pytest.mark.parametrize("half_life", [None, 2.0])
def test_weights_equal_the_formula(half_life):
    rng = np.random.default_rng(0)
    items = rng.integers(1, 9, (3, 4)).astype(np.int32)
    target = rng.choice([0.0, 0.5, 1.0], (3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 0.5, 1, 0], [0, 0, 0, 0]], np.float32)
    order = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    params = example_weights(9, half_life)
    params |= {"weight": jnp.asarray(rng.normal(size=9), jnp.float32), "dislike": jnp.float32(0.03)}
    if half_life is not None:
        params["half_life"] = jnp.float32(0.05)
    found = weigh(params, Examples({"item_id": items, "order": order}, target, mask), half_life)
    log_weight = np.asarray(params["weight"])[items] + (0.3 - 0.7) * (1 - target)
    if half_life is not None:
        age = (mask > 0).sum(1, keepdims=True) - 1 - order
        log_weight -= np.log(2) * np.maximum(age, 0) / half_life * np.exp(0.5)
    np.testing.assert_allclose(found, mask * np.exp(log_weight), rtol=1e-5)


def test_a_half_life_that_is_not_positive_is_refused():
    data = mr.data.synthetic(users=40, items=50, seed=0)
    for name in ("ials", "ease"):
        with pytest.raises(ValueError, match="half_life must be above 0"):
            mr.train(data, name, strategy_options={"half_life": 0.0})


def test_a_stack_whose_members_fade_prefers_what_follows_the_latest_items():
    """Users move from the items of one group, of four, to those of another."""
    rng, rows = np.random.default_rng(0), []
    for user in range(120):
        groups = rng.permutation(4)[:2]
        items = np.concatenate([g * 12 + rng.permutation(12)[:6] for g in groups])
        rows += [(user, int(item), place) for place, item in enumerate(items)]
    user, item, time = map(np.array, zip(*rows, strict=True))
    data = mr.data.from_tables({"user_id": user, "item_id": item, "timestamp": time})
    fading = {"members": ("ials", "ease"), "options": ({"half_life": 1.0, "rank": 8}, {"half_life": 1.0})}
    recommender = mr.train(data, protocol=mr.NextItem(), strategy_options=fading, epochs=3, progress=False, buckets=1)

    def of_second(history):
        return sum(12 <= found.item < 24 for found in recommender.recommend(history, k=8))

    assert of_second([0, 1, 2, 3, 12, 13, 14, 15]) >= 5
    assert of_second([12, 13, 14, 15, 0, 1, 2, 3]) <= 3
