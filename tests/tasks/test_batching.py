"""Batches: targets, padding, masks and shapes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.simulation import synthetic
from metarec_jax.data.tables import from_tables
from metarec_jax.tasks.batching import batches, bucket_sizes, features, pad_users
from metarec_jax.tasks.splits import ColdUsers, Histories
from metarec_jax.tasks.target import Target

CLICK = Target("click", 4.0)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Ragged histories of 1 to 12 ratings; fields of every kind; a rating is 100 u + i."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(1, 24), 1 + np.arange(23) % 12)
    item = np.concatenate([rng.permutation(15)[:n] + 1 for n in 1 + np.arange(23) % 12])
    return from_tables(
        {"user_id": user, "item_id": item, "rating": 100.0 * user + item},
        users={
            "user_id": np.arange(1, 24),
            "age": np.arange(23.0),
            "job": [f"job {i % 3}" for i in range(23)],
        },
        items={
            "item_id": np.arange(1, 16),
            "price": np.arange(15.0),
            "tags": [[f"t{j}" for j in range(i % 4)] for i in range(15)],
        },
    )


@pytest.fixture(scope="module")
def histories(data: Dataset) -> Histories:
    return Histories.of(data, np.arange(1, 24)[::-1])


RATING = Target("rating", mean=1200.0, scale=100.0)


# Targets


def test_a_rating_survives_encoding_and_decoding():
    data = synthetic(users=60, seed=1)
    train = ColdUsers(target="rating").split(data).train
    target = Target.fit(ColdUsers(target="rating"), train)
    encoded = target.encode(data.rating[train.index])
    assert encoded.dtype == np.float32
    np.testing.assert_allclose([encoded.mean(), encoded.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(target.decode(encoded), data.rating[train.index], rtol=1e-5)


def test_the_scale_comes_from_training_users_alone():
    data = synthetic(users=60, seed=1)
    split = ColdUsers(target="rating").split(data)
    own = np.concatenate([data.rating[data.user == u] for u in split.train.users]).astype(float)
    target = Target.fit(ColdUsers(target="rating"), split.train)
    np.testing.assert_allclose([target.mean, target.scale], [own.mean(), own.std()], rtol=1e-6)


def test_a_constant_rating_does_not_divide_by_zero():
    data = from_tables({"user_id": [1, 1, 2], "item_id": [1, 2, 1], "rating": [3, 3, 3]})
    target = Target.fit(ColdUsers(target="rating"), Histories.of(data, np.array([1, 2])))
    assert target.encode(data.rating).tolist() == [0, 0, 0]
    assert target.decode(np.zeros(1)).tolist() == [3]


def test_a_click_is_a_rating_of_at_least_the_threshold():
    assert Target("click", 3.5).encode(np.array([1, 3.49, 3.5, 5], np.float32)).tolist() == [0, 0, 1, 1]
    users = Histories.of(synthetic(users=5), np.array([1, 2, 3]))
    assert Target.fit(ColdUsers(threshold=3.0), users, graded=False) == Target("click", 3.0)


def test_a_graded_support_set_tells_how_much_an_item_was_liked():
    stars = {"user_id": [1] * 8, "item_id": np.arange(8), "rating": [1, 2, 3, 4, 5, 5, 3, 1]}
    users = Histories.of(from_tables(stars), np.array([1]))
    target = Target.fit(ColdUsers(), users)
    levels = np.unique(users.data.rating[users.index])
    assert target.levels == tuple(levels.tolist())
    grades = target.grade(np.array([levels[0], levels[1], levels[-1], levels[-1] + 1, -3]))
    expected = [0, (levels[1] - levels[0]) / (levels[-1] - levels[0]), 1, 1, 0]
    np.testing.assert_allclose(grades, expected, rtol=1e-6)
    (batch,) = batches(users, target, query=3, batch_size=1, buckets=(8,))
    rating = users.data.rating[users.index[users.starts[0] : users.starts[1]]]
    np.testing.assert_array_equal(batch.task.query.target[0], target.encode(rating[:3]))
    np.testing.assert_allclose(batch.task.support.target[0][: len(rating) - 3], target.grade(rating[3:]), rtol=1e-6)


def test_many_levels_are_thinned_and_two_are_plain_clicks(data):
    many = Target.fit(ColdUsers(threshold=1000.0), Histories.of(data, np.arange(1, 24)))  # a rating each
    assert len(many.levels) == 9
    assert (many.levels[0], many.levels[-1]) == (data.rating.min(), data.rating.max())
    clicks = from_tables({"user_id": [1, 1, 2], "item_id": [1, 2, 1], "rating": [0, 5, 5]})
    assert Target.fit(ColdUsers(), Histories.of(clicks, np.array([1, 2]))).levels is None


def test_click_scores_are_logits():
    logits = np.array([-1e4, -3.0, 0.0, 2.0, 1e4])
    with np.errstate(all="raise"):
        probability = CLICK.decode(logits)
    np.testing.assert_allclose(probability, [0, 1 / (1 + np.exp(3.0)), 0.5, 1 / (1 + np.exp(-2.0)), 1], atol=1e-12)


# Buckets


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([1, 4, 8]))
def test_bucket_sizes_waste_no_more_than_the_best_of_all_choices(lengths, count, multiple):
    def padded(buckets: tuple[int, ...]) -> float:
        return sum(min((b for b in buckets if b >= n), default=np.inf) for n in lengths)

    sizes = range(multiple, 60 + multiple, multiple)
    possible = sorted({-(-max(n, 1) // multiple) * multiple for n in lengths})
    best = min(padded(c) for k in range(1, count + 1) for c in itertools.combinations(possible, k))
    found = bucket_sizes(np.array(lengths), count, multiple)
    assert padded(found) == best
    assert len(found) <= count
    assert list(found) == sorted(set(found))
    assert set(found) <= set(sizes)


# Batches


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("query", "support", "size"), [(3, None, 4), (3, 2, 5), (10, None, 64), (1, 1, 1)])
def test_batches_cover_each_user_exactly_once(histories, seed, query, support, size):
    rng = None if seed is None else np.random.default_rng(seed)
    made = batches(histories, CLICK, query=query, support=support, batch_size=size, buckets=(4, 12), rng=rng)
    positions = np.concatenate([batch.positions for batch in made])
    assert sorted(positions.tolist()) == list(range(len(histories)))


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("query", "support"), [(3, None), (3, 2), (10, None), (1, 0)])
def test_every_task_holds_what_a_plain_loop_finds(data, histories, seed, query, support):
    """The rating says whose and of what it is: 100 user + item."""
    buckets, rng = (2, 5, 12), None if seed is None else np.random.default_rng(seed)
    for batch in batches(histories, RATING, query=query, support=support, batch_size=4, buckets=buckets, rng=rng):
        for row, position in enumerate(batch.positions):
            user = int(histories.users[position])
            own = data.item[data.user == user].tolist()
            taken = []
            for part in batch.task:
                kept = part.mask[row] > 0
                items = part.features["item_id"][row][kept]
                rating = np.rint(RATING.decode(part.target[row][kept].astype(float))).astype(int)
                assert rating.tolist() == (100 * user + items).tolist()
                taken.append(items.tolist())
            judged = min(query, len(own) - 1)
            left = len(own) - judged
            assert len(taken[1]) == judged
            assert len(taken[0]) == (left if support is None else min(support, left))
            assert set(taken[0] + taken[1]) <= set(own)
            assert len(set(taken[0] + taken[1])) == len(taken[0] + taken[1])
            if rng is None:
                assert taken[1] + taken[0] == own[: len(taken[0] + taken[1])]


def test_a_user_with_fewer_ratings_than_the_query_size_keeps_one_for_the_support(histories):
    (batch,) = batches(histories, CLICK, query=10, batch_size=len(histories), buckets=(12,))
    lengths = histories.lengths[batch.positions]
    assert lengths.min() == 1
    assert batch.task.support.mask.sum(1).tolist() == np.maximum(lengths - 10, 1).tolist()
    assert batch.task.query.mask.sum(1).tolist() == np.minimum(lengths - 1, 10).tolist()


def test_only_bucket_widths_occur_and_the_smallest_that_fits(histories):
    buckets = (2, 5, 12)
    shapes = set()
    for batch in batches(histories, CLICK, query=3, batch_size=4, buckets=buckets, rng=np.random.default_rng(0)):
        width = batch.task.support.mask.shape[1]
        longest = int(batch.task.support.mask.sum(1).max())
        assert width == min(b for b in buckets if b >= longest)
        shapes.add((batch.task.support.mask.shape, batch.task.query.mask.shape))
    assert shapes == {((4, b), (4, 3)) for b in buckets}


def test_a_user_with_more_than_the_largest_bucket_is_cut_to_it(histories):
    for batch in batches(histories, CLICK, query=3, batch_size=4, buckets=(2, 4)):
        wanted = np.minimum(np.maximum(histories.lengths[batch.positions] - 3, 1), 4)
        assert batch.task.support.mask[: len(batch.positions)].sum(1).tolist() == wanted.tolist()


@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_padding_is_zero_everywhere_and_masks_are_zero_or_one_with_the_ones_first(data, histories, unknown):
    made = batches(
        histories,
        RATING,
        query=3,
        batch_size=5,
        buckets=(4, 12),
        rng=np.random.default_rng(0),
        unknown=unknown,
    )
    for batch in made:
        for part in batch.task:
            assert set(np.unique(part.mask)) <= {0.0, 1.0}
            assert (np.diff(part.mask, axis=1) <= 0).all()
            padded = part.mask == 0
            assert not part.target[padded].any()
            assert not part.features["item_id"][padded].any()
            for name in data.item_features:
                assert not part.features[f"item/{name}"][padded].any()
            empty = np.arange(len(padded)) >= len(batch.positions)
            for x in (part.mask, part.target, *part.features.values()):
                assert not x[empty].any()
                assert len(x) == 5


def test_features_are_the_rows_of_the_tables(data, histories):
    for batch in batches(histories, CLICK, query=3, batch_size=4, buckets=(12,)):
        for part in batch.task:
            assert part.features.keys() == {"item_id", "item/price", "item/tags", "user/age", "user/job", "order"}
            assert {x.dtype.name for x in part.features.values()} == {"int32", "float32"}
            for row, position in enumerate(batch.positions):
                user = histories.users[position]
                for column in range(part.mask.shape[1]):
                    item = part.features["item_id"][row, column]
                    for name in ("price", "tags"):
                        assert (part.features[f"item/{name}"][row, column] == data.item_features[name][item]).all()
                    for name in ("age", "job"):
                        assert (part.features[f"user/{name}"][row, column] == data.user_features[name][user]).all()


def test_order_counts_the_users_earlier_interactions(data, histories):
    (batch,) = batches(histories, CLICK, query=3, batch_size=len(histories), buckets=(12,))
    for row, position in enumerate(batch.positions):
        orders = []
        for part in batch.task:
            for column in np.flatnonzero(part.mask[row]):
                item, order = part.features["item_id"][row, column], part.features["order"][row, column]
                mine = data.user == histories.users[position]
                (when,) = data.timestamp[mine & (data.item == item)]
                assert (data.timestamp[mine] < when).sum() <= order < (data.timestamp[mine] <= when).sum()
                orders.append(order)
        assert len(set(orders)) == len(orders)


def test_features_of_unknown_users_and_items_are_those_of_row_zero(data):
    found = features(data, np.array([0]), np.array([[0, 3]]))
    assert not found["user/age"].any()
    assert not found["user/job"].any()
    assert not found["item/tags"][0, 0].any()
    assert found["item/price"][0, 1] != 0


def test_the_same_generator_gives_the_same_batches_and_another_others(histories):
    def run(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        made = batches(histories, CLICK, query=3, batch_size=4, buckets=(4, 12), rng=rng, unknown=0.2)
        return [x for b in made for x in (b.positions, b.task.query.features["item_id"], b.task.support.mask)]

    one, same, other = run(1), run(1), run(2)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_a_generator_the_histories_order_stands(histories):
    made = list(batches(histories, CLICK, query=3, batch_size=4, buckets=(12,)))
    assert np.concatenate([b.positions for b in made]).tolist() == list(range(len(histories)))


def test_the_asked_share_of_identities_is_hidden_and_nothing_else():
    data = synthetic(users=300, items=80, seed=0)
    histories = Histories.of(data, np.arange(1, 301))
    made = batches(histories, RATING, batch_size=300, buckets=(40,), rng=np.random.default_rng(0), unknown=0.25)
    (batch,) = made
    hidden, real = 0, 0
    for part in batch.task:
        kept = part.mask > 0
        hidden += int((part.features["item_id"][kept] == 0).sum())
        real += int(kept.sum())
        assert (part.features["item/genre"][kept] > 0).all()
        assert (np.abs(RATING.decode(part.target[kept]) - 3.5) < 20).all()
    assert abs(hidden / real - 0.25) < 4 * np.sqrt(0.25 * 0.75 / real)


def test_the_asked_share_of_supports_is_cut_and_lengths_are_log_uniform():
    data = synthetic(users=600, items=60, ratings_per_user=(40, 40), seed=0)
    histories = Histories.of(data, np.arange(1, 601))
    sizes = np.concatenate(
        [
            batch.task.support.mask.sum(1)[: len(batch.positions)]
            for batch in batches(histories, CLICK, buckets=(30,), rng=np.random.default_rng(0), short=0.5)
        ]
    )
    assert sizes.min() >= 1
    assert (sizes == 30).mean() == pytest.approx(0.5, abs=0.06)
    cut = sizes[sizes < 30]  # P(n <= 5) = log 6 / log 31
    assert (cut <= 5).mean() == pytest.approx(np.log(6) / np.log(31), abs=0.07)
    (whole,) = batches(histories, CLICK, buckets=(30,), batch_size=600, short=0.5)
    assert (whole.task.support.mask.sum(1) == 30).all()  # nothing is random without a generator


def test_hiding_a_user_hides_its_attributes_in_support_and_query_alike(data, histories):
    rng = np.random.default_rng(0)
    (batch,) = batches(histories, CLICK, query=3, batch_size=23, buckets=(12,), rng=rng, unknown=0.5)
    hidden = (batch.task.query.features["user/job"] == 0).all(1)
    assert 0 < hidden.sum() < 23
    assert ((batch.task.support.features["user/job"] == 0).all(1) == hidden).all()
    assert not batch.task.support.features["user/age"][hidden].any()


def test_padding_users_leaves_a_full_batch_alone(histories):
    (batch,) = batches(histories, CLICK, query=3, batch_size=len(histories), buckets=(12,))
    same = pad_users(batch.task, len(histories))
    more = pad_users(batch.task, len(histories) + 4)
    assert same.query.mask is batch.task.query.mask
    assert more.query.mask.shape == (len(histories) + 4, 3)
    np.testing.assert_array_equal(more.query.mask[: len(histories)], batch.task.query.mask)
    assert not more.query.mask[len(histories) :].any()


# Size


def test_six_widths_waste_less_than_a_fifth_on_the_lengths_of_movielens():
    # every 5 % quantile of the ratings of ML-100K's users with 13 to 100, of whom ten each are judged
    quantiles = [20, 20, 22, 23, 24, 26, 28, 30, 33, 35, 39, 42, 46, 50, 54, 58, 64, 69, 76, 86, 100]
    lengths = np.interp(np.linspace(0, 20, 466), np.arange(21), quantiles).astype(int) - 10
    widths = np.array(bucket_sizes(lengths, 6))
    places = widths[np.searchsorted(widths, lengths)].sum()
    assert 1 - lengths.sum() / places < 0.2


def test_a_user_with_a_million_interactions_is_one_task_of_the_usual_shape():
    many, again, others = 1_000_000, 200_000, 50
    item = np.concatenate([np.arange(many), np.arange(again), np.tile(np.arange(20), others)])
    user = np.repeat(np.arange(others + 1), [many + again] + [20] * others)
    data = from_tables({"user_id": user, "item_id": item, "rating": user * 1e7 + np.arange(len(user))})
    assert data.report["duplicates"] == again
    assert (data.rating[data.user == 1].astype(int) >= again).all()  # the later of two stays
    histories = Histories.of(data, np.arange(1, others + 2))
    made = list(batches(histories, CLICK, query=5, buckets=(16, 64), batch_size=32, rng=np.random.default_rng(0)))
    assert sorted(np.concatenate([b.positions for b in made]).tolist()) == list(range(others + 1))
    assert {b.task.support.mask.shape for b in made} == {(32, 16), (32, 64)}
    (longest,) = (b for b in made if 0 in b.positions)
    row = longest.positions.tolist().index(0)
    drawn = np.concatenate([part.features["item_id"][row][part.mask[row] > 0] for part in longest.task])
    assert len(set(drawn.tolist())) == 69


def test_noise_replaces_a_share_of_the_support_and_nothing_of_the_query(histories):
    target, options = Target("rating"), {"query": 3, "batch_size": 50, "buckets": (64,)}
    clean, noisy = (
        next(iter(batches(histories, target, rng=np.random.default_rng(0), noise=share, **options))).task
        for share in (0.0, 0.5)
    )
    levels = np.unique(histories.data.rating)
    real = noisy.support.mask > 0
    assert set(noisy.support.target[real]) <= set(levels.astype(np.float32))
    changed = (noisy.support.target != clean.support.target)[real].mean()
    assert 0.5 * (1 - 1 / len(levels)) - 0.15 < changed < 0.5 * (1 - 1 / len(levels)) + 0.15
    assert not noisy.support.target[~real].any()
    np.testing.assert_array_equal(noisy.query.target, clean.query.target)
