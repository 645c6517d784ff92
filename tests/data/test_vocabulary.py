"""Raw ids to rows and back: every id keeps its row, every unknown one gets row 0, all else is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary
from metarec_jax.errors import DataError

INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
STRINGS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))), max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.tuples(INTEGERS, INTEGERS), st.tuples(STRINGS, STRINGS)))
def test_rows_equal_those_of_a_plain_dictionary(lists):
    known, asked = lists
    rows = {value: row for row, value in enumerate(sorted(set(known)), 1)}
    vocabulary = Vocabulary.of(known)
    assert len(vocabulary) == len(rows) + 1
    assert vocabulary.encode(known + asked).tolist() == [rows.get(v, UNKNOWN) for v in known + asked]
    assert vocabulary.decode(vocabulary.encode(known)).tolist() == known


def test_ids_beyond_31_bits_are_never_confused():
    ids = np.array([2**31, 2**31 + 2**32, 2**53, 2**53 + 1, 2**63 - 1, 0])
    vocabulary = Vocabulary.of(ids)
    assert len(set(vocabulary.encode(ids))) == len(ids)
    assert vocabulary.encode(ids).dtype == np.int32
    assert vocabulary.encode([2**31 + 1, 2**53 + 2]).tolist() == [UNKNOWN, UNKNOWN]


def test_an_unknown_string_never_matches_a_longer_or_shorter_one():
    vocabulary = Vocabulary.of(["ab", "abc"])
    assert vocabulary.encode(["a", "ab", "abcd", "abc", ""]).tolist() == [0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    "same",
    [
        [3, 1, 2],
        (3, 1, 2),
        [np.int64(3), np.int32(1), 2],
        np.array([3, 1, 2], np.uint64),
        np.array([3, 1, 2], np.int8),
        np.array([3, 1, 2], object),
    ],
)
def test_every_spelling_of_integers_is_accepted(same):
    assert Vocabulary.of([1, 2, 3]).encode(same).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("values", "row", "says"),
    [
        (["a", 1], 1, "1"),
        ([1, "a"], 1, "'a'"),
        ([1, 2.5], 1, "2.5"),
        ([1, None, 3], 1, "missing"),
        (["a", "b", None], 2, "missing"),
        (["a", float("nan")], 1, "missing"),
        (np.array([1.0, 2.0]), 0, "1.0"),
        (np.array([1.0, 2.0, np.nan]), 2, "missing"),
        (np.array([1.0, 2.5, 3.0]), 1, "2.5"),
        ([1, True], 1, "True"),
        ([1, 2**63], 1, str(2**63)),
        ([1, 2, -(2**63) - 1], 2, str(-(2**63) - 1)),
        ([5, 2**64 + 5], 1, str(2**64 + 5)),
        (np.array([1, 2**63 + 7], np.uint64), 1, str(2**63 + 7)),
    ],
)
def test_an_id_that_cannot_be_used_is_named_with_its_column_and_row(values, row, says):
    for use in (
        lambda: Vocabulary.of(values, "item_id"),
        lambda: Vocabulary.of([1], "item_id").encode(values),
    ):
        with pytest.raises(DataError, match=rf"item_id.*row {row}\b.*{says}"):
            use()


@pytest.mark.parametrize("values", [np.array([True, False]), np.array([1j]), np.array(["2020"], "M8[Y]")])
def test_other_types_are_refused_by_name(values):
    with pytest.raises(DataError, match=f"item_id.*{values.dtype.name[:4]}"):
        Vocabulary.of(values, "item_id")


def test_a_matrix_of_ids_is_refused():
    with pytest.raises(DataError, match=r"item_id.*\(2, 2\)"):
        Vocabulary.of([[1, 2], [3, 4]], "item_id")


def test_strings_for_integers_are_refused_and_not_taken_for_unknown():
    with pytest.raises(DataError, match=r"item_id.*integers.*strings"):
        Vocabulary.of([1, 2], "item_id").encode(["1"])
    with pytest.raises(DataError, match=r"item_id.*strings.*integers"):
        Vocabulary.of(["1"], "item_id").encode([1])


def test_no_ids_at_all_are_no_error():
    assert Vocabulary.of([1, 2]).encode([]).shape == (0,)
    assert Vocabulary.of(["a"]).encode([]).shape == (0,)
    assert Vocabulary.of([]).encode(["a", "b"]).tolist() == [UNKNOWN, UNKNOWN]


def test_the_unknown_row_has_no_id():
    with pytest.raises(DataError, match="row 0"):
        Vocabulary.of([7, 8]).decode(np.array([1, 0]))
