"""Refit: once the figures are known, train on everybody; what was the test set then tells nothing."""

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.tasks.splits import everything

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
    user = test.users[0]
    chosen = test.index[test.starts[0] : test.starts[1]]
    history = DATA.items.decode(DATA.item[chosen][1:]).tolist()
    assert whole.recommend(history, k=5) != recommender.recommend(history, k=5)
    assert DATA.users.ids[user - 1] in DATA.users.ids
    with pytest.raises(mr.OptionError, match="refitted on its test users too"):
        whole.evaluate()
    with pytest.raises(mr.OptionError, match="the recommender that train returned"):
        whole.refit()
    if whole.rater is not None:
        with pytest.raises(mr.OptionError, match="refitted on its test users too"):
            whole.rater.evaluate()
    whole.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert [r.item for r in loaded.recommend(history, k=5)] == [r.item for r in whole.recommend(history, k=5)]
    with pytest.raises(mr.OptionError, match="refitted on its test users too"):
        loaded.evaluate(DATA)


def test_a_refit_equals_a_training_on_the_same_users_for_as_many_epochs(recommender):
    """The parameters move on what the test users tell, and are those of the last epoch."""
    first, second = (recommender.refit(progress=False) for _ in range(2))
    np.testing.assert_allclose(
        [r.score for r in first.recommend([1, 2])], [r.score for r in second.recommend([1, 2])], rtol=1e-5
    )


def test_a_checkpoint_of_the_refit_is_its_own(tmp_path):
    trained = mr.train(
        DATA, "ridge", objective="click", checkpoint=tmp_path / "c", protocol=mr.ColdUsers(query=3, minimum=5), **QUICK
    )
    trained.refit(progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "c.refit"}
