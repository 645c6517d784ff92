"""Explanations against adapting again, finite differences, and the sums that must come out."""

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.inference.explain import effects, rank_correlation
from metarec_jax.inference.predictor import EncodedUser
from metarec_jax.inference.ranker import _score

HISTORY = {100: 5.0, 102: 4.0, 103: 1.0, 110: 5.0}


def score_of(recommender, history, item, **options):
    return next(r.score for r in recommender.recommend(history, k=60, exclude_seen=False, **options) if r.item == item)


def test_effects_are_what_recommending_without_each_interaction_gives(stocked):
    found = stocked.explain(HISTORY, 120, user={"country": "nl"})
    after = score_of(stocked, HISTORY, 120, user={"country": "nl"})
    np.testing.assert_allclose(
        [found.score, found.before], [after, score_of(stocked, {}, 120, user={"country": "nl"})], rtol=1e-4
    )
    for cause in found.causes:
        rest = {i: r for i, r in HISTORY.items() if i != cause.item}
        expected = after - score_of(stocked, rest, 120, user={"country": "nl"})
        np.testing.assert_allclose(cause.effect, expected, atol=2e-6)
        assert cause.rating == HISTORY[cause.item]
        assert cause.title == f"Thing {cause.item - 100}"
    assert [abs(c.effect) for c in found.causes] == sorted((abs(c.effect) for c in found.causes), reverse=True)


def test_slopes_are_derivatives_by_the_weights(stocked):
    ((row,), ranker) = stocked.stock.encode([120]), stocked.predictor.ranker
    known = stocked.predictor.batch(
        [EncodedUser(stocked.stock.encode(list(HISTORY)), np.array([5.0, 4, 1, 5]), np.ones(4), {}, {})], None
    )
    found = effects(ranker, known, int(row))
    for i in range(4):
        moved = []
        for change in (1.02, 0.98):
            weight = known.weight.copy()
            weight[0, i] = change
            other = known._replace(weight=weight)
            moved.append(float(ranker.scores(ranker.adapt(other), other, np.array([[row]], np.int32))[0, 0]))
        np.testing.assert_allclose(found.slopes[i], (moved[0] - moved[1]) / 0.04, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("strategy", ["alpaca", "cnp", "metaemb"])
def test_fields_add_up_to_the_score_beyond_an_unknown_item(strategy, stocked):
    trained = stocked
    if strategy != "alpaca":
        data = mr.data.synthetic(users=80, items=60, seed=0)
        trained = mr.train(data, strategy, objective="click", epochs=1, progress=False, buckets=1)
    items = trained.stock.trained.ids[:3].tolist()
    history = dict(zip(items[:2], (5.0, 1.0), strict=True))
    found = trained.explain(history, items[2])
    known = trained.predictor.batch(
        [EncodedUser(trained.stock.encode(items[:2]), np.array([5.0, 1.0]), np.ones(2), {}, {})], None
    )
    ranker = trained.predictor.ranker
    adapted = ranker.adapt(known)
    rows = np.array([[int(trained.stock.encode(items[2:])[0])]], np.int32)
    after = float(ranker.scores(adapted, known, rows)[0, 0])
    nothing = {name: np.zeros_like(table) for name, table in ranker.tables.items()}
    blank = known._replace(user={name: np.zeros_like(value) for name, value in known.user.items()})
    before = float(_score(ranker.strategy, ranker.params, nothing, adapted, blank, rows, False)[0][0, 0])
    np.testing.assert_allclose(sum(found.fields.values()), after - before, atol=0.01)  # relu has corners
    assert {"item_id", "item/training statistics"} <= set(found.fields)


def test_of_a_stored_user_of_nobody_and_of_one_item(stocked, tmp_path):
    live = stocked.with_users(tmp_path / "users.db")
    live.update([{"user": "ann", "item": i, "value": r} for i, r in HISTORY.items()])
    live.describe_user("ann", {"country": "de"})
    found = live.explain("ann", 120)
    expected = live.explain(HISTORY, 120, user={"country": "de"})
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)
    nobody = live.explain("bob", 120)
    assert nobody.causes == []
    assert nobody.score == nobody.before
    assert np.isnan(nobody.agreement)
    assert nobody.as_dict()["agreement"] is None
    with pytest.raises(mr.DataError, match="item 7 is unknown"):
        live.explain("ann", 7)
    with pytest.raises(mr.DataError, match="describe_user"):
        live.explain("ann", 120, user={"country": "de"})


def test_events_whose_weight_has_faded_away_are_explained_too(stocked, tmp_path):
    live = stocked.with_users(tmp_path / "users.db", half_life=1.0)
    live.update([{"user": "ann", "item": i, "value": r, "time": 1e6 * t} for t, (i, r) in enumerate(HISTORY.items())])
    assert len(live.explain("ann", 120).causes) == len(HISTORY)


def test_an_unknown_item_of_the_history_has_an_effect_too(stocked):
    found = stocked.explain({100: 5.0, 10**9: 1.0}, 120)
    assert {c.item for c in found.causes} == {100, None}


def test_text_data_and_plot(stocked, tmp_path):
    found = stocked.explain(HISTORY, 120)
    text = str(found)
    assert text.startswith(f"Thing 20: {found.score:.2f}; {found.before:.2f} for someone who has done nothing yet.")
    assert f"{found.causes[0].effect:+.3f} because of" in text
    assert found.as_dict()["causes"][0] == found.causes[0]._asdict()
    found.plot(tmp_path / "why.png")
    found.plot(tmp_path / "why.svg")
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    assert "Thing 2" in (tmp_path / "why.svg").read_text() or "<svg" in (tmp_path / "why.svg").read_text()


def test_rank_correlation_shares_ranks_between_ties_and_is_none_of_constants():
    a, b = np.array([1.0, 2, 2, 4]), np.array([10.0, 30, 20, 40])  # ranks 1 2.5 2.5 4 and 1 3 2 4
    np.testing.assert_allclose(rank_correlation(a, b), 4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
