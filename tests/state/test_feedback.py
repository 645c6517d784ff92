"""Feedback: what users do is kept, checked, and in the next recommendation."""

import time
from pathlib import Path

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.state.events import Stored
from metarec_jax.state.feedback import taste, worth


@pytest.fixture
def live(stocked, tmp_path):
    return stocked.with_users(tmp_path / "users.db")


def rated(user, item, value, at=None, name=None):
    return {"user": user, "item": item, "value": value, "time": at, "id": name}


def test_the_next_recommendation_reflects_an_event(live):
    assert live.recommend_to("ann", k=5) == live.recommend({}, k=5)
    assert live.update([rated("ann", 100, 5.0), rated("ann", 103, 1.0)]) == 2
    assert live.recommend_to("ann", k=5) == live.recommend({100: 5.0, 103: 1.0}, k=5)
    live.update([{"user": "ann", "item": 105, "kind": "click"}])
    assert live.recommend_to("ann", k=5) == live.recommend({100: 5.0, 103: 1.0, 105: 4.0}, k=5)
    live.update([{"user": "ann", "item": 107, "kind": "dismiss"}, {"user": "ann", "item": 109, "kind": "purchase"}])
    expected = live.recommend({100: 5.0, 103: 1.0, 105: 4.0, 107: 1.0, 109: 5.0}, k=50)
    assert live.recommend_to("ann", k=50) == expected
    assert 107 not in {r.item for r in expected}


def test_contradictions_the_later_one_counts_and_remove_takes_back(live):
    live.update([rated("ann", 100, 5.0, 10.0), rated("ann", 100, 1.0, 20.0), rated("ann", 101, 5.0, 5.0)])
    assert live.recommend_to("ann", k=5) == live.recommend([(101, 5.0), (100, 1.0)], k=5)
    live.update([mr.Event("ann", 100, "remove", time=30.0)])
    assert live.recommend_to("ann", k=5) == live.recommend({101: 5.0}, k=5)
    assert 100 in {r.item for r in live.recommend_to("ann", k=50)}


def test_attributes_alone_are_enough_and_context_of_users_is_checked(live):
    live.describe_user(1007, {"country": "de"})
    expected = live.batch.recommend([{}, {}], k=5, users=[{"country": "de"}, None])
    assert live.batch.recommend_to([1007, 1008], k=5) == expected
    with pytest.raises(mr.DataError, match="'age' is unknown to the model; it knows: country"):
        live.describe_user(1007, {"age": 3})
    with pytest.raises(mr.DataError, match="context 'device' is unknown"):
        live.recommend_to(1007, context={"device": "phone"})


@pytest.fixture(scope="module")
def by_device():
    """A rating recommender whose ratings are high on the phone and low on the TV; hours and tags are contexts too."""
    data, rng = mr.data.synthetic(users=100, items=40, seed=0), np.random.default_rng(0)
    device, tags = rng.choice(["phone", "tv"], len(data.rating)), np.array(["a", "b", "c"])
    rows = {
        "user_id": data.user, "item_id": data.item, "rating": np.where(device == "phone", 5.0, 1.0),
        "timestamp": data.timestamp, "device": device, "hour": rng.integers(24, size=len(device)),
        "tags": [list(rng.choice(tags, 2)) for _ in device],
    }  # fmt: skip
    data = mr.data.from_tables(rows, context=["device", "hour", "tags"])
    protocol = mr.ColdUsers(query=3, minimum=5)
    return mr.train(data, "ridge", "deepfm", protocol=protocol, epochs=1, progress=False, buckets=1)


def test_the_context_of_an_event_is_that_of_its_interaction_in_a_history(by_device, tmp_path):
    live = by_device.with_users(tmp_path / "users.db")
    contexts = [{"device": "phone", "hour": 8, "tags": ["a", "c"]}, {"device": "tv", "tags": "b"}, {}]
    history = [(i, v, c) for i, v, c in zip((1, 2, 3), (5.0, 1.0, 4.0), contexts, strict=True)]
    for who, order in (("ann", slice(None)), ("bob", slice(None, None, -1))):
        live.update([rated(who, i, v, 10.0 + i) | {"context": c} for i, v, c in history][order])
    live.update([rated("cat", i, v, 10.0 + i) for i, v, _ in history])
    expected = live.recommend(history, k=30)
    assert live.recommend_to("ann", k=30) == live.recommend_to("bob", k=30) == expected
    assert live.recommend_to("cat", k=30) == live.recommend([(i, v) for i, v, _ in history], k=30) != expected
    assert live.predict_for("ann", [7, 9]) == live.predict(history, [7, 9]) != live.predict_for("cat", [7, 9])
    assert live.explain("ann", 7).as_dict() == live.explain(history, 7).as_dict()
    live.update([rated("ann", 1, 5.0, 20.0) | {"context": {"device": np.str_("tv"), "hour": np.int64(9)}}])
    moved = [*history[1:], (1, 5.0, {"device": "tv", "hour": 9.0})]
    assert live.recommend_to("ann", k=30) == live.recommend(moved, k=30)


def test_the_contexts_of_the_dataset_and_of_the_store_are_one_history(by_device):
    live = by_device.with_users(":memory:")
    user, new = live.catalogue.users.ids[4].item(), {"device": "phone"}
    (before,) = live.batch.remembered([user])
    item = next(i for i in live.catalogue.items.ids.tolist() if live.stock.encode([i])[0] not in before.rows)
    live.update([rated(user, item, 5.0) | {"context": new}])
    (after,) = live.batch.remembered([user])
    field = live.catalogue.context_fields[0]
    np.testing.assert_array_equal(after.contexts["device"], [*before.contexts["device"], *field.encode(["phone"])])


def test_a_stored_context_that_the_present_model_does_not_know_is_unknown(by_device):
    live = by_device.with_users(":memory:")
    live.users.append([mr.Event("ann", 1, value=5.0, context={"place": "home", "device": "watch"})])
    assert live.recommend_to("ann", k=30) == live.recommend({1: 5.0}, k=30)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("phone", "event 0: context: expected a mapping, .field: value., got 'phone'"),
        ({"place": "home"}, "event 0: context 'place' is unknown to the model; it knows: device, hour, tags"),
        ({"device": "watch"}, "event 0: context 'device' has no category 'watch' in the training data"),
        ({"tags": ["a", "z"]}, "event 0: context 'tags' has no category 'z'"),
        ({"hour": "late"}, "event 0: context 'hour': .* holds 'late', which is no number"),
        ({"hour": float("inf")}, "event 0: context 'hour': .* is infinite"),
        ({"device": {1, 2}}, "event 0: context 'device': Object of type set is not JSON serializable"),
    ],
)
def test_a_bad_context_of_an_event_is_named_and_nothing_is_kept(by_device, context, message):
    live = by_device.with_users(":memory:")
    with pytest.raises(mr.DataError, match=message):
        live.update([rated("ann", 1, 5.0) | {"context": context}])
    assert live.users.size()["events"] == 0
    assert live.update([rated("ann", 1, 5.0) | {"context": {"device": None, "hour": float("nan")}}]) == 1


def test_a_model_without_contexts_takes_none(live):
    with pytest.raises(mr.DataError, match="event 0: context 'device' is unknown to the model; it knows: none"):
        live.update([rated("ann", 100, 5.0) | {"context": {"device": "phone"}}])


def test_unknown_users_and_items_are_taken_and_told_apart_later(live):
    live.update([rated("ann", 7, 5.0)])
    unknown = live.recommend_to("ann", k=5)
    for call in (
        lambda: live.recommend({7: 5.0}, k=5),
        lambda: live.batch.recommend([{7: 5.0}], k=5)[0],
    ):
        with pytest.warns(mr.UnknownItemWarning, match=r"1 of 1 items in the history are unknown to the model") as told:
            assert [r.item for r in call()] == [r.item for r in unknown]
        assert Path(told[0].filename).name == "test_feedback.py"
    more = live.add_items({"item_id": [7], "colour": ["red"]})
    assert more.recommend_to("ann", k=5) == more.recommend({7: 5.0}, k=5)
    assert 7 not in {r.item for r in more.recommend_to("ann", k=60)}


def test_later_events_weigh_more_as_documented(stocked, tmp_path):
    events = [Stored(1, "rating", 5.0, 0.0), Stored(2, "rating", 1.0, 100.0), Stored(3, "click", None, 300.0)]
    kept, ratings, weights = taste(events, (1.0, 5.0), 4.0, half_life=100.0)
    assert [event.item for event in kept] == [1, 2, 3]
    assert ratings.tolist() == [5.0, 1.0, 4.0]
    np.testing.assert_allclose(weights, [1 / 8, 1 / 4, 1])
    assert taste(events, (1.0, 5.0), 4.0, None)[2].tolist() == [1, 1, 1]
    assert taste([], (1.0, 5.0), 4.0, 100.0)[0] == []
    events = [rated("ann", 100, 1.0, 0.0), rated("ann", 102, 5.0, 1e6)]
    fading, even = (stocked.with_users(tmp_path / f"{h}.db", half_life=h) for h in (1e5, None))
    for recommender in (fading, even):
        recommender.update(events)
    score = {}
    for name, recommender in (("fading", fading), ("even", even), ("alone", None)):
        found = recommender.recommend_to("ann", k=50) if recommender else stocked.recommend({102: 5.0}, k=50)
        score[name] = next(r.score for r in found if r.item == 104)
    assert abs(score["fading"] - score["alone"]) < 0.2 * abs(score["even"] - score["alone"])
    with pytest.raises(ValueError, match="half_life must be"):
        stocked.with_users(tmp_path / "x.db", half_life=0.0)


def test_what_an_event_is_worth():
    assert [worth(k, None, (1.0, 5.0), 4.0) for k in ("click", "purchase", "dismiss")] == [4.0, 5.0, 1.0]
    assert worth("click", None, (0.0, 1.0), 1.0) == 1.0
    assert worth("click", None, (0.0, 1.0), 4.0) == 1.0


def test_events_with_an_id_count_once(live):
    events = [rated("ann", 100, 5.0, 10.0, "a"), rated("ann", 101, 4.0, 11.0, "b")]
    assert [live.update(events), live.update(events), live.update([rated("ann", 102, 4.0, 12.0, "b")])] == [2, 0, 0]


def test_ten_thousand_events_at_once(live):
    rng = np.random.default_rng(0)
    events = [
        mr.Event(int(u), int(i), "click", time=float(t))
        for t, (u, i) in enumerate(rng.integers(0, 40, (10_000, 2)) + 100)
    ]
    assert live.update(events) == 10_000
    assert len(live.batch.recommend_to(list(range(100, 140)), k=3)) == 40


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"user": "ann"}, "event 1: expected an Event or a mapping"),
        ({"user": "ann", "item": 1, "colour": 2}, "event 1: expected an Event or a mapping"),
        ("click", "event 1: expected an Event or a mapping"),
        (rated("ann", "x", 5.0), "event 1: item: ids of this model are of type int, got 'x'"),
        (rated(1.5, 100, 5.0), "event 1: user: an id is an integer or a string, got 1.5"),
        (rated("", 100, 5.0), "event 1: user: an id has 1 to 256 characters"),
        (rated(True, 100, 5.0), "an integer or a string, got True"),
        (rated(2**63, 100, 5.0), "beyond 64 bits"),
        (rated("ann", 100, None), "event 1: a rating has a value, nothing else has; got rating None"),
        ({"user": "ann", "item": 100, "kind": "click", "value": 1.0}, "nothing else has; got click 1.0"),
        ({"user": "ann", "item": 100, "kind": "like"}, "kind must be one of rating, click"),
        (rated("ann", 100, float("nan")), "event 1: the rating is nan; it must be a finite number"),
        (rated("ann", 100, 55.0), "event 1: the rating is 55.0, off the scale"),
        (rated("ann", 100, 5.0, 4e9 * 1000), "s in the future"),
        (rated("ann", 100, 5.0, float("inf")), "time must be seconds"),
        (rated("ann", 100, 5.0, -1.0), "time must be seconds"),
        (rated("ann", 100, 5.0, None, 7), "id must be a string"),
    ],
)
def test_bad_events_are_refused_and_none_of_their_call_is_kept(live, event, message):
    with pytest.raises(mr.DataError, match=message):
        live.update([rated("ann", 100, 5.0), event])
    assert live.users.size()["events"] == 0


def test_an_event_of_a_clock_that_is_a_little_ahead_is_taken(live):
    assert live.update([rated("ann", 100, 5.0, time.time() + 60)]) == 1


def test_a_user_is_forgotten(live):
    live.update([rated("ann", 100, 5.0), rated("ann", 101, 1.0)])
    live.describe_user("ann", {"country": "nl"})
    assert live.forget("ann") == 2
    assert live.recommend_to("ann", k=5) == live.recommend({}, k=5)
    assert live.users.size()["users"] == 0


def test_users_outlive_the_recommender(live, stocked, tmp_path):
    live.update([rated("ann", 100, 5.0)])
    before = live.recommend_to("ann", k=5)
    live.users.close()
    stocked.save(tmp_path / "model")
    assert mr.load(tmp_path / "model", users=tmp_path / "users.db").recommend_to("ann", k=5) == before


def test_arguments_are_checked(live):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        live.recommend_to("ann", colour="red")
    with pytest.raises(mr.DataError, match="user: an id is an integer or a string"):
        live.batch.recommend_to([1.5])
    with pytest.raises(mr.DataError, match=r"one id, got \[1, 2\]; several users: recommender.batch.recommend_to"):
        live.recommend_to([1, 2])
    with pytest.raises(mr.DataError, match="users: expected a list of ids, one per user, got 'ann'"):
        live.batch.recommend_to("ann")
    assert live.batch.recommend_to([], k=5) == live.batch.recommend([]) == []
    assert len(live.recommend_to("ann", k=5, where={"colour": "red"}, block=[100])) == 5
