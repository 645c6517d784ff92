"""Contexts: what was around an interaction stays with it, from the table to the batches and to a call."""

from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data.schema import fields_of
from metarec_jax.errors import DataError
from metarec_jax.models import MODELS
from metarec_jax.tasks import Histories, Target, batches


def table(users: int = 150, seed: int = 0) -> dict[str, np.ndarray]:
    """Ratings that are high on the phone and low on the TV; one in ten interactions is there twice."""
    data = mr.data.synthetic(users=users, items=45, seed=seed)
    rng = np.random.default_rng(seed)
    device = rng.choice(["phone", "tv"], len(data.rating))
    found = {
        "user_id": data.user, "item_id": data.item, "rating": np.where(device == "phone", 5.0, 1.0),
        "timestamp": data.timestamp, "device": device, "hour": rng.integers(24, size=len(device)),
    }  # fmt: skip
    again = rng.random(len(device)) < 0.1
    return {name: np.concatenate([column[again], column]) for name, column in found.items()}


def test_contexts_stay_with_their_interactions_through_cleaning_splits_and_batches():
    data = mr.data.from_tables(table(), context=["device", "hour"])
    phone = data.context_fields[0].vocabulary.encode(["phone"])[0]
    assert data.report["duplicates"] > 0
    np.testing.assert_array_equal(data.context_features["device"] == phone, data.rating == 5)
    train = mr.ColdUsers(query=3, minimum=5).split(data).train
    for batch in batches(train, Target("click"), query=3, buckets=(48,), rng=np.random.default_rng(0)):
        for part in batch.task:
            device, real = part.features["context/device"], part.mask > 0
            np.testing.assert_array_equal((device == phone)[real], part.target[real] == 1)
            assert (device[~real] == 0).all()
            assert (part.features["context/hour"][~real] == 0).all()
            assert part.features["context/hour"].shape == (*real.shape, 1)


def test_hidden_contexts_train_the_unknown_row():
    data = mr.data.from_tables(table(), context=["device"])
    histories = Histories.of(data, np.arange(1, len(data.users)))
    made = batches(histories, Target("click"), query=3, buckets=(48,), rng=np.random.default_rng(0), unknown=0.5)
    hidden = [(b.task.support.features["context/device"] == 0)[b.task.support.mask > 0] for b in made]
    assert np.concatenate(hidden).mean() == pytest.approx(0.5, abs=0.05)


def test_a_recommender_reads_the_context_of_the_call_and_survives_saving(tmp_path):
    data = mr.data.from_tables(table(), context=["device"])
    options = {"epochs": 4, "progress": False, "unknown": 0.1}
    trained = mr.train(data, "ridge", protocol=mr.ColdUsers(query=3, minimum=5), **options)
    history = {1: 5.0, 2: 1.0}
    scores = {d: trained.recommend(history, 5, context={"device": d}) for d in ("phone", "tv")}
    assert min(r.score for r in scores["phone"]) > max(r.score for r in scores["tv"])
    assert trained.recommend(history, 5, context={"device": "watch"}) == trained.recommend(history, 5)
    assert trained.recommend([(1, 5.0, {}), (2, 1.0, {})], 5) == trained.recommend(history, 5)
    by_device = [trained.recommend([(1, 5.0, {"device": d}), (2, 1.0, {"device": d})], 5) for d in ("phone", "tv")]
    assert by_device[0] != by_device[1]
    with pytest.raises(DataError, match="history: context 'place' is unknown to the model; it knows: device"):
        trained.recommend([(1, 5.0, {"place": "home"})])
    user = trained.split().test.users[0]
    own = np.flatnonzero(data.user == user)
    rows = zip(data.item[own], data.rating[own], data.context_features["device"][own], strict=True)
    devices = data.context_fields[0].vocabulary.ids
    told = [(data.items.ids[i - 1].item(), float(r), {"device": devices[c - 1].item()}) for i, r, c in rows]
    known, new = trained.recommend_to(data.users.ids[user - 1].item(), 5), trained.recommend(told, 5)
    np.testing.assert_allclose([r.score for r in known], [r.score for r in new], rtol=1e-4)
    batch = trained.batch.recommend([history, {}], 5, context={"device": "tv"})
    np.testing.assert_allclose([r.score for r in batch[0]], [r.score for r in scores["tv"]], rtol=1e-4)
    results = trained.evaluate(baselines=False)
    trained.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert loaded.recommend(history, 5, context={"device": "tv"}) == scores["tv"]
    assert loaded.evaluate(data, baselines=False) == results
    with pytest.raises(DataError, match="does not have"):
        loaded.evaluate(replace(data, context_fields=(), context_features={}))
    with pytest.raises(DataError, match="context 'place' is unknown"):
        trained.recommend(history, context={"place": "home"})


@pytest.fixture(scope="module")
def ranking():
    """A ranking by iALS with an ALS rater, of data with a context; neither reads it."""
    data = mr.data.from_tables(table(60), context=["device"])
    return mr.train(data, "ials", epochs=1, progress=False, buckets=1, strategy_options={"rank": 4, "sweeps": 1})


def test_a_strategy_that_ignores_contexts_says_so_once_a_call(ranking, tmp_path):
    live, context = ranking.with_users(":memory:"), {"device": "phone"}
    live.update([{"user": "ann", "item": 3, "value": 5.0, "context": context}])
    ranking.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    ranks, rates = "the strategy ials ignores the context .'device': 'phone'.", "the strategy als ignores the context"
    for call, message in (
        (lambda **c: live.recommend([3, 17], **c), ranks),
        (lambda **c: loaded.recommend([3, 17], **c), ranks),
        (lambda **c: live.recommend([3, 17], by="rating", **c), rates),
        (lambda **c: live.recommend([3, 17], by=0.5, **c), ranks),
        (lambda **c: live.recommend_to("ann", **c), ranks),
        (lambda **c: live.batch.recommend([[3], [17]] * 200, **c), ranks),
        (lambda **c: live.predict([3, 17], [5], **c), rates),
        (lambda **c: live.predict_for("ann", [5], **c), rates),
        (lambda **c: live.explain("ann", 5, **c), ranks),
        (lambda **c: live.recommend_all(3, **c), ranks),
    ):
        with pytest.warns(mr.IgnoredContextWarning, match=message) as told:
            found = call(context=context)
        assert len(told) == 1
        assert told[0].filename == __file__
        without = call()  # warnings are errors here: none without a context
        assert found.equals(without) if hasattr(found, "equals") else found == without or hasattr(found, "causes")
    for context in (None, {}):
        live.recommend([3], context=context)
    with pytest.raises(DataError, match="context 'place' is unknown"):
        live.recommend([3], context={"place": "home"})


IGNORING = ("ease", "transitions", "content", "item_knn")


@pytest.mark.parametrize(
    "strategy", ["softmax_ridge", "stack", *(pytest.param(n, marks=pytest.mark.grid) for n in IGNORING)]
)
def test_scores_change_with_the_context_where_it_is_read(strategy):
    data = mr.data.from_tables(table(60), context=["device"])
    predictor = mr.train(data, strategy, epochs=1, progress=False, buckets=1, ratings=None).predictor
    known = predictor.batch([predictor.person([1, 2])], None)
    phone, tv = (known._replace(context={"device": np.full(1, code, np.int32)}) for code in (1, 2))
    one, two = (predictor.ranker.top(each, 5).scores for each in (phone, tv))
    assert predictor.reads_context == (not np.allclose(one, two)) == (strategy == "softmax_ridge")


READING = [name for name in MODELS if name != "design"]  # it reads the fields of items and users alone
SOME = ("deepfm", "transformer")


@pytest.mark.parametrize("name", [n if n in SOME else pytest.param(n, marks=pytest.mark.grid) for n in READING])
def test_every_model_reads_contexts(name):
    data = mr.data.from_tables(table(30), context=["device", "hour"])
    assert {"context/device", "context/hour"} < set(fields_of(data))
    other = mr.data.by_item(data)
    assert other.context_features["device"] is data.context_features["device"]
    protocol = mr.ColdUsers(query=3, minimum=5)
    trained = mr.train(data, "ridge", name, protocol=protocol, epochs=1, progress=False, buckets=1)
    one, two = (trained.recommend({1: 5.0}, 1, context={"device": d})[0].score for d in ("phone", "tv"))
    assert np.isfinite([one, two]).all()
    assert trained.predictor.reads_context


@pytest.mark.parametrize("wrong", ["device", ["device", "device"], ["rating"]], ids=str)
def test_contexts_are_other_columns_each_once(wrong):
    with pytest.raises(DataError, match="context: give a list"):
        mr.data.from_tables(table(), context=wrong)
    with pytest.raises(DataError, match="'place' is missing"):
        mr.data.from_tables(table(), context=["place"])
