"""Sequence learners that rank: every place of a history predicts what came next."""

from functools import partial

import jax
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.strategies.catalogue import adapt, score_shared, support_of
from metarec_jax.strategies.observed import tables
from metarec_jax.tasks.observed import observe
from metarec_jax.tasks.ranking import Known
from metarec_jax.training.build import build

ITEMS, LENGTH, USERS = 20, 10, 120


@pytest.fixture(scope="module")
def ordered():
    """Users who go from item i to i + 1, at times that tell the order."""
    items = (np.random.default_rng(0).integers(ITEMS, size=(USERS, 1)) + np.arange(LENGTH)) % ITEMS
    table = {
        "user_id": np.repeat(np.arange(USERS), LENGTH),
        "item_id": items.ravel(),
        "rating": np.ones(items.size),
        "timestamp": np.tile(np.arange(LENGTH) * 60, USERS),
    }
    return mr.data.from_tables(table)


@pytest.mark.parametrize("model", ["transformer", "hstu", "gru"])
def test_prefixes_are_what_adapting_to_each_prefix_gives(ordered, model):
    protocol = mr.NextItem()
    target = mr.tasks.Target.fit(protocol, protocol.split(ordered).train)
    strategy = build("in_context", {}, model, {"width": 8, "tied": True}, ordered, target)
    observed = observe(protocol.split(ordered).train, target)
    params = {**strategy.init(jax.random.key(0)), "tables": jax.device_put(tables(strategy, observed))}
    items, known = params["tables"]["items"], Known.blank(2, 5, (), ())
    known.items[:], known.target[:], known.weight[:] = [[3, 4, 5, 6, 7], [9, 2, 4, 0, 0]], 1, [[1] * 5, [1, 1, 1, 0, 0]]
    states = jax.tree.leaves(strategy.prefixes(params, support_of(items, known), None))
    for t in range(6):
        cut = known._replace(weight=known.weight * (np.arange(5) < t))
        for whole, own in zip(states, jax.tree.leaves(adapt(strategy, params, items, cut)), strict=True):
            if t <= 3:
                np.testing.assert_allclose(whole[:, t], own, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_allclose(whole[0, t], own[0], rtol=1e-4, atol=1e-5)


def test_it_learns_what_follows(ordered):
    options = {"model_options": {"width": 16, "tied": True}, "epochs": 20, "progress": False}
    trained = mr.train(ordered, "in_context", "transformer", protocol=mr.NextItem(), **options)
    found = trained.evaluate()
    assert found["in_context"]["ndcg@10"] > found["popularity"]["ndcg@10"] + 0.1


def test_a_trained_sequence_learner_is_a_member_of_a_stack(ordered):
    short = {"protocol": mr.NextItem(), "progress": False}
    trained = mr.train(
        ordered, "in_context", "transformer", model_options={"width": 16, "tied": True}, epochs=1, **short
    )
    member = mr.given(trained.strategy, trained.params)
    stack = partial(mr.stack, members=["transitions", member], options=[{"size": 20}, {}])
    stacked = mr.train(ordered, stack, "design", epochs=1, **short)
    assert stacked.params["members"] == [{}, {}]
    items = stacked.params["tables"]["items"]
    known = Known.blank(1, 3, (), ())
    known.items[:], known.target[:], known.weight[:] = [3, 4, 5], 1, 1
    alone = adapt(trained.strategy, trained.params, items, known)
    both = adapt(stacked.strategy, stacked.params, items, known)
    side, _ = stacked.strategy.items(stacked.params, items)
    expected = score_shared(trained.strategy, trained.params, alone, known, items)
    np.testing.assert_allclose(member.score({}, both[0][1], side[1]), expected, rtol=1e-5)
    (found,) = stacked.evaluate(baselines=False).values()
    assert found["ndcg@10"] > 0.5
