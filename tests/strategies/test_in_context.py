"""What distinguishes in-context adaptation: the support set is read, nothing is fitted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.types import History

LOSS = optax.losses.sigmoid_binary_cross_entropy


def test_the_adapted_values_are_the_support_set_and_the_score_is_the_models(task_batch, tiny_reading_model):
    task, key = task_batch(), jax.random.key(0)
    strategy = mr.in_context(tiny_reading_model, loss=LOSS)
    params = strategy.init(key)
    adapted = strategy.adapt(params, task.support, key)
    assert jax.tree.structure(adapted) == jax.tree.structure(((), task.support))
    history = History(task.query.features, task.support, jnp.full((5, 4), -1))
    expected = tiny_reading_model.apply(params["model"], history)
    np.testing.assert_array_equal(strategy.predict(params, adapted, task.query.features), expected)
    assert np.isclose(strategy.loss(params, task, key)[0], core.query_loss(expected, task.query, LOSS))


def test_dense_adds_the_loss_of_the_support_examples_read_without_themselves(task_batch, tiny_reading_model):
    task, key = task_batch(), jax.random.key(0)
    plain, dense = (mr.in_context(tiny_reading_model, loss=LOSS, dense=d) for d in (0.0, 0.5))
    params = plain.init(key)
    own = jnp.broadcast_to(jnp.arange(7), (5, 7))
    scores = tiny_reading_model.apply(params["model"], History(task.support.features, task.support, own))
    expected = plain.loss(params, task, key)[0] + 0.5 * core.query_loss(scores, task.support, LOSS)
    assert np.isclose(dense.loss(params, task, key)[0], expected)


def test_bad_arguments_are_refused(tiny_model, tiny_reading_model):
    with pytest.raises(ValueError, match="transformer"):
        mr.in_context(tiny_model)
    with pytest.raises(ValueError, match="dense"):
        mr.in_context(tiny_reading_model, dense=-1.0)
