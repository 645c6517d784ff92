"""Training: which epoch is kept, when it stops, and that it is the same twice."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.data import synthetic
from metarec_jax.tasks import ColdUsers, Target
from metarec_jax.training.loop import Fitted, fit


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


def test_a_killed_training_goes_on_as_if_nothing_had_been(train, tmp_path):
    options = {"epochs": 6, "min_epochs": 0, "patience": 100, "unknown": 0.2}
    whole, file = train(**options), tmp_path / "training.safetensors"

    class Killed(Exception):
        pass

    def killed(epoch: int, entry: dict[str, float]) -> None:
        if epoch == 3:
            raise Killed  # before that epoch is on the disk: it runs again

    with pytest.raises(Killed):
        train(checkpoint=file, report=killed, **options)
    seen: list[int] = []
    resumed = train(checkpoint=file, report=lambda epoch, _: seen.append(epoch), **options)
    assert seen == [3, 4, 5]
    assert resumed.history == whole.history
    assert resumed.epoch == whole.epoch
    assert same(resumed.params, whole.params)
    again = train(checkpoint=file, **options)  # nothing is left to do
    assert same(again.params, whole.params)
    longer = train(checkpoint=file, **options | {"epochs": 8})
    assert longer.history[:6] == whole.history
    assert len(longer.history) == 8


def test_a_checkpoint_of_another_training_is_refused(train, tmp_path):
    file = tmp_path / "training.safetensors"
    train(epochs=1, checkpoint=file)
    with pytest.raises(mr.ModelFileError, match="another seed"):
        train(epochs=2, checkpoint=file, seed=1)
    with pytest.raises(mr.ModelFileError, match="another strategy, model or optimiser"):
        train(epochs=2, checkpoint=file, optimizer=optax.sgd(0.1))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(mr.ModelFileError, match="damaged"):
        train(epochs=2, checkpoint=file)


def test_a_checkpoint_knows_its_strategy_and_its_data(tmp_path):
    data, options = mr.data.synthetic(users=60, items=40), {"objective": "click", "epochs": 1, "progress": False}
    mr.train(data, "ridge", checkpoint=tmp_path / "run", **options)
    with pytest.raises(mr.ModelFileError, match="another strategy"):
        mr.train(data, "ridge", strategy_options={"penalty": 9.0}, checkpoint=tmp_path / "run", **options)
    data.rating[0] = 3.25
    with pytest.raises(mr.ModelFileError, match="another data"):
        mr.train(data, "ridge", checkpoint=tmp_path / "run", **options)


def test_epochs_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    data, options = synthetic(users=60, items=40, seed=0), {"objective": "click", "epochs": 2, "progress": False}
    recommender = mr.train(data, "prototypes", tensorboard=tmp_path / "runs", **options)
    (file,) = (tmp_path / "runs").iterdir()
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):  # a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += length + 16
    for epoch, entry in enumerate(recommender.history):
        np.testing.assert_allclose(found["loss/train", epoch], entry["loss"], rtol=1e-6)
        np.testing.assert_allclose(found["validation/auc", epoch], entry["auc"], rtol=1e-6)
