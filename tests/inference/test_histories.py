"""A new user's history in every form that callers have, and what is said of those that cannot be read."""

import numpy as np
import polars as pl
import pytest

from metarec_jax.data.vocabulary import Vocabulary
from metarec_jax.errors import DataError
from metarec_jax.inference.histories import encode_history

NUMBERED = Vocabulary(np.array([3, 17, 42]), "item_id")
NAMED = Vocabulary(np.array(["x1", "x2"]), "item_id")
LIMITS = (1.0, 5.0)


def encoded(history, items=NUMBERED):
    rows, ratings, *_ = encode_history(history, items, LIMITS, "history")
    assert (rows.dtype, ratings.dtype) == (np.int32, np.float32)
    return list(zip(rows.tolist(), ratings.tolist(), strict=True))


@pytest.mark.parametrize(
    ("history", "items"),
    [
        ([3, 17, 42], NUMBERED),
        ((3, 17, 42), NUMBERED),
        (np.array([3, 17, 42]), NUMBERED),
        ([np.int32(3), 17, np.int64(42)], NUMBERED),
        (["x1", "x2"], NAMED),
        (np.array(["x1", "x2"]), NAMED),
    ],
)
def test_item_ids_alone_are_positives_with_the_highest_rating(history, items):
    assert encoded(history, items) == [(row + 1, 5.0) for row in range(len(history))]
    assert encoded(history, items) == encoded({item: 5.0 for item in history}, items)


@pytest.mark.parametrize("history", [{3: 4.0, 42: 1.0}, [(3, 4.0), (42, 1.0)], ((3, 4.0), (42, 1))])
def test_ratings_come_as_a_mapping_or_as_pairs(history):
    assert encoded(history) == [(1, 4.0), (3, 1.0)]


@pytest.mark.parametrize("history", [{}, [], (), np.array([], int)])
def test_an_empty_history_is_one_user_who_is_new(history):
    assert encoded(history) == []


@pytest.mark.parametrize(
    "batch",
    [
        [[3, 17], [42]],
        [[3, 4.0], [42, 1.0]],
        [[], [3]],
        [["x1", "x2"]],
        [{3: 5.0}, {}],
        [[(3, 5.0)], [42]],
        [np.array([3, 17]), np.array([42])],
    ],
)
def test_several_histories_are_not_one(batch):
    with pytest.raises(
        DataError, match=r"a pair is a tuple; for several users call recommender\.batch with a list of histories"
    ):
        encode_history(batch, NUMBERED, LIMITS, "history")


def test_an_interaction_may_have_a_context():
    phone, tv = {"device": "phone"}, {"device": "tv"}
    triples = [(3, 4.0, phone), (42, 1.0, tv)]
    assert encoded(triples) == [(1, 4.0), (3, 1.0)]
    assert encode_history(triples, NUMBERED, LIMITS, "history").contexts == [phone, tv]
    assert encode_history([(3, 4.0, None)], NUMBERED, LIMITS, "history").contexts == [{}]
    table = pl.DataFrame({"item_id": [3, 42], "rating": [4.0, 1.0], "device": ["phone", "tv"], "title": ["a", "b"]})
    of_table = encode_history(table, NUMBERED, LIMITS, "history", ["device"])
    assert of_table.contexts == [phone, tv]
    assert encode_history(table.drop("rating"), NUMBERED, LIMITS, "history", ["device"]).ratings.tolist() == [5.0, 5.0]


def test_a_table_is_of_one_user_and_in_order_of_time():
    table = pl.DataFrame({"item_id": [3, 17, 3], "rating": [4.0, 2.0, 1.0], "timestamp": [9, 5, 1]})
    assert encoded(table) == [(2, 2.0), (1, 4.0)]
    assert encoded(table.with_columns(user_id=pl.lit(1))) == [(2, 2.0), (1, 4.0)]
    with pytest.raises(DataError, match="history: the table holds 2 users"):
        encoded(table.with_columns(user_id=pl.Series([1, 2, 2])))


def test_an_item_that_comes_twice_counts_once_with_its_later_rating():
    assert encoded([3, 17, 3]) == [(2, 5.0), (1, 5.0)]
    assert encoded([(3, 2.0), (17, 3.0), (3, 4.0)]) == [(2, 3.0), (1, 4.0)]


def test_unknown_items_are_kept_as_unknown():
    assert encoded([999, 3, 998]) == [(0, 5.0), (1, 5.0), (0, 5.0)]
    assert encode_history([999, 3, 998], NUMBERED, LIMITS, "history").unknown == [999, 998]


@pytest.mark.parametrize("history", [[3, (17, 5.0)], [(17, 5.0), 3]])
def test_ids_and_pairs_are_not_mixed(history):
    with pytest.raises(DataError, match=r"history: item id 3 and pair .17, 5\.0. are mixed; give item ids alone"):
        encode_history(history, NUMBERED, LIMITS, "history")


@pytest.mark.parametrize("entry", [None, 3.5, True, [17], [17, 5.0], {17: 5.0}, (17, 5.0, 1)])
def test_an_entry_that_is_neither_an_id_nor_a_pair_is_named(entry):
    with pytest.raises(DataError, match=r"every entry must be \(item, rating\) or .*, or every entry an item id; got"):
        encode_history([3, entry], NUMBERED, LIMITS, "history")


def test_ids_of_another_type_are_refused():
    with pytest.raises(DataError, match="integers as ids but got strings"):
        encode_history(["x1"], NUMBERED, LIMITS, "history")
    with pytest.raises(DataError, match="strings as ids but got integers"):
        encode_history([3], NAMED, LIMITS, "history")
    with pytest.raises(DataError, match="item_id"):
        encode_history([3, "x1"], NUMBERED, LIMITS, "history")


@pytest.mark.parametrize("history", ["x1", b"x1", 3, None, 3.5, iter([3])])
def test_what_is_no_history_is_refused_with_the_forms_there_are(history):
    forms = r"expected \{item: rating, \.\.\.\}, \[\(item, rating\), \.\.\.\] or \[item, \.\.\.\]"
    with pytest.raises(DataError, match=forms):
        encode_history(history, NUMBERED, LIMITS, "history")
    with pytest.raises(DataError, match=f"history 1: {forms}"):
        encode_history(history, NUMBERED, LIMITS, "history 1")
