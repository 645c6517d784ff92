"""Predict: how much a user would like given items, beside what the user would choose."""

import numpy as np
import pytest

import metarec_jax as mr

HISTORY = {3: 5.0, 17: 4.5, 42: 1.0}


@pytest.fixture(scope="module")
def recommender():
    data = mr.data.synthetic(users=120, items=60, noise=0.3)
    return mr.train(data, "ials", epochs=1, progress=False, strategy_options={"rank": 8, "sweeps": 2})


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
    assert all(low <= v <= high for v in values)
    several = recommender.predict([HISTORY, {}], items)
    np.testing.assert_allclose(several[0], values, rtol=1e-5)
    assert len(several[1]) == 4
    assert recommender.predict(HISTORY, []) == []


def test_by_rating_ranks_by_what_predict_says(recommender):
    best = recommender.recommend(HISTORY, k=10, by="rating", block=[9])
    values = recommender.predict(HISTORY, [r.item for r in best])
    np.testing.assert_allclose(values, np.clip([r.score for r in best], *recommender.rater.limits), rtol=1e-4)
    assert values == sorted(values, reverse=True)
    assert not {r.item for r in best} & {3, 17, 42, 9}


def test_a_mix_lies_between(recommender):
    by_score = [r.item for r in recommender.recommend(HISTORY, k=60)]
    assert [r.item for r in recommender.recommend(HISTORY, k=60, by=0.0)] == by_score
    all_of_it = [r.item for r in recommender.recommend(HISTORY, k=60, by=1.0)]
    assert all_of_it == [r.item for r in recommender.recommend(HISTORY, k=60, by="rating")]
    half = [r.item for r in recommender.recommend(HISTORY, k=10, by=0.5)]
    assert len(set(half)) == 10


def test_saved_and_loaded_it_predicts_the_same(recommender, tmp_path):
    recommender.save(tmp_path / "model")
    again = mr.load(tmp_path / "model")
    np.testing.assert_allclose(again.predict(HISTORY, [5, 9]), recommender.predict(HISTORY, [5, 9]), rtol=1e-6)


def test_new_items_are_predicted_from_their_fields(recommender):
    more = recommender.add_items({"item_id": [1001], "genre": ["genre 1"]})
    assert np.isfinite(more.predict(HISTORY, [1001])).all()


def test_of_clicks_it_is_the_probability():
    data = mr.data.synthetic(users=120, items=60)
    clicks = mr.train(data, "ridge", objective="click", epochs=1, progress=False)
    (found,) = clicks.predict(HISTORY, [5])
    (wanted,) = [r.score for r in clicks.recommend(HISTORY, k=60) if r.item == 5]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_bad_input_is_refused(recommender):
    with pytest.raises(mr.DataError, match="999 is unknown"):
        recommender.predict(HISTORY, [5, 999])
    with pytest.raises(ValueError, match="by is"):
        recommender.recommend(HISTORY, by="luck")
    with pytest.raises(ValueError, match="by is"):
        recommender.recommend(HISTORY, by=1.5)
    alone = mr.train(recommender.catalogue, "ease", epochs=1, progress=False, ratings=None)
    with pytest.raises(ValueError, match="not how much they like it"):
        alone.predict(HISTORY, [5])
    with pytest.raises(ValueError, match="ratings: 'luck'"):
        mr.train(recommender.catalogue, "ease", epochs=1, progress=False, ratings="luck")
