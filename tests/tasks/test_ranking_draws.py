"""What training the ranking objective draws: disjoint halves, one fold a batch, every user at most once an epoch."""

from dataclasses import replace

import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data.schema import ITEM, STATISTICS
from metarec_jax.tasks.observed import item_features, observe
from metarec_jax.tasks.ranking_draws import drawn, widths_of
from metarec_jax.tasks.statistics import ItemStatistics

DATA = mr.data.synthetic(users=150, items=80, ratings_per_user=(1, 40), seed=3)
TARGET = mr.tasks.Target("ranking", 4.0, levels=(1.0, 3.0, 5.0))
HISTORIES = mr.tasks.Histories.of(DATA, np.arange(1, len(DATA.users)))
RATED = {(u, i): r for u, i, r in zip(DATA.user.tolist(), DATA.item.tolist(), DATA.rating.tolist(), strict=True)}
TIME = {(u, i): t for u, i, t in zip(DATA.user.tolist(), DATA.item.tolist(), DATA.order.tolist(), strict=True)}
FOLD = np.arange(len(HISTORIES)) % 4


def epoch(histories=HISTORIES, seed=0, fold=FOLD, widths=(16, 48), target=TARGET, **objective):
    """The users of an epoch, each with its fold, support, targets and query, and the batches."""
    objective = mr.Ranking(**{"unknown": 0.0} | objective)
    rng = np.random.default_rng(seed)
    batches = list(drawn(histories, target, objective, batch_size=16, widths=widths, fold=fold, rng=rng))
    users = []
    for task, k in batches:
        for u in range(16):
            real, asked = task.known.weight[u] > 0, task.query.mask[u] > 0
            if real.any() or asked.any():
                users.append((k, task.known.items[u][real], task.known.target[u][real], task.query.rows[u][asked]))
    return users, batches


# with the user's row as a field, so that a task says whose it is
NAMED = replace(
    DATA,
    user_fields=(mr.data.fields.Field("name", "categorical", len(DATA.users), 1),),
    user_features={"name": np.arange(len(DATA.users), dtype=np.int32)},
)


def named_epoch(histories=HISTORIES, **options):
    """As `epoch`, by user: `{user: (fold, support, targets, query)}`."""
    histories = replace(histories, data=NAMED)
    users, batches = epoch(histories, **options)
    names = [
        int(task.known.user["name"][u])
        for task, _ in batches
        for u in range(16)
        if (task.known.weight[u] > 0).any() or (task.query.mask[u] > 0).any()
    ]
    assert len(names) == len(set(names))  # at most once an epoch
    return dict(zip(names, users, strict=True)), batches


def test_halves_are_disjoint_and_the_query_is_positive():
    users, _ = named_epoch()
    for user, (_, support, target, query) in users.items():
        assert not set(support.tolist()) & set(query.tolist())
        assert len(set(support.tolist())) == len(support)
        assert len(set(query.tolist())) == len(query) >= 1
        assert all(RATED[user, i] >= 4 for i in query.tolist())
        rating = np.array([RATED[user, i] for i in support.tolist()], np.float32)
        np.testing.assert_allclose(target, TARGET.grade(rating))


def test_every_user_with_two_positives_is_drawn_once_and_no_other():
    users, batches = named_epoch()
    count = np.bincount(DATA.user[DATA.rating >= 4], minlength=len(DATA.users))
    assert sorted(users) == np.flatnonzero(count >= 2).tolist()
    full = np.bincount(FOLD[count[1:] >= 2])
    assert len(batches) == (-(-full // 16)).sum()
    again, _ = named_epoch(seed=1)
    assert any(set(users[u][3].tolist()) != set(again[u][3].tolist()) for u in users)  # drawn anew


def test_a_batch_holds_users_of_one_fold():
    users, batches = named_epoch()
    assert {fold for fold, *_ in users.values()} == {0, 1, 2, 3}
    assert all(FOLD[user - 1] == fold for user, (fold, *_) in users.items())
    assert len({task.known.items.shape for task, _ in batches}) <= 2


def test_an_epoch_stops_at_the_largest_number_of_users(monkeypatch):
    monkeypatch.setattr("metarec_jax.tasks.ranking_draws.USERS", 20)
    assert len(epoch()[0]) == 20


def test_supports_are_empty_now_and_then_and_hold_dislikes_where_the_objective_says_so():
    sizes, disliked = [], []
    for seed in range(10):
        for _, support, target, _ in epoch(seed=seed, dislikes=0.5)[0]:
            sizes.append(len(support))
            disliked.append((target < 0.7).any())
    assert 0.01 < np.mean(np.equal(sizes, 0)) < 0.1
    assert 0.2 < np.mean(disliked) < 0.6
    for share, expected in ((0.0, False), (1.0, True)):
        users, _ = named_epoch(dislikes=share)
        other = {u for u in users if any(r < 4 for (who, _), r in RATED.items() if who == u)}
        found = {u for u, (_, support, *_) in users.items() if any(RATED[u, i] < 4 for i in support.tolist())}
        assert found == (other if expected else set())


def test_long_supports_show_four_fifths_of_the_positives_and_short_ones_any_number():
    count = np.bincount(DATA.user[DATA.rating >= 4], minlength=len(DATA.users))
    users, _ = named_epoch(short=0.0, dislikes=0.0)
    for user, (_, support, _, query) in users.items():
        n = min(max(1, round(0.8 * count[user])), count[user] - 1)
        assert (len(support), len(query)) == (n, count[user] - n)
    users, _ = named_epoch(short=1.0, dislikes=0.0)
    shares = [len(support) / count[user] for user, (_, support, *_) in users.items() if count[user] >= 8]
    assert min(shares) < 0.2
    assert max(shares) > 0.5


def test_a_query_and_a_support_are_cut_to_their_widths():
    users, batches = epoch(query=2, widths=(8,), dislikes=1.0)
    assert max(len(query) for *_, query in users) == 2
    assert max(len(support) for _, support, *_ in users) == 8
    assert {(task.known.items.shape[1], task.query.rows.shape[1]) for task, _ in batches} == {(8, 2)}


def test_the_identity_of_a_share_of_the_users_is_hidden():
    _, batches = epoch(replace(HISTORIES, data=NAMED), unknown=0.5)
    names = np.concatenate([task.known.user["name"][(task.query.mask > 0).any(1)] for task, _ in batches])
    assert 0.3 < np.mean(names == 0) < 0.7


@pytest.mark.parametrize("widths", [(48,), (4,)])
def test_histories_in_order_keep_the_order_of_time_and_ask_for_what_came_later(widths):
    users, _ = named_epoch(histories=HISTORIES.latest_first(), widths=widths)
    assert len(users) > 50
    for user, (_, support, _, query) in users.items():
        own = [(TIME[user, i], r >= 4) for (u, i), r in RATED.items() if u == user]
        first = min(TIME[user, i] for i in query.tolist())
        earlier = sorted(t for t, _ in own if t < first)
        liked = sorted(t for t, positive in own if positive and t < first)
        moments = [TIME[user, i] for i in support.tolist()]
        assert moments in (earlier[-widths[0] :], liked[-widths[0] :])  # with dislikes, and without
        assert 1 <= len(query) <= max(1, sum(positive for _, positive in own) // 5)


def test_unordered_histories_are_shown_in_the_order_of_time_too():
    for user, (_, support, *_) in named_epoch()[0].items():
        moments = [TIME[user, i] for i in support.tolist()]
        assert moments == sorted(moments)


def test_a_query_was_chosen_in_one_context():
    rng = np.random.default_rng(0)
    where = rng.integers(1, 3, len(DATA.rating)).astype(np.int32)
    field = mr.data.fields.Field("where", "categorical", 3, 1)
    data = replace(NAMED, context_fields=(field,), context_features={"where": where})
    at = {(u, i): w for u, i, w in zip(DATA.user.tolist(), DATA.item.tolist(), where.tolist(), strict=True)}
    for task, _ in epoch(replace(HISTORIES, data=data))[1]:
        for u in np.flatnonzero((task.query.mask > 0).any(1)):
            user, rows = int(task.known.user["name"][u]), task.query.rows[u][task.query.mask[u] > 0]
            assert {at[user, i] for i in rows.tolist()} == {int(task.known.context["where"][u])}


def test_widths_hold_the_histories():
    assert widths_of(HISTORIES, 128, 1) == (40,)
    assert widths_of(HISTORIES, 16, 1) == (16,)
    assert len(widths_of(HISTORIES, 128, 3)) == 3


def test_what_is_observed_is_what_users_did_in_time():
    users = np.array([7, 3, 7])  # one of them twice
    found = observe(replace(mr.tasks.Histories.of(DATA, users), data=NAMED), TARGET)
    assert found.users == 2
    assert found.items == len(DATA.items)
    assert found.profile["name"].tolist() == [3, 7]
    for row, user in enumerate((3, 7)):
        own = np.flatnonzero(DATA.user == user)
        own = own[np.argsort(DATA.order[own])]
        np.testing.assert_array_equal(found.item[found.user == row], DATA.item[own])
        np.testing.assert_array_equal(found.grade[found.user == row], TARGET.grade(DATA.rating[own]))
        np.testing.assert_array_equal(found.positive[found.user == row], DATA.rating[own] >= 4)
    np.testing.assert_array_equal(found.features["item/genre"], DATA.item_features["genre"])
    dense = np.zeros((2, len(DATA.items)))
    dense[found.user, found.item] = found.grade
    np.testing.assert_allclose(found.confidences().toarray(), dense)
    np.testing.assert_array_equal(found.positives().toarray(), (dense >= TARGET.grade(np.float32(4))) & (dense > 0))


def test_what_is_observed_of_some_users_is_theirs_alone():
    found = observe(replace(HISTORIES, data=NAMED), TARGET)
    part = found.of(np.array([5, 2]))
    assert part.users == 2
    assert part.profile["name"].tolist() == [6, 3]
    for row, user in enumerate((6, 3)):
        assert set(part.item[part.user == row].tolist()) == {i for u, i in RATED if u == user}


def test_statistics_of_other_users_can_take_the_place_of_the_datas_own():
    statistics = ItemStatistics.fit(HISTORIES.take(np.arange(40)), TARGET)
    found = item_features(DATA, statistics)
    np.testing.assert_array_equal(found[ITEM + STATISTICS], statistics.extend(DATA).item_features[STATISTICS])
    assert observe(HISTORIES, TARGET).features.keys() == found.keys() - {ITEM + STATISTICS}


@pytest.mark.parametrize("positives", [0, 1])
def test_without_two_positives_of_anybody_there_is_an_error(positives):
    rating = np.where(np.isin(np.arange(len(DATA.rating)), HISTORIES.index[HISTORIES.starts[:-1]]), 5.0, 1.0)
    data = replace(DATA, rating=(rating if positives else np.ones(len(rating))).astype(np.float32))
    with pytest.raises(mr.DataError, match="two positives"):
        epoch(replace(HISTORIES, data=data))
