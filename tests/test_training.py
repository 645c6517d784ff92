"""Training: which epoch is kept, when it stops, and that it is the same twice."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.data import ColdUsers, Target, synthetic
from metarec_jax.training import Fitted, fit


@pytest.fixture(scope="module")
def train() -> Any:
    data, protocol = synthetic(users=60, items=40, seed=0), ColdUsers(query=5)
    split = protocol.split(data)
    strategy = mr.ridge(mr.models.linear(mr.models.fields_of(data)), loss=optax.losses.sigmoid_binary_cross_entropy)
    return partial(fit, strategy, split, Target.fit(protocol, split.train), query=5)


def losses(fitted: Fitted) -> np.ndarray:
    return np.array([entry["log_loss"] for entry in fitted.history])


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("min_epochs", [None, 0, 5, 11, 40])
def test_what_is_kept_is_the_best_epoch_from_the_first_allowed_on(train, min_epochs):
    fitted = train(epochs=12, min_epochs=min_epochs, patience=100)
    first = min({None: 4}.get(min_epochs, min_epochs), 11)
    assert len(fitted.history) == 12
    assert fitted.epoch == first + losses(fitted)[first:].argmin()
    until = train(epochs=fitted.epoch + 1, min_epochs=fitted.epoch)  # whose last epoch is that one
    assert same(fitted.params, until.params)


def test_training_stops_when_validation_has_not_improved_for_the_patience(train):
    optimizer = optax.adam(0.3)  # overfits at once
    fitted = train(epochs=60, min_epochs=2, patience=3, optimizer=optimizer)
    assert len(fitted.history) == fitted.epoch + 4 < 60
    assert fitted.epoch == 2 + losses(fitted)[2:].argmin()


def test_the_same_seed_gives_the_same_parameters_and_another_does_not(train):
    one, two, other = train(epochs=2, seed=3), train(epochs=2, seed=3), train(epochs=2, seed=4)
    assert same(one.params, two.params)
    assert not same(one.params, other.params)


def test_a_loss_that_is_not_finite_stops_with_what_to_do(train):
    with pytest.raises(FloatingPointError, match="lower the outer learning rate"):
        train(epochs=3, optimizer=optax.scale(float("nan")))


def test_parameters_to_start_from_are_not_written_over(train):
    start = train(epochs=1).params
    before = jax.tree.map(np.array, start)
    train(epochs=1, params=start)
    assert same(start, before)
