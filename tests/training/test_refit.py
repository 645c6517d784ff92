"""Refit: once the figures are known, train on everybody; what was the test set then tells nothing."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.tasks.splits import Split, everything
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.training.build import build
from metarec_jax.training.loop import fit

DATA = mr.data.synthetic(users=120, items=40, seed=2)
QUICK = {"progress": False, "epochs": 3, "buckets": 1}


@pytest.mark.parametrize(
    "protocol",
    [mr.StrongGeneralisation(), mr.NextItem(), mr.ColdUsers(query=3, minimum=5)],
    ids=lambda p: type(p).__name__,
)
def test_everything_is_what_the_parts_hold(protocol):
    split = protocol.split(DATA, 0)
    whole = everything(split)
    assert set(whole.users.tolist()) == {u for part in split for u in part.users.tolist()}
    assert len(whole.index) == len(np.unique(whole.index))
    assert set(whole.index.tolist()) >= {i for part in split for i in part.index.tolist()}
    assert whole.ordered == split.train.ordered
    if isinstance(protocol, mr.NextItem):
        assert set(whole.index.tolist()) == set(split.test.index.tolist())


@pytest.fixture(scope="module")
def recommender():
    return mr.train(DATA, "ials", **QUICK)


def test_refit_trains_on_all_users_up_to_the_best_epoch(recommender, tmp_path):
    whole = recommender.refit(progress=False)
    assert whole.trained.epoch == max(recommender.trained.epoch, 0)
    assert whole.history == recommender.history
    test = recommender.split().test
    chosen = test.index[test.starts[0] : test.starts[1]]
    history = DATA.items.decode(DATA.item[chosen][1:]).tolist()
    assert whole.recommend(history, k=5) != recommender.recommend(history, k=5)
    with pytest.raises(mr.OptionError, match="refitted on its test users too"):
        whole.evaluate()
    with pytest.raises(mr.OptionError, match="the recommender that train returned"):
        whole.refit()
    with pytest.raises(mr.OptionError, match="refitted on its test users too"):
        whole.rater.evaluate()
    whole.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert [r.item for r in loaded.recommend(history, k=5)] == [r.item for r in whole.recommend(history, k=5)]
    with pytest.raises(mr.OptionError, match="refitted on its test users too"):
        loaded.evaluate(DATA)


def test_a_refit_equals_a_training_on_the_same_users_for_as_many_epochs():
    options = {"rank": 4}
    trained = mr.train(DATA, "ials", strategy_options=options, ratings=None, **QUICK)
    options["rank"] = 8  # the caller's dict, changed since
    whole = trained.refit(progress=False).trained
    split = trained.protocol.split(DATA, 0)
    everyone = everything(split)
    target = Target.fit(trained.protocol, everyone)
    statistics = ItemStatistics.fit(everyone, target)
    data = statistics.extend(DATA)
    split = Split(*(replace(part, data=data) for part in (everyone, split.validation, split.test)))
    built = build("ials", {"rank": 4}, "design", None, data, target)
    settings = {"query": trained.protocol.query, "statistics": statistics, "validate": False, "buckets": 1}
    expected = fit(built, split, target, epochs=trained.trained.epoch + 1, **settings)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(whole.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_a_checkpoint_of_the_refit_is_its_own(tmp_path):
    trained = mr.train(
        DATA, "ridge", objective="click", checkpoint=tmp_path / "c", protocol=mr.ColdUsers(query=3, minimum=5), **QUICK
    )
    trained.refit(progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "c.refit"}
