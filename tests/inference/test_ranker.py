"""The best of the whole stock: against scoring everything and sorting, for every strategy and any tiling."""

import jax
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.inference import ranker as ranking
from metarec_jax.inference.predictor import Predictor
from metarec_jax.inference.ranker import Ranker, top_k
from metarec_jax.inference.rerank import diversify
from metarec_jax.inference.stock import Stock
from metarec_jax.tasks.ranking import Known

HISTORY = {100: 5.0, 102: 4.0, 103: 1.0}


def test_tiles_change_nothing(stocked, monkeypatch):
    monkeypatch.setattr(ranking, "STEP", 8)
    options = {"k": 20, "deviation": True, "where": {"price": (0.3, None)}, "block": [101]}
    whole = stocked.batch.recommend([HISTORY, {}], **options)
    monkeypatch.setattr(ranking, "BYTES", 1)
    ranking._programs.cache_clear()
    tiled = mr.Recommender(stocked.trained, Predictor(stocked.trained, stocked.stock))  # with nothing cached
    assert_same(tiled.batch.recommend([HISTORY, {}], **options), whole)
    (side,) = tiled.predictor.ranker._sides.values()
    assert side.programs.length == 8
    assert len(side.tiles[0]) == 7
    ranking._programs.cache_clear()


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [r.item for r in one] == [r.item for r in other]
        np.testing.assert_allclose([r.score for r in one], [r.score for r in other], rtol=1e-5)


def test_the_top_by_groups_is_the_top():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 500, size=(3, 64 * 64)).astype(np.float32)  # with ties
    for k in (1, 5, 16):
        value, place = top_k(values, k)
        expected = jax.lax.top_k(values, k)
        np.testing.assert_array_equal(value, expected[0])
        np.testing.assert_array_equal(np.take_along_axis(values, np.asarray(place), 1), value)


def test_filters_leave_only_what_they_say(stocked):
    stock, every = stocked.stock, 50
    red = {r.item for r in stocked.recommend({}, k=every, where={"colour": "red"})}
    assert red == {100 + i for i in range(50) if i % 3 == 0}
    tagged = {r.item for r in stocked.recommend({}, k=every, where={"tags": ["sale", "eco"]})}
    assert tagged == {100 + i for i in range(50) if {i % 3, (i // 3) % 3} & {1, 2}}
    field = next(f for f in stock.fields if f.name == "price")
    price = stock.features["price"][1:, 0] * field.scale[0] + field.mean[0]
    for low, high in ((0.5, 2.0), (None, 1.0), (1.0, None)):
        cheap = {r.item for r in stocked.recommend({}, k=every, where={"price": (low, high)})}
        assert cheap == set((100 + np.flatnonzero((price >= (low or 0)) & (price <= (high or np.inf)))).tolist())
    assert {r.item for r in stocked.recommend({}, k=every, only=[101, 105, 999], block=[105])} == {101}
    both = stocked.batch.recommend([{}, {}], k=every, where=[{"colour": "red"}, None])
    assert [len(found) for found in both] == [17, 50]
    assert {r.item for r in stocked.recommend(HISTORY, k=every)} == set(range(100, 150)) - set(HISTORY)
    assert {r.item for r in stocked.recommend(HISTORY, k=every, exclude_seen=False)} == set(range(100, 150))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"size": "L"}}, "'size' is no item field; the model knows: price, colour, tags"),
        ({"where": {"colour": "pink"}}, "no item has colour 'pink'"),
        ({"where": {"colour": (1, 2)}}, "'colour' holds categories"),
        ({"where": {"price": 3.0}}, "'price' holds numbers; give bounds"),
        ({"where": [{}, {}]}, "got 2 conditions for 1 users"),
        ({"diversity": 2.0}, "diversity is a share"),
        ({"explore": "greedy"}, "explore must be"),
        ({"k": 0}, "k must be a positive integer"),
        ({"explore": "thompson", "seed": [1, 2]}, "got 2 seeds for 1 users"),
        ({"explore": "thompson", "seed": 1.5}, "seed must be an integer"),
        ({"explore": "ucb", "strength": np.nan}, "strength must be a finite number"),
    ],
)
def test_bad_options_are_refused(stocked, options, message):
    with pytest.raises(ValueError, match=message):
        stocked.recommend(HISTORY, **options)


def test_uncertainty_and_exploration(stocked, synthetic):
    sure = stocked.recommend(HISTORY, k=5, deviation=True)
    assert all(r.deviation > 0 for r in sure)
    plain = stocked.recommend(HISTORY, k=50)
    assert [r.item for r in stocked.recommend(HISTORY, k=50, explore="ucb", strength=0.0)] == [r.item for r in plain]
    deviations = {r.item: r.deviation for r in stocked.recommend(HISTORY, k=50, deviation=True)}
    logit = {r.item: np.log(r.score / (1 - r.score)) for r in plain}
    ucb = [r.item for r in stocked.recommend(HISTORY, k=10, explore="ucb", strength=3.0)]
    assert ucb == sorted(logit, key=lambda i: -(logit[i] + 3 * deviations[i]))[:10]

    def drawn(histories, **options):
        lists = stocked.batch.recommend(histories, k=5, explore="thompson", **options)
        return [tuple(r.item for r in found) for found in lists]

    draws = [drawn([HISTORY], seed=s)[0] for s in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1
    assert len({drawn([HISTORY])[0] for _ in range(8)}) > 1  # a new draw in each call
    assert drawn([{}, HISTORY, HISTORY], seed=[2, 1, 3])[1:] == [draws[0], draws[3]]  # whoever else is in the batch
    shown = stocked.recommend(HISTORY, k=5, explore="thompson", deviation=True)
    scores = {r.item: r.score for r in plain}
    np.testing.assert_allclose([r.score for r in shown], [scores[r.item] for r in shown], rtol=1e-4)
    np.testing.assert_allclose([r.deviation for r in shown], [deviations[r.item] for r in shown], rtol=1e-4)
    options = {"objective": "click", "epochs": 1, "progress": False, "buckets": 1}
    other = mr.train(synthetic, "ridge", model_options={"width": 4}, **options)
    with pytest.raises(ValueError, match="does not know the deviation"):
        other.recommend({}, explore="ucb")


def test_diversity_takes_away_what_is_alike():
    vectors = np.array([[1, 0], [1, 0], [0, 1]], float)
    rows, scores = np.arange(3), np.array([0.9, 0.8, 0.1])
    assert diversify(rows, scores, vectors, 3, 0.0).tolist() == [0, 1, 2]
    assert diversify(rows, scores, vectors, 3, 0.6).tolist() == [0, 2, 1]
    assert diversify(rows, scores, vectors, 2, 1.0).tolist() == [0, 2]
    assert diversify(rows[:0], scores[:0], vectors, 2, 0.5).tolist() == []


def test_diversity_spreads_what_is_recommended(stocked):
    def alike(found):
        own = stocked.predictor._likeness[stocked.stock.encode([r.item for r in found])]
        return (own @ own.T)[np.triu_indices(len(own), 1)].mean()

    plain, spread = (stocked.recommend(HISTORY, k=8, diversity=d) for d in (0.0, 0.8))
    assert plain[0] == spread[0]
    assert alike(spread) < alike(plain)


def test_new_items_are_known_by_their_attributes_and_nothing_else_changes(stocked, tmp_path):
    before = stocked.recommend(HISTORY, k=50)
    new = {
        "item_id": [7, 3],
        "title": ["A", None],
        "colour": ["red", "blue"],
        "price": [1.0, None],
        "tags": [["eco"], []],
    }
    more = stocked.add_items(new)
    again = more.recommend(HISTORY, k=52)
    assert_same([[r for r in again if r.item not in (7, 3)]], [before])
    fresh = Ranker(more.strategy, more.params, more.stock, *more.predictor.ranker.fields)  # everything computed again
    known = Known.blank(1, 8, *fresh.fields)
    for one, other in zip(more.predictor.ranker.top(known, 20), fresh.top(known, 20), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {r.item: r.title for r in again}[7] == "A"
    assert {r.item: r.title for r in again}[3] is None
    assert more.recommend({7: 5.0}, k=3) != stocked.recommend({}, k=3)
    assert {r.item for r in more.recommend({}, k=60, where={"colour": "red"}, only=[7, 3])} == {7}
    more.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    assert loaded.recommend(HISTORY, k=52) == again
    assert len(stocked.stock) == 51


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"colour": ["red"]}, "need a column 'item_id'"),
        ({"item_id": [100]}, "row 0 holds 100, which is there already"),
        ({"item_id": [1, 1]}, "row 1 holds 1 for the second time"),
        ({"item_id": [1], "size": [3]}, "'size' is no item field"),
        ({"item_id": [1], "colour": ["red", "red"]}, "'colour' has 2 values, item_id 1"),
        ({"item_id": [1], "price": [np.inf]}, "row 0 is infinite"),
        ({"item_id": ["x"]}, "integers as ids"),
    ],
)
def test_new_items_that_cannot_be_are_refused(stocked, items, message):
    with pytest.raises(mr.DataError, match=message):
        stocked.add_items(items)


def test_a_history_of_any_length_is_taken_and_the_latest_count(stocked):
    rng = np.random.default_rng(0)
    long = [(10**6 + int(i), float(r)) for i, r in enumerate(rng.integers(1, 6, 3000))]
    with pytest.warns(mr.UnknownItemWarning, match="3,000 of 3,000 items"):
        whole = stocked.recommend(long, k=3)
    with pytest.warns(mr.UnknownItemWarning, match=r"\(1002488, 1002489, 1002490, \.\.\.\)"):
        assert whole == stocked.recommend(long[-512:], k=3)


@pytest.mark.parametrize("where", [None, {"colour": "red"}, [{"colour": "red"}, None, {"tags": "new"}]], ids=str)
def test_many_seen_and_blocked_items_are_left_out_as_few_are(stocked, monkeypatch, where):
    histories = [{100 + i: 4.0 for i in range(n)} for n in (30, 0, 3)]
    calls = (
        {"block": [140, 141]},
        {"block": [101, 101, 7], "exclude_seen": False},
        {"only": range(100, 140)},
        {"block": range(100, 148), "deviation": True},
    )
    few = [stocked.batch.recommend(histories, 50, where=where, **options) for options in calls]
    monkeypatch.setattr("metarec_jax.inference.predictor.SEEN", 2)
    for own, options in zip(few, calls, strict=True):
        for found, expected in zip(stocked.batch.recommend(histories, 50, where=where, **options), own, strict=True):
            assert {r.item for r in found} == {r.item for r in expected}
            np.testing.assert_allclose([r.score for r in found], [r.score for r in expected], rtol=1e-5)
    one = stocked.recommend(histories[0], 50, where={"colour": "red"})
    assert {r.item for r in one} == {100 + i for i in range(30, 50) if i % 3 == 0}


def test_few_programs_are_compiled_for_any_sizes(stocked):
    ranking._programs.cache_clear()
    recommender = mr.Recommender(stocked.trained, Predictor(stocked.trained, stocked.stock))
    for users in (1, 2, 3, 4, 9, 16):
        for length in (0, 1, 5, 8):
            recommender.batch.recommend([{100 + i: 5.0 for i in range(length)}] * users, k=5)
    (side,) = recommender.predictor.ranker._sides.values()
    assert side.programs.top._cache_size() == 3  # 1, 4 and 16 users


def test_nothing_is_compiled_again_for_another_store_a_loaded_model_or_new_items(stocked, tmp_path):
    stocked.save(tmp_path / "model")
    recommender = mr.Recommender(stocked.trained, Predictor(stocked.trained, stocked.stock))
    history = [HISTORY, {100: 4.0}]

    def work(recommender):
        recommender.batch.recommend(history, k=5)
        recommender.recommend(HISTORY, k=5, explore="ucb")

    def compiled():
        sides = [side.programs for side in recommender.predictor.ranker._sides.values()]
        functions = [ranking._adapt, *(f for p in sides for f in (p.top, p.tile) if hasattr(f, "_cache_size"))]
        return [f._cache_size() for f in functions], ranking._programs.cache_info().misses

    work(recommender)
    before = compiled()
    work(recommender.with_users(":memory:"))
    work(mr.load(tmp_path / "model"))
    more = recommender.add_items({"item_id": [7], "colour": ["red"]})
    work(more)
    work(more.add_items({"item_id": list(range(1000, 1100))}))
    assert compiled() == before


def test_tables_have_room_for_an_eighth_at_most():
    for rows in (1, 50, 256, 257, 1683, 20_033, 1_000_001):
        assert rows <= ranking.capacity(rows) <= rows * 9 / 8 + 256


def test_stock_encodes_and_decodes_old_and_new():
    data = mr.data.synthetic(users=30, items=40, seed=0)
    stock = Stock.of(data).add({"item_id": [900, 500]})
    rows = stock.encode([900, 1, 500, 77_777])
    assert rows.tolist() == [len(data.items), stock.trained.encode([1])[0], len(data.items) + 1, 0]
    assert stock.decode(rows[:3]).tolist() == [900, 1, 500]
    with pytest.raises(mr.DataError, match="row 0"):
        stock.decode([0])
