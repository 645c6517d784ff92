"""`reweight`: nothing but the weights is learned, they are saved, and errors cost less."""

import jax
import numpy as np
import pytest

import metarec_jax as mr


@pytest.fixture(scope="module")
def plain():
    data = mr.data.synthetic(users=80, items=40, seed=0)
    return mr.train(data, "ridge", objective="click", epochs=4, progress=False, buckets=1)


def test_the_recommender_itself_is_not_trained_and_its_weights_are_saved(plain, tmp_path):
    robust = mr.reweight(plain, epochs=2, progress=False)
    jax.tree.map(np.testing.assert_array_equal, robust.params["strategy"], plain.params)
    assert np.abs(robust.params["weight"][-1]["weight"]).max() > 0
    assert robust.recommend({1: 5.0, 2: 1.0}) != plain.recommend({1: 5.0, 2: 1.0})
    robust.save(tmp_path / "model")
    again = mr.load(tmp_path / "model")
    assert again.recommend({1: 5.0, 2: 1.0}) == robust.recommend({1: 5.0, 2: 1.0})
    with pytest.raises(ValueError, match="weighs its ratings already"):
        mr.reweight(again)


def test_the_loss_on_clean_queries_falls(plain):
    """The same draws of users and errors, with and without learning."""
    options = {"noise": 0.4, "epochs": 12, "progress": False}
    without, learned = (mr.reweight(plain, learning_rate=rate, **options).history[-6:] for rate in (0.0, 0.02))
    assert np.mean([e["loss"] for e in learned]) < np.mean([e["loss"] for e in without])


def test_a_strategy_that_no_gradient_of_weights_reaches_is_named():
    data = mr.data.synthetic(users=60, items=40, seed=0)
    options = {"objective": "click", "epochs": 1, "progress": False, "strategy_options": {"steps": 1}}
    tuned = mr.train(data, "finetune_head", **options)
    with pytest.raises(ValueError, match="no gradient passes from a query"):
        mr.reweight(tuned, epochs=1, progress=False)


def test_what_cannot_be_is_refused(plain, tmp_path):
    for noise in (-0.1, 1.0):
        with pytest.raises(ValueError, match="noise is a share"):
            mr.reweight(plain, noise=noise)
    plain.save(tmp_path / "model")
    with pytest.raises(mr.DataError, match=r"reweight\(recommender, data\)"):
        mr.reweight(mr.load(tmp_path / "model"))
