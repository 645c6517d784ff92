"""Items as tasks: the exchanged dataset, and a whole run on it."""

import numpy as np

import metarec_jax as mr


def test_exchanging_twice_gives_back_the_interactions(synthetic):
    once, twice = mr.data.by_item(synthetic), mr.data.by_item(mr.data.by_item(synthetic))
    for name in ("user", "item", "rating", "timestamp", "order", "truth"):
        np.testing.assert_array_equal(getattr(twice, name), getattr(synthetic, name))
    assert (twice.users, twice.items) == (synthetic.users, synthetic.items)
    np.testing.assert_array_equal(once.truth[once.user, once.item], synthetic.truth[synthetic.user, synthetic.item])


def test_an_items_attributes_are_its_tasks_own(synthetic):
    data = mr.data.by_item(synthetic)
    rows = np.array([3, 7])
    found = mr.tasks.features(data, rows, np.ones((2, 4), int))
    np.testing.assert_array_equal(found["user/genre"], np.repeat(synthetic.item_features["genre"][rows, None], 4, 1))
    assert set(mr.models.fields_of(data)) == {"item_id", "user/genre"}


def test_the_statistics_of_its_items_are_those_of_users(synthetic):
    data = mr.data.by_item(synthetic)
    train = mr.ColdUsers(minimum=12, query=4).split(data, 0).train
    target = mr.tasks.Target("rating", mean=3.5)
    found = mr.tasks.ItemStatistics.fit(train, target)
    known = np.isin(synthetic.item, train.users)
    for user in (1, 50):
        values = synthetic.rating[known & (synthetic.user == user)] - 3.5
        assert found.count[user] == len(values)
        np.testing.assert_allclose(found.total[user], (values - found.mean).sum(), rtol=1e-4, atol=1e-4)


def test_cold_items_are_evaluated_without_any_support(synthetic):
    protocol = mr.ColdUsers(minimum=12, query=4, target="rating", fractions=(0.6, 0.2, 0.2))
    recommender = mr.train(mr.data.by_item(synthetic), "metaemb", protocol=protocol, progress=False, epochs=2)
    results = [recommender.evaluate(support=n) for n in (0, 4)]
    assert all(np.isfinite(row["rmse"]) for table in results for row in table.values())
    assert all(results[0][learner] != results[1][learner] for learner in results[0])
    assert recommender.recommend([], k=3, user={"genre": "genre 1"})
