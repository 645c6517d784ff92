"""Data and settings at the edge of what can be ranked: a clear error or a list, and never NaN."""

from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.evaluation.holdout import adaptation_cost, evaluate_scores

QUICK = {"epochs": 1, "progress": False, "buckets": 1}
DATA = mr.data.synthetic(users=60, items=30, ratings_per_user=(10, 20), seed=3)
ITEMS = set(range(1, 31))
COLD = mr.ColdUsers(minimum=10, query=5, target="ranking")
SPLIT = COLD.split(DATA)


def rated(values, where=slice(None)):
    """The dataset with these ratings at these interactions."""
    rating = DATA.rating.copy()
    rating[where] = values
    return replace(DATA, rating=rating)


def assert_ranks(recommender, history, k=30):
    """A list of distinct, unseen items with finite scores, best first; returns it."""
    found = recommender.recommend(history, k=k)
    items, scores = [r.item for r in found], [r.score for r in found]
    seen = set(history)
    assert len(items) == len(set(items)) == min(k, 30 - len(seen & ITEMS))
    assert not set(items) & seen
    assert np.isfinite(scores).all()
    assert scores == sorted(scores, reverse=True)
    return items


def assert_finite(table):
    assert all(np.isfinite(value) for row in table.values() for value in row.values())


@pytest.fixture(scope="module")
def recommender():
    return mr.train(DATA, **QUICK)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (mr.StrongGeneralisation(), "0 of 40 users have 5 positives"),
        (mr.StrongGeneralisation(minimum=2), "0 of 40 users have 2 positives"),
        (mr.NextItem(), "none of 40 users has 3 positives, the most is 1"),
        (COLD, "0 users have 10 to 100 interactions"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_catalogue_of_one_item_cannot_be_split(protocol, message):
    data = mr.data.from_tables({"user_id": np.arange(40), "item_id": np.zeros(40, int)})
    with pytest.raises(mr.DataError, match=message):
        mr.train(data, protocol=protocol, **QUICK)


def test_a_catalogue_of_two_items_is_ranked():
    data = mr.data.from_tables({"user_id": np.repeat(np.arange(40), 2), "item_id": np.tile([7, 8], 40)})
    trained = mr.train(data, protocol=mr.StrongGeneralisation(minimum=2), **QUICK)
    assert [[r.item for r in found] for found in trained.batch.recommend([[7], [8], [7, 8]])] == [[8], [7], []]
    assert {r.item for r in trained.recommend([])} == {7, 8}
    assert_finite(trained.evaluate())


def test_who_has_seen_the_whole_catalogue_gets_an_empty_list(recommender):
    everything = dict.fromkeys(range(1, 31), 5.0)
    assert recommender.recommend(everything) == []
    assert recommender.batch.recommend([everything, {}], k=3)[0] == []
    assert len(recommender.recommend(everything, exclude_seen=False)) == 10
    assert_ranks(recommender, dict.fromkeys(range(1, 30), 5.0))


def test_a_history_of_dislikes_alone_is_ranked_without_these_items(recommender):
    assert_ranks(recommender, {1: 1.0, 2: 2.0, 3: 1.0})
    assert_ranks(recommender, dict.fromkeys(range(1, 29), 1.0))


def test_unknown_items_and_repeated_ones_are_taken(recommender):
    with pytest.warns(mr.UnknownItemWarning, match="2 of 2 items"):
        assert_ranks(recommender, {10**9: 5.0, 10**9 + 1: 1.0})
    found = recommender.recommend([(1, 5.0), (1, 1.0)], k=5)
    assert found == recommender.recommend({1: 1.0}, k=5)


@pytest.mark.parametrize(("value", "lowest"), [(1.0, 0.0), (3.0, 2.0)])
def test_ratings_that_are_all_the_same_are_positives(value, lowest):
    trained = mr.train(rated(value), **QUICK)
    assert trained.limits == (lowest, value)  # a dismissal is below what is positive
    assert np.isfinite([trained.history[0]["loss"], trained.history[0]["ndcg@100"]]).all()
    assert_ranks(trained, [1, 5])
    assert trained.recommend([1, 5]) == trained.recommend({1: value, 5: value})
    assert_ranks(trained, {1: lowest})
    assert_finite(trained.evaluate())


def test_ratings_without_a_positive_are_refused():
    with pytest.raises(mr.DataError, match="0 of 60 users have 5 positives"):
        mr.train(rated(np.minimum(DATA.rating, 3.5)), **QUICK)
    with pytest.raises(mr.DataError, match="so that none is positive"):
        mr.train(rated(1.0, SPLIT.train.index), protocol=COLD, **QUICK)


def test_an_item_without_a_positive_comes_late_and_is_finite():
    never = DATA.item == 7
    trained = mr.train(rated(1.0, never), **QUICK)
    for history in ({}, {1: 5.0}, {7: 5.0, 1: 5.0}, {7: 1.0}):
        found = assert_ranks(trained, history)
        assert 7 in history or found.index(7) >= 15
    assert_finite(trained.evaluate())


def test_a_sample_larger_than_the_catalogue_is_all_of_it(recommender):
    every = mr.train(DATA, objective=mr.Ranking(sample=10**6), **QUICK)
    assert every.history == recommender.history


def test_more_folds_than_users_are_taken():
    assert np.isfinite(mr.train(DATA, "ease", objective=mr.Ranking(folds=500), **QUICK).history[0]["loss"])


def without_a_positive_query(part, users):
    """The dataset where the query of some users of a part holds no positive."""
    return rated(1.0, np.concatenate([part.index[part.starts[u] : part.starts[u] + 5] for u in users]))


def test_some_users_without_a_positive_in_their_query_are_left_out_of_means():
    data = without_a_positive_query(SPLIT.validation, [0])
    data = replace(data, rating=np.minimum(data.rating, without_a_positive_query(SPLIT.test, [0]).rating))
    trained = mr.train(data, "ease", protocol=COLD, **QUICK)
    assert np.isfinite(trained.history[0]["ndcg@100"])
    assert np.isnan(trained.rankings(baselines=False)["ease"]["ndcg@100"]).tolist()[:2] == [True, False]
    assert_finite(trained.evaluate())


@pytest.mark.parametrize("part", ["validation", "test"])
def test_no_user_with_a_positive_in_the_query_is_an_error(part):
    users = getattr(SPLIT, part)
    data = without_a_positive_query(users, range(len(users)))
    with pytest.raises(mr.DataError, match="positive"):
        mr.train(data, "ease", protocol=COLD, **QUICK).evaluate()


def test_training_users_with_one_positive_each_are_an_error():
    data = rated(1.0)
    data.rating[np.unique(data.user, return_index=True)[1]] = 5.0
    with pytest.raises(mr.DataError, match="two positives"):
        mr.train(data, "ease", protocol=COLD, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nonsense"}, "objective is .*, got 'nonsense'"),
        ({"objective": 3}, "objective is .*, got 3"),
        ({"objective": "click", "protocol": mr.StrongGeneralisation()}, 'StrongGeneralisation .* objective="click"'),
        ({"objective": "rating", "protocol": mr.NextItem()}, 'NextItem .* objective="rating"'),
        ({"strategy": "ials", "model": "linear"}, 'model="design"'),
        ({"strategy": "als"}, 'objective="rating"'),
        ({"strategy": "nonsense"}, "'nonsense' is unknown; choose from .*stack"),
        ({"strategy_options": {"members": ["ease", "maml"]}}, "member 'maml' is unknown"),
        ({"strategy": "ease", "strategy_options": {"penalty": 0.0}}, "need penalty > 0"),
        ({"strategy": "ease", "strategy_options": {"memory": 1000}}, "ease over 30 items needs .* GB"),
        ({"strategy": "transitions", "strategy_options": {"memory": 1000}}, "transitions over 30 items needs .* GB"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mr.train(DATA, **QUICK, **options)


@pytest.mark.parametrize("name", mr.strategies.RANKING)
@pytest.mark.parametrize("objective", ["click", "rating"])
def test_strategies_that_rank_predict_neither_clicks_nor_ratings(name, objective):
    with pytest.raises(ValueError, match=f'cannot predict a {objective}: objective="ranking"'):
        mr.train(DATA, name, objective=objective, **QUICK)


def test_what_only_clicks_and_ratings_have_is_refused(recommender):
    with pytest.raises(ValueError, match=r"see rankings\(\)"):
        evaluate_scores(recommender.trained)
    with pytest.raises(ValueError, match="measured on clicks and ratings"):
        adaptation_cost(recommender.trained)
    with pytest.raises(mr.DataError, match="off the scale"):
        recommender.recommend({1: 500.0})
    with pytest.raises(mr.DataError, match="must be a finite number"):
        recommender.recommend({1: float("nan")})


def test_what_only_rankings_have_is_refused():
    clicks = mr.train(DATA, "ridge", protocol=mr.ColdUsers(minimum=10, query=5), **QUICK)
    with pytest.raises(ValueError, match='objective="ranking"'):
        clicks.rankings()
