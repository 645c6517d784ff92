"""The cold-user protocol: who is split, how, and into what."""

import numpy as np
import pytest

from metarec_jax.data.simulation import synthetic
from metarec_jax.data.tables import from_tables
from metarec_jax.errors import DataError
from metarec_jax.tasks.batching import batches, bucket_sizes
from metarec_jax.tasks.splits import ColdUsers, Histories
from metarec_jax.tasks.target import Target

DATA = synthetic(users=300, items=60, ratings_per_user=(1, 50), seed=3)
COUNTS = np.bincount(DATA.user, minlength=len(DATA.users))
WINDOW = ColdUsers(minimum=13, maximum=30)


def users_of(split) -> list[set[int]]:
    return [set(part.users.tolist()) for part in split]


def test_exactly_the_users_inside_the_window_are_split():
    """Both bounds count: a user with `minimum` or with `maximum` interactions is in."""
    inside = {u for u in range(1, len(DATA.users)) if 13 <= (DATA.user == u).sum() <= 30}
    assert {13, 30} <= {COUNTS[u] for u in inside}
    assert set.union(*users_of(WINDOW.split(DATA))) == inside


@pytest.mark.parametrize("seed", range(5))
def test_no_user_is_in_two_parts(seed):
    split = WINDOW.split(DATA, seed)
    parts = users_of(split)
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(len(part) for part in split)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.5, 0.2, 0.3)])
def test_parts_are_as_large_as_their_fractions(fractions):
    split = ColdUsers(minimum=13, maximum=30, fractions=fractions).split(DATA)
    total = sum(len(part) for part in split)
    for part, fraction in zip(split, fractions, strict=True):
        assert abs(len(part) - fraction * total) <= 1


def test_the_default_protocol_is_the_published_one():
    assert ColdUsers() == ColdUsers(13, 100, 10, (0.8, 0.1, 0.1), "click", 4.0, "window")


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    one, same, other = (WINDOW.split(DATA, seed) for seed in (5, 5, 6))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.users, b.users)
        np.testing.assert_array_equal(a.index, b.index)
    assert users_of(one)[2] != users_of(other)[2]


def test_every_history_holds_all_interactions_of_its_user_once():
    for part in WINDOW.split(DATA):
        assert part.lengths.sum() == part.starts[-1] == len(part.index)
        for i, user in enumerate(part.users):
            own = part.index[part.starts[i] : part.starts[i + 1]]
            assert sorted(own.tolist()) == np.flatnonzero(DATA.user == user).tolist()


def test_queries_are_random_and_not_the_first_ratings():
    test = WINDOW.split(DATA).test
    assert any((np.diff(test.index[a:b]) < 0).any() for a, b in zip(test.starts[:-1], test.starts[1:], strict=True))


def test_train_on_all_adds_the_users_outside_the_window_to_training_only():
    window, everyone = (ColdUsers(minimum=13, maximum=30, train_on=which).split(DATA, 1) for which in ("window", "all"))
    outside = {u for u in range(1, len(DATA.users)) if 2 <= COUNTS[u] < 13 or COUNTS[u] > 30}
    assert outside
    assert users_of(everyone)[0] == users_of(window)[0] | outside
    assert users_of(everyone)[1:] == users_of(window)[1:]
    assert 1 in COUNTS[1:]  # a user with one rating has no task


def test_histories_of_chosen_users_keep_the_datasets_order():
    histories = Histories.of(DATA, np.array([7, 2, 7]))
    for i, user in enumerate([7, 2, 7]):
        own = histories.index[histories.starts[i] : histories.starts[i + 1]]
        assert own.tolist() == np.flatnonzero(DATA.user == user).tolist()


def test_shuffling_keeps_each_users_interactions_and_changes_their_order():
    histories = Histories.of(DATA, np.arange(1, 40))
    shuffled = histories.shuffled(np.random.default_rng(0))
    assert shuffled.index.tolist() != histories.index.tolist()
    for a, b in zip(histories.starts[:-1], histories.starts[1:], strict=True):
        assert sorted(shuffled.index[a:b]) == sorted(histories.index[a:b])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(0, 1, 5, None)])
def test_support_sets_of_several_sizes_are_nested_and_share_one_query(seed, sizes):
    test = WINDOW.split(DATA, seed).test
    taken: list[dict[int, tuple[list[int], list[int]]]] = []
    for size in sizes:
        found = {}
        for batch in batches(test, Target("rating"), support=size, batch_size=3, buckets=bucket_sizes(test.lengths)):
            for row, position in enumerate(batch.positions):
                query, support = (
                    part.features["item_id"][row][part.mask[row] > 0].tolist()
                    for part in (batch.task.query, batch.task.support)
                )
                found[int(test.users[position])] = query, support
        taken.append(found)
    for user, (query, whole) in taken[-1].items():
        assert len(query) == 10
        assert sorted(query + whole) == sorted(DATA.item[DATA.user == user].tolist())  # each used once
        for size, found in zip(sizes, taken, strict=True):
            assert found[user] == (query, whole[:size])


@pytest.mark.parametrize(
    "settings",
    [
        {"query": 0},
        {"query": 13},
        {"minimum": 10},
        {"minimum": 50, "maximum": 49},
        {"fractions": (0.8, 0.1)},
        {"fractions": (0.8, 0.3, -0.1)},
        {"fractions": (0.8, 0.1, 0.2)},
        {"fractions": (float("nan"), 0.1, 0.1)},
        {"target": "clicks"},
        {"train_on": "everyone"},
    ],
)
def test_impossible_settings_are_refused_and_name_what_was_given(settings):
    with pytest.raises(ValueError, match="|".join(settings)) as caught:
        ColdUsers(**settings)
    assert not isinstance(caught.value, DataError)


def test_too_few_users_are_told_with_the_way_out():
    few = synthetic(users=4, items=60, ratings_per_user=(20, 20))
    with pytest.raises(DataError, match=r"4 users have 13 to 100 .*ColdUsers\(minimum="):
        ColdUsers().split(few)


def test_users_with_fewer_ratings_than_the_query_size_are_told():
    table = {
        "user_id": np.repeat(np.arange(50), 9),
        "item_id": np.tile(np.arange(9), 50),
        "rating": np.ones(450),
    }
    with pytest.raises(DataError, match=r"0 users have .*needs more than the 10 interactions of a query"):
        ColdUsers(minimum=11).split(from_tables(table))
