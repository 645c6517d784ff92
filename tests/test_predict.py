"""Predict: how much a user would like given items, beside what the user would choose."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.serving import Service
from metarec_jax.tasks.protocols import ratings_of
from metarec_jax.training import loop as training

HISTORY = {3: 5.0, 17: 4.5, 42: 1.0}


@pytest.fixture(scope="module")
def recommender():
    data = mr.data.synthetic(users=120, items=60, noise=0.3)
    return mr.train(data, "ials", epochs=1, progress=False, buckets=1, strategy_options={"rank": 8, "sweeps": 2})


def with_rater(recommender, rater):
    return mr.Recommender(replace(recommender.trained, rater=rater))


def test_expected_ratings_follow_the_truth(recommender):
    data, test = recommender.catalogue, recommender.split(None, "").test
    errors, plain = [], []
    for user in test.users[:10]:
        mine = np.flatnonzero(data.user == user)
        known, asked = mine[:-5], mine[-5:]
        history = list(zip(data.items.decode(data.item[known]).tolist(), data.rating[known].tolist(), strict=True))
        values = np.array(recommender.predict(history, data.items.decode(data.item[asked]).tolist()))
        truth = data.truth[user, data.item[asked]]
        errors += np.abs(values - truth).tolist()
        plain += np.abs(data.rating.mean() - truth).tolist()
    assert np.mean(errors) < 0.7 * np.mean(plain)


def test_values_are_in_the_order_of_the_items_and_within_the_scale(recommender):
    items = [9, 5, 9, 30]
    values = recommender.predict(HISTORY, items)
    assert values[0] == values[2]
    np.testing.assert_allclose(values[1], recommender.predict(HISTORY, [5])[0], rtol=1e-5)
    low, high = recommender.rater.limits
    rated = recommender.catalogue.rating[recommender.rater.split().train.index]
    assert (low, high) == (rated.min(), rated.max())
    extreme = with_rater(recommender, replace(recommender.trained.rater, limits=(3.25, 3.75)))
    assert set(extreme.predict({}, list(range(1, 61)))) > {3.25, 3.75}
    several = recommender.batch.predict([HISTORY, {}], items)
    np.testing.assert_allclose(several[0], values, rtol=1e-5)
    np.testing.assert_allclose(several[1], recommender.predict([], items), rtol=1e-5)
    assert all(isinstance(value, float) for value in values)
    assert recommender.batch.predict([HISTORY, {}], []) == [[], []]
    with pytest.warns(mr.UnknownItemWarning):
        high, low = (recommender.predict({10**9: rating}, np.array([5])) for rating in (5.0, 1.0))
    assert high != low
    assert recommender.predict(HISTORY, []) == []


def test_users_and_items_are_scored_in_pieces_of_bounded_memory(recommender, monkeypatch):
    histories, items = [{i: 5.0, i + 1: 1.0} for i in range(1, 6)], list(range(1, 61)) * 2
    whole = recommender.batch.predict(histories, items)
    monkeypatch.setattr("metarec_jax.inference.predictor.USERS", 2)
    monkeypatch.setattr("metarec_jax.inference.predictor.CELLS", 2 * 50)
    np.testing.assert_allclose(recommender.batch.predict(histories, items), whole, rtol=1e-5)


def test_stored_users_are_predicted_as_their_histories_are(recommender):
    live = recommender.with_users(":memory:")
    live.update([{"user": "ann", "item": i, "kind": "rating", "value": r} for i, r in HISTORY.items()])
    np.testing.assert_allclose(live.predict_for("ann", [9, 5]), recommender.predict(HISTORY, [9, 5]), rtol=1e-5)
    ann, bob = live.batch.predict_for(["ann", "bob"], [9, 5])
    np.testing.assert_allclose([ann, bob], recommender.batch.predict([HISTORY, {}], [9, 5]), rtol=1e-5)
    assert live.batch.predict_for([], [9]) == []
    assert live.recommend_to("ann", by="rating") == recommender.recommend(HISTORY, by="rating")
    assert live.recommend_to("ann", by=0.3) == recommender.recommend(HISTORY, by=0.3)
    for wrong in ([1.5], 1.5, None):
        with pytest.raises(mr.DataError, match=r"user: (an id is|expected one id)"):
            live.predict_for(wrong, [9])


def test_by_rating_ranks_by_what_predict_says(recommender):
    best = recommender.recommend(HISTORY, k=10, by="rating", block=[9])
    values = recommender.predict(HISTORY, [r.item for r in best])
    np.testing.assert_allclose(values, [r.score for r in best], rtol=1e-4)
    assert values == sorted(values, reverse=True)
    assert not {r.item for r in best} & {3, 17, 42, 9}
    others = [i for i in range(1, 61) if i not in {3, 17, 42, 9}]
    assert min(values) >= np.sort(recommender.predict(HISTORY, others))[-10] - 1e-5  # the best of the whole catalogue


@pytest.mark.parametrize("by", ["rating", 0.0, 0.5])
def test_all_other_options_go_on_working(by, recommender):
    def items(**options):
        return [r.item for r in recommender.recommend(HISTORY, k=60, by=by, **options)]

    everything = items()
    assert len(everything) == 57
    genre = recommender.catalogue.titles
    scores = {r.item: r.score for r in recommender.recommend(HISTORY, k=60)}

    def in_order(candidates):
        """The candidates as they are ranked by hand: a share standardises both over the candidates."""
        if by == "rating":
            return [i for i in everything if i in candidates]
        score, rating = np.array([scores[i] for i in candidates]), np.array(recommender.predict(HISTORY, candidates))
        mixed = sum(w * (x - x.mean()) / x.std() for w, x in ((1 - by, score), (by, rating)))
        return [candidates[i] for i in np.argsort(-mixed, kind="stable")]

    assert everything == in_order(sorted(everything))
    comedies = items(where={"genre": "genre 1"})
    assert comedies == in_order([i for i in sorted(everything) if "genre 1" in genre[i]])
    assert items(only=[5, 9, 30]) == in_order([5, 9, 30])
    assert items(block=everything[:3]) == in_order(sorted(everything[3:]))
    assert set(items(exclude_seen=False)) == set(range(1, 61))
    diverse = [r.item for r in recommender.recommend(HISTORY, k=8, by=by, diversity=1.0)]
    assert diverse[0] == everything[0]
    assert len(set(diverse)) == 8
    assert diverse != everything[:8]
    several = recommender.batch.recommend([HISTORY, {}], k=5, by=by, where=[{"genre": "genre 1"}, {"genre": "genre 2"}])
    assert [r.item for r in several[0]] == comedies[:5]
    assert all("genre 2" in r.title for r in several[1])


def test_by_rating_knows_how_certain_it_is(recommender):
    best = recommender.recommend(HISTORY, k=5, by="rating", deviation=True)
    assert [r.item for r in best] == [r.item for r in recommender.recommend(HISTORY, k=5, by="rating")]
    assert all(0.1 < r.deviation < 3 for r in best)
    assert len(recommender.recommend(HISTORY, k=5, by="rating", explore="thompson")) == 5


def test_a_mix_lies_between(recommender):
    by_score = [r.item for r in recommender.recommend(HISTORY, k=60)]
    assert [r.item for r in recommender.recommend(HISTORY, k=60, by=0.0)] == by_score
    all_of_it = [r.item for r in recommender.recommend(HISTORY, k=60, by=1.0)]
    assert all_of_it == [r.item for r in recommender.recommend(HISTORY, k=60, by="rating")]
    scores = {r.item: r.score for r in recommender.recommend(HISTORY, k=60)}
    free = with_rater(recommender, replace(recommender.trained.rater, limits=(-9.0, 19.0)))  # a mix is not clipped
    both = np.array([list(scores.values()), free.predict(HISTORY, [*scores])])
    z = (both - both.mean(1, keepdims=True)) / both.std(1, keepdims=True)
    worth = 0.7 * z[0] + 0.3 * z[1]
    found = recommender.recommend(HISTORY, k=10, by=0.3)
    assert [r.item for r in found] == [[*scores][i] for i in np.argsort(-worth)[:10]]
    np.testing.assert_allclose([r.score for r in found], np.sort(worth)[::-1][:10], rtol=1e-3, atol=1e-4)


def test_a_mix_orders_the_best_by_score_alone():
    """Of 300 items the 100 best by score are candidates."""
    data = mr.data.synthetic(users=150, items=300)
    recommender = mr.train(data, "ease", epochs=1, progress=False, buckets=1)
    best = [r.item for r in recommender.recommend(HISTORY, k=100)]
    assert {r.item for r in recommender.recommend(HISTORY, k=10, by=1.0)} <= set(best)
    values = dict(zip(best, recommender.predict(HISTORY, best), strict=True))
    mixed = [values[r.item] for r in recommender.recommend(HISTORY, k=10, by=1.0)]
    assert mixed == sorted(values.values(), reverse=True)[:10]


@pytest.mark.parametrize(
    "protocol",
    [
        mr.StrongGeneralisation(dislikes=True, fold_ins=2),
        mr.NextItem(threshold=3.5),
        pytest.param(mr.NextItem(), marks=pytest.mark.grid),
        pytest.param(mr.ColdUsers(target="ranking"), marks=pytest.mark.grid),
        mr.TimeSplit(target="ranking", query=3),
        mr.Scenario(target="ranking", query=5, minimum=8),
    ],
)
def test_the_rater_is_trained_on_what_the_ranking_is_trained_on(protocol, recommender, tmp_path):
    data = mr.data.synthetic(users=120, items=60, noise=0.3)
    found = mr.train(data, "ease", epochs=1, progress=False, buckets=1, protocol=protocol)
    ranking, rating = found.split(), found.rater.split()
    size = protocol.query
    assert set(rating.train.users) == set(ranking.train.users)
    held_out = {
        index for part in (ranking.validation, ranking.test) for u in range(len(part))
        for index in part.index[part.starts[u] :][: size if part.queries is None else part.queries[u]].tolist()
    }  # fmt: skip
    assert not held_out & set(rating.train.index.tolist())
    assert set(ranking.train.index.tolist()) <= set(rating.train.index.tolist())
    assert not set(rating.train.index.tolist()) & set(rating.test.index[rating.test.starts[:-1]].tolist())
    table = found.rater.evaluate(baselines=False)
    assert np.isfinite(table["als"]["rmse"])
    found.save(tmp_path / "model")
    again = mr.load(tmp_path / "model").rater
    assert again.protocol == ratings_of(protocol)
    assert again.evaluate(data, baselines=False) == table


def test_next_ratings_come_after_all_that_is_known():
    data = mr.data.synthetic(users=60, items=40, seed=4)
    split = ratings_of(mr.NextItem(threshold=4)).split(data)
    judged = mr.NextItem(threshold=4).split(data)
    for part, other in zip(split[1:], judged[1:], strict=True):
        assert (part.users == other.users).all()
        for u in range(len(part)):
            query, *known = part.index[part.starts[u] : part.starts[u + 1]]
            assert query == other.index[other.starts[u]]
            own = (data.user == data.user[query]) & (data.order < data.order[query])
            assert sorted(known) == np.flatnonzero(own).tolist()
    assert (data.rating[split.train.index] < 4).any()


def test_another_strategy_can_predict(recommender, monkeypatch):
    monkeypatch.setitem(training.EPOCHS, "rating", 1)
    other = mr.train(recommender.catalogue, "ease", epochs=1, progress=False, buckets=1, ratings="ridge")
    assert other.trained.rater.recipe["strategy"]["name"] == "ridge"
    assert len(other.rater.history) == 1
    assert len(other.predict(HISTORY, [5, 9])) == 2


def test_saved_and_loaded_it_predicts_the_same(recommender, tmp_path):
    recommender.save(tmp_path / "model")
    again = mr.load(tmp_path / "model")
    np.testing.assert_allclose(again.predict(HISTORY, [5, 9]), recommender.predict(HISTORY, [5, 9]), rtol=1e-6)


def test_a_saved_rater_is_part_of_its_model(recommender, tmp_path):
    recommender.save(tmp_path / "model")
    version = mr.load(tmp_path / "model").version
    with_rater(recommender, None).save(tmp_path / "model")  # replaces the folder, the rater included
    alone = mr.load(tmp_path / "model")
    assert alone.rater is None
    assert alone.version != version
    assert not (tmp_path / "model" / "rater").exists()
    recommender.save(tmp_path / "model")
    assert mr.load(tmp_path / "model").version == version
    arrays = tmp_path / "model" / "rater" / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-3])
    with pytest.raises(mr.ModelFileError, match=r"rater.*damaged"):
        mr.load(tmp_path / "model")
    other = mr.train(recommender.catalogue, "als", objective="rating", seed=3, progress=False)
    shutil.rmtree(tmp_path / "model" / "rater")
    other.save(tmp_path / "model" / "rater")
    with pytest.raises(mr.ModelFileError, match=r"rater.*damaged"):
        mr.load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "rater")
    with pytest.raises(mr.ModelFileError, match=r"rater.*missing"):
        mr.load(tmp_path / "model")


def test_a_model_of_a_time_without_raters_loads(recommender, tmp_path):
    with_rater(recommender, None).save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    config = json.loads(file.read_text())
    assert config.pop("parts") == {}
    file.write_text(json.dumps(config))
    assert mr.load(tmp_path / "model").rater is None


def test_new_items_are_predicted_from_their_fields(recommender, tmp_path):
    more = recommender.add_items({"item_id": [1001, 1002], "genre": ["genre 1", None], "title": ["new", "newer"]})
    assert np.isfinite(more.predict(HISTORY, [1001, 1002, 5])).all()
    np.testing.assert_allclose(more.predict(HISTORY, [5]), recommender.predict(HISTORY, [5]), rtol=1e-6)
    assert {1001, 1002} <= {r.item for r in more.recommend(HISTORY, k=62, by="rating")}
    assert {1001, 1002} <= {r.item for r in more.recommend(HISTORY, k=62, by=0.5)}
    more.save(tmp_path / "model")
    again = mr.load(tmp_path / "model").predict(HISTORY, [1001])
    np.testing.assert_allclose(again, more.predict(HISTORY, [1001]), rtol=1e-6)


def test_of_clicks_it_is_the_probability():
    data = mr.data.synthetic(users=120, items=60)
    clicks = mr.train(data, "ridge", objective="click", epochs=1, progress=False, buckets=1)
    (found,) = clicks.predict(HISTORY, [5])
    (wanted,) = [r.score for r in clicks.recommend(HISTORY, k=60) if r.item == 5]
    assert found == pytest.approx(wanted, rel=1e-4)
    for by in ("rating", 0.5):
        with pytest.raises(ValueError, match="predicts clicks"):
            clicks.recommend(HISTORY, by=by)


def test_of_ratings_it_is_the_recommenders_own():
    data = mr.data.synthetic(users=120, items=60)
    recommender = mr.train(data, "als", objective="rating", progress=False)
    best = recommender.recommend(HISTORY, k=5)
    np.testing.assert_allclose(
        recommender.predict(HISTORY, [r.item for r in best]), np.clip([r.score for r in best], *recommender.limits),
        rtol=1e-5,
    )  # fmt: skip
    for by in ("rating", 0.5):
        assert [r.item for r in recommender.recommend(HISTORY, k=5, by=by)] == [r.item for r in best]


def test_data_without_ratings_have_no_rater():
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 8), np.concatenate([rng.permutation(30)[:8] for _ in range(60)])
    alone = mr.train(
        mr.data.from_tables({"user_id": users, "item_id": items}), "ease", epochs=1, progress=False, buckets=1
    )
    assert alone.rater is None
    for ask in (lambda: alone.predict([3], [5]), lambda: alone.recommend([3], by="rating"),
                lambda: alone.recommend([3], by=0.5), lambda: alone.predict_for("ann", [5])):  # fmt: skip
        with pytest.raises(ValueError, match="train on data with ratings"):
            ask()


def test_the_service_takes_by(recommender, tmp_path, monkeypatch):
    monkeypatch.setattr("metarec_jax.serving.warming.SIZES", ())
    recommender.save(tmp_path / "model")
    service, history = Service(tmp_path / "model"), [[i, r] for i, r in HISTORY.items()]
    asked = [
        {"history": history, "k": 4} | more for more in ({}, {"by": "rating"}, {"by": 0.5}, {"by": "luck"}, {"by": []})
    ]
    *answers, luck, typed = service.recommend(asked)
    for answer, by in zip(answers, ("score", "rating", 0.5), strict=True):
        expected = [r.item for r in recommender.recommend(HISTORY, k=4, by=by)]
        assert [item["item"] for item in answer["items"]] == expected
    assert "by is" in str(luck)
    assert "by: expected" in str(typed)


def test_bad_input_is_refused(recommender):
    with pytest.raises(mr.DataError, match="999 is unknown"):
        recommender.predict(HISTORY, [5, 999])
    for items in ("abc", 5, {5: 1.0}, None):
        with pytest.raises(mr.DataError, match="items: expected a list"):
            recommender.predict(HISTORY, items)
    with pytest.raises(mr.DataError, match="strings"):
        recommender.predict(HISTORY, ["5"])
    with pytest.raises(mr.DataError, match="off the scale"):
        recommender.predict({3: 500.0}, [5])
    with pytest.raises(mr.DataError, match="1 users for 2 histories"):
        recommender.batch.predict([{}, {}], [5], users=[{}])
    for by in ("luck", 1.5, -0.1, float("nan"), True, None):
        with pytest.raises(ValueError, match="by is"):
            recommender.recommend(HISTORY, by=by)
    with pytest.raises(ValueError, match="explore goes with"):
        recommender.recommend(HISTORY, by=0.5, explore="ucb")
    alone = mr.train(recommender.catalogue, "ease", epochs=1, progress=False, buckets=1, ratings=None)
    with pytest.raises(ValueError, match="not how much they like it"):
        alone.predict(HISTORY, [5])
    with pytest.raises(ValueError, match="ratings: 'luck'"):
        mr.train(recommender.catalogue, "ease", epochs=1, progress=False, buckets=1, ratings="luck")
