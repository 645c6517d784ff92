"""Ranking protocols: held-out positives of unseen users, and the last positive of every user."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import metarec_jax as mr
from metarec_jax.data import from_tables, synthetic
from metarec_jax.errors import DataError
from metarec_jax.tasks import Histories
from metarec_jax.tasks.protocols import PROTOCOLS
from metarec_jax.tasks.ranking_protocols import positive

DATA = synthetic(users=200, items=60, ratings_per_user=(10, 40), seed=3)
LIKED = DATA.rating >= 4
ONLY = replace(DATA, rating=np.ones_like(DATA.rating))


def halves(histories: Histories, u: int) -> tuple[np.ndarray, np.ndarray]:
    """The query and the support of a task, as positions in the dataset."""
    own = histories.index[histories.starts[u] : histories.starts[u + 1]]
    return np.split(own, [histories.queries[u]])


def same(one, two) -> bool:
    return all(
        np.array_equal(a.users, b.users) and np.array_equal(a.index, b.index) for a, b in zip(one, two, strict=True)
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.integers(2, 8), st.integers(1, 3))
def test_queries_and_supports_are_disjoint_positives_of_users_never_trained_on(seed, held_out, minimum, fold_ins):
    split = mr.StrongGeneralisation(minimum=minimum, held_out=held_out, fold_ins=fold_ins).split(DATA, seed)
    users = [set(part.users.tolist()) for part in split]
    assert sum(map(len, users)) == len(set.union(*users))
    assert set.union(*users) == {u for u in range(1, len(DATA.users)) if (DATA.user[LIKED] == u).sum() >= minimum}
    for part in split[1:]:
        for u, user in enumerate(part.users):
            query, support = halves(part, u)
            positives = np.flatnonzero((DATA.user == user) & LIKED)
            assert sorted([*query, *support]) == positives.tolist()  # each once
            assert len(support) >= 1
            assert len(query) == min(max(1, round(held_out * len(positives))), len(positives) - 1)


def test_four_fifths_train_and_one_fifth_of_a_users_positives_is_held_out():
    split = mr.StrongGeneralisation().split(DATA)
    total = sum(map(len, split))
    assert [len(part) for part in split] == pytest.approx([0.8 * total, 0.1 * total, 0.1 * total], abs=1)
    for part in split[1:]:
        np.testing.assert_allclose(part.queries / part.lengths, 0.2, atol=0.5 / part.lengths.min())


def test_training_users_keep_all_their_interactions_in_random_order():
    train = mr.StrongGeneralisation().split(DATA).train
    assert train.queries is None
    assert not train.ordered
    owned = [train.index[a:b] for a, b in zip(train.starts[:-1], train.starts[1:], strict=True)]
    for user, own in zip(train.users, owned, strict=True):
        assert sorted(own) == np.flatnonzero(DATA.user == user).tolist()
    assert any((np.diff(own) < 0).any() for own in owned)


def test_where_all_ratings_are_the_same_every_interaction_is_positive():
    assert positive(ONLY, 4.0).all()
    assert positive(DATA, None).all()
    assert positive(DATA, 4.0).tolist() == (DATA.rating >= 4).tolist()
    test = mr.StrongGeneralisation().split(ONLY).test
    for user, length in zip(test.users, test.lengths, strict=True):
        assert length == (DATA.user == user).sum()
    assert len(mr.NextItem(threshold=4.0).split(ONLY).test) == len(DATA.users) - 1


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    protocol = mr.StrongGeneralisation(fold_ins=2, dislikes=True)
    assert same(protocol.split(DATA, 5), protocol.split(DATA, 5))
    one, other = protocol.split(DATA, 5), protocol.split(DATA, 6)
    assert set(one.test.users.tolist()) != set(other.test.users.tolist())


def test_a_held_out_user_has_several_independent_fold_ins():
    single, several = (mr.StrongGeneralisation(fold_ins=n).split(DATA, 1) for n in (1, 3))
    for part, repeated in zip(single[1:], several[1:], strict=True):
        assert repeated.users.tolist() == np.repeat(part.users, 3).tolist()
        queries = [sorted(halves(repeated, u)[0]) for u in range(len(repeated))]
        different = [queries[u] != queries[u + 1] for u in range(0, len(queries), 3)]
        assert np.mean(different) > 0.8
    assert several.train.users.tolist() == single.train.users.tolist()


def test_dislikes_follow_the_positives_and_change_nothing_else():
    plain, graded = (mr.StrongGeneralisation(dislikes=on, fold_ins=2).split(DATA, 2) for on in (False, True))
    for part, longer in zip(plain[1:], graded[1:], strict=True):
        np.testing.assert_array_equal(longer.queries, part.queries)
        orders = []
        for u, user in enumerate(part.users):
            (query, support), (same_query, known) = halves(part, u), halves(longer, u)
            np.testing.assert_array_equal(same_query, query)
            np.testing.assert_array_equal(known[: len(support)], support)
            others = known[len(support) :]
            assert sorted(others) == np.flatnonzero((DATA.user == user) & ~LIKED).tolist()
            orders.append((np.diff(others) < 0).any())
        assert any(orders)  # shuffled too
    assert same(plain[:1], graded[:1])


TINY = from_tables(
    {
        "user_id": ["a"] * 5 + ["b"] * 3 + ["c"] * 2,
        "item_id": [1, 2, 3, 4, 5, 2, 1, 3, 4, 5],
        "rating": [1.0, 5, 5, 4, 5, 4, 5, 4, 5, 5],
        "timestamp": [10, 30, 20, 30, 20, 7, 7, 7, 1, 2],  # a: items 1, 3, 5, 2, 4; b: 2, 1, 3
    }
)


def items(histories: Histories) -> dict[str, list[int]]:
    """Item ids of each user's history."""
    pieces = np.split(histories.data.items.ids[histories.data.item[histories.index] - 1], histories.starts[1:-1])
    names = histories.data.users.ids[histories.users - 1]
    return {str(name): own.tolist() for name, own in zip(names, pieces, strict=True)}


def test_the_next_item_is_the_last_in_time_and_rows_decide_ties():
    train, validation, test = mr.NextItem().split(TINY)
    assert items(test) == {"a": [4, 2, 5, 3, 1], "b": [3, 1, 2]}
    assert items(validation) == {"a": [2, 5, 3, 1], "b": [1, 2]}
    assert items(train) == {"a": [5, 3, 1], "b": [2]}
    assert validation.queries.tolist() == test.queries.tolist() == [1, 1]
    assert train.queries is None
    assert all(part.ordered for part in (train, validation, test))


def test_next_item_leaves_out_what_is_below_the_threshold_and_keeps_the_latest():
    assert items(mr.NextItem(threshold=4.0).split(TINY).test) == {"a": [4, 2, 5, 3], "b": [3, 1, 2]}
    assert items(mr.NextItem(threshold=5.0).split(TINY).test) == {"a": [2, 5, 3]}
    assert items(mr.NextItem(minimum=4).split(TINY).train) == {"a": [5, 3, 1]}
    short = mr.NextItem(maximum=2).split(TINY)
    assert [items(part) for part in short] == [
        {"a": [5, 3], "b": [2]},
        {"a": [2, 5], "b": [1, 2]},
        {"a": [4, 2], "b": [3, 1]},
    ]


def test_the_next_item_of_random_data_comes_after_all_else_whatever_the_seed():
    rng = np.random.default_rng(0)
    data = replace(DATA, timestamp=rng.integers(0, 20, len(DATA.rating)))
    split = mr.NextItem().split(data, 1)
    assert same(split, mr.NextItem().split(data, 2))
    for u, user in enumerate(split.test.users):
        order = sorted(np.flatnonzero(data.user == user), key=lambda i: (data.timestamp[i], i))[::-1]
        for part, since in zip(split, (2, 1, 0), strict=True):
            assert part.users[u] == user
            assert part.index[part.starts[u] : part.starts[u + 1]].tolist() == order[since:]


def test_taking_users_carries_their_query_sizes():
    test = mr.StrongGeneralisation(held_out=0.5).split(DATA).test
    positions = np.array([4, 0, 4])
    taken = test.take(positions)
    assert taken.queries.tolist() == test.queries[positions].tolist()
    for row, u in enumerate(positions):
        for one, two in zip(halves(taken, row), halves(test, u), strict=True):
            np.testing.assert_array_equal(one, two)
    assert test.take(positions, 2).queries.tolist() == [2, 2, 2]


def test_histories_with_query_sizes_cannot_be_reordered():
    test = mr.StrongGeneralisation().split(DATA).test
    for reorder in (test.latest_first, lambda: test.shuffled(np.random.default_rng(0))):
        with pytest.raises(ValueError, match="mix query and support; drop the counts"):
            reorder()
    assert len(replace(test, queries=None).latest_first()) == len(test)


def test_every_setting_is_in_the_hash_and_the_target_is_none():
    protocols = [
        mr.StrongGeneralisation(),
        *(
            replace(mr.StrongGeneralisation(), **change)
            for change in (
                {"threshold": 3.0},
                {"minimum": 6},
                {"held_out": 0.3},
                {"fractions": (0.6, 0.2, 0.2)},
                {"fold_ins": 2},
                {"dislikes": True},
            )
        ),
        mr.NextItem(),
        mr.NextItem(threshold=4.0),
        mr.NextItem(minimum=4),
        mr.NextItem(maximum=50),
    ]
    described = [mr.evaluation.describe(DATA, protocol, seeds=[0]) for protocol in protocols]
    assert len({each["hash"] for each in described}) == len(set(protocols)) == len(protocols)
    for protocol, each in zip(protocols, described, strict=True):
        assert protocol.target == "ranking"
        assert "target" not in each["settings"]
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in each["settings"].items()}
        assert PROTOCOLS[each["protocol"]](**stored) == protocol


@pytest.mark.parametrize("protocol", [mr.ColdUsers, mr.TimeSplit, mr.Scenario])
def test_the_other_protocols_rank_with_the_split_they_have(protocol):
    rng = np.random.default_rng(0)
    data = replace(DATA, timestamp=rng.integers(0, 2000, len(DATA.rating)))
    ranked, clicked = (protocol(target=target, query=3).split(data) for target in ("ranking", "click"))
    assert same(ranked, clicked)
    with pytest.raises(ValueError, match='"ranking"'):
        protocol(target="rank")


@pytest.mark.parametrize(
    ("protocol", "setting"),
    [
        (mr.StrongGeneralisation, {"minimum": 1}),
        (mr.StrongGeneralisation, {"held_out": 0.0}),
        (mr.StrongGeneralisation, {"held_out": 1.0}),
        (mr.StrongGeneralisation, {"held_out": float("nan")}),
        (mr.StrongGeneralisation, {"fold_ins": 0}),
        (mr.StrongGeneralisation, {"fractions": (0.8, 0.1, 0.2)}),
        (mr.NextItem, {"minimum": 2}),
        (mr.NextItem, {"maximum": 1}),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_and_name_what_was_given(protocol, setting):
    with pytest.raises(ValueError, match="|".join(setting)) as caught:
        protocol(**setting)
    assert not isinstance(caught.value, DataError)


def test_too_few_users_are_told_with_the_way_out():
    with pytest.raises(DataError, match=r"2 of 3 users have 3 positives .*StrongGeneralisation\(threshold="):
        mr.StrongGeneralisation(minimum=3).split(TINY)
    with pytest.raises(DataError, match=r"none of 3 users has 9 positives, the most is 4; .*NextItem\(threshold="):
        mr.NextItem(threshold=3.0, minimum=9).split(TINY)
    with pytest.raises(DataError, match="the most is 0"):
        mr.NextItem(threshold=6.0).split(TINY)
