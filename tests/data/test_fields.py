"""Fields that are chosen: hashed values, texts, vectors that may be missing; how they are kept, and what is refused."""

import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.data.fields import MAX_GRAMS, Field, as_objects
from metarec_jax.data.hashing import grams, hashed
from metarec_jax.data.vocabulary import Vocabulary
from metarec_jax.errors import DataError

ROWS = {"user_id": [1, 1, 2], "item_id": [5, 6, 5], "rating": [1.0, 2.0, 3.0]}


# Hashing


def test_hashes_are_those_of_plain_integers_and_the_same_in_another_process():
    def finalise(h):
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ h >> 27) * 0x94D049BB133111EB % 2**64
        return h ^ h >> 31

    def plain(text):
        h = 0xCBF29CE484222325
        for c in text:
            h = (h ^ ord(c)) * 0x100000001B3 % 2**64
        return finalise(h)

    texts = ["", "a", "ab", "Füße", "日本語", "a" * 99]
    assert hashed(np.array(texts)).tolist() == [plain(t) for t in texts]
    ids = [0, 1, -1, -(2**63), 2**63 - 1]
    assert hashed(np.array(ids)).tolist() == [finalise(i % 2**64) for i in ids]
    code = "from metarec_jax.data import Vocabulary; print(*Vocabulary.hashed(99).encode(['a', 'b', 'c']))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [str(r) for r in Vocabulary.hashed(99).encode(["a", "b", "c"])]


def test_ids_spread_evenly_and_as_many_collide_as_documented():
    n, buckets = 20_000, 10_000
    for ids in (np.arange(n), np.arange(n) * 1024 - 7, np.char.add("user-", np.arange(n).astype(str))):
        rows = Vocabulary.hashed(buckets, integers=ids.dtype.kind == "i").encode(ids)
        assert rows.min() >= 1
        assert rows.max() <= buckets
        lost = n - len(np.unique(rows))
        assert lost == pytest.approx(n - buckets * (1 - np.exp(-n / buckets)), rel=0.02)


def test_a_hashed_field_knows_every_value_and_a_missing_one_is_unknown():
    field = Field.fit("device", as_objects(["a", None, "b"]), buckets=1000)
    assert (field.kind, field.size) == ("categorical", 1001)
    a, b = field.encode(["a"])[0], field.encode(["b"])[0]
    assert len({0, a, b}) == 3
    assert field.encode(["b", None, "never seen"]).tolist()[:2] == [b, 0]
    assert field.encode(["never seen"])[0] > 0
    tags = Field.fit("tags", as_objects([["a", "b"], []]), buckets=1000)
    assert tags.encode([["b", "a"], None]).tolist() == [[b, a], [0, 0]]


def test_hashed_ids_of_another_type_are_refused_and_none_can_be_told_from_its_row():
    with pytest.raises(DataError, match=r"strings.*integers"):
        Vocabulary.hashed(10).encode([1])
    with pytest.raises(DataError, match="hashed ids cannot be told"):
        Vocabulary.hashed(10).decode(np.array([1]))
    for buckets in (0, True, 2**31):
        with pytest.raises(ValueError, match="buckets"):
            Vocabulary.hashed(buckets)


# Texts


def test_a_text_is_its_words_and_their_parts():
    assert grams("Cats, cats!", 3) == ["<cats>", "<ca", "cat", "ats", "ts>"]
    assert grams("A b-C", 0) == ["<a>", "<b>", "<c>"]
    field = Field.fit("plot", as_objects(["x"]), kind="text", buckets=10**6)
    codes = field.encode(["Cats", "cats!", "cast", None, ""])
    assert codes.shape == (5, MAX_GRAMS)
    assert codes[0].tolist() == codes[1].tolist()
    assert set(codes[0][codes[0] > 0]) == set(field.vocabulary.encode(grams("cats", 3)))
    shared = set(codes[0]) & set(codes[2]) - {0}
    assert shared == set(field.vocabulary.encode(["<ca"]))
    assert not codes[3:].any()
    assert (field.encode([" ".join(map(str, range(999)))]) > 0).all()
    with pytest.raises(DataError, match=r"'plot' holds 3, which is no text"):
        field.encode([3])


# Vectors that may be missing


def test_a_vector_is_standardised_and_a_missing_one_is_marked_and_not_the_mean():
    vectors = [[1.0, 4.0], None, [3.0, None], [5.0, 8.0], [np.nan, np.nan]]
    field = Field.fit("poster", as_objects(vectors), kind="multimodal")
    assert (field.kind, field.width) == ("multimodal", 3)
    first = (np.array([1, 3, 5]) - 3) / np.sqrt(8 / 3) / 2**0.5
    second = np.array([-1, 0, 1]) / 2**0.5
    expected = np.zeros((5, 3))
    expected[[0, 2, 3]] = np.stack([first, second, np.ones(3)], -1)
    np.testing.assert_allclose(field.encode(vectors), expected, rtol=1e-6)
    assert field.unknown().tolist() == [0, 0, 0]
    dense = Field.fit("poster", as_objects(vectors))
    np.testing.assert_allclose(dense.encode([None, [3.0, 6.0]]), [[0, 0], [0, 0]], atol=1e-7)


def test_vectors_come_as_arrays_lists_or_polars_columns():
    v = np.random.default_rng(0).normal(size=(2, 3))
    fields = {"v": {"kind": "multimodal"}}
    tables = [
        {"item_id": [5, 6], "v": v},
        {"item_id": [5, 6], "v": v.tolist()},
        pl.DataFrame({"item_id": [5, 6], "v": pl.Series(v.tolist(), dtype=pl.List(pl.Float64))}),
        pl.DataFrame({"item_id": [5, 6], "v": pl.Series(v, dtype=pl.Array(pl.Float64, 3))}),
    ]
    found = [mr.data.from_tables(ROWS, items=t, fields=fields).item_features["v"] for t in tables]
    for one in found:
        np.testing.assert_allclose(one, found[0])
    assert found[0].shape == (3, 4)
    assert found[0][:, -1].tolist() == [0, 1, 1]


@pytest.mark.parametrize("kind", ["dense", "multimodal"])
def test_vectors_of_another_length_infinite_or_mixed_are_named_with_their_row(kind):
    field = Field.fit("v", np.zeros((4, 2)), kind=kind)
    for given in ([[1.0, 2.0], [1.0]], as_objects([[1.0, 2.0], [1.0]])):
        with pytest.raises(DataError, match=r"'v': row 1 has 1 values where the others have 2"):
            field.encode(given)
    with pytest.raises(DataError, match=r"'v': row 0 has 3 values where the others have 2"):
        field.encode(np.zeros((5, 3)))
    with pytest.raises(DataError, match=r"'v': row 1 is infinite"):
        field.encode(np.array([[1, 2], [1, np.inf]]))
    with pytest.raises(DataError, match=r"'v': row 1 holds .*no number"):
        field.encode([[1.0, 2.0], [1.0, "x"]])


def test_vectors_that_are_all_missing_are_refused():
    with pytest.raises(DataError, match=r"'v': no row has a vector"):
        Field.fit("v", as_objects([None, [np.nan, np.nan]]), kind="multimodal")


# Choosing


def test_columns_are_encoded_as_told_and_an_unknown_one_is_named():
    items = {"item_id": [5, 6], "zip": [10_115, 80_331], "seller": ["x", "y"]}
    data = mr.data.from_tables(ROWS, items=items, fields={"zip": {"kind": "categorical"}, "seller": {"buckets": 7}})
    found = {f.name: (f.kind, f.size) for f in data.item_fields}
    assert found == {"zip": ("categorical", 3), "seller": ("categorical", 8)}
    with pytest.raises(DataError, match="there is no column 'sellers'; there are seller, zip"):
        mr.data.from_tables(ROWS, items=items, fields={"sellers": {"buckets": 7}})
    with pytest.raises(ValueError, match=r"kind must be one of categorical, .*'image'"):
        Field.fit("x", np.zeros(3), kind="image")
    with pytest.raises(ValueError, match="buckets are for values that are no numbers"):
        Field.fit("x", np.zeros(3), buckets=9)


def test_bytes_that_are_no_utf8_are_named_and_others_are_read():
    assert Field.fit("job", np.array(["é".encode(), b"b"])).encode(["é", "b"]).tolist() == [2, 1]
    with pytest.raises(DataError, match=r"'job'.*row 1 .*not UTF-8"):
        Field.fit("job", np.array([b"a", b"\xff"]))
    with pytest.raises(DataError, match=r"user_id.*row 1 .*not UTF-8"):
        Vocabulary.of(np.array([b"a", b"\xff"]), "user_id")


def test_negative_ids_keep_their_rows():
    rows = {"user_id": [-3, 7, -3], "item_id": [-9, -9, 4], "rating": [1.0, 2.0, 3.0]}
    data = mr.data.from_tables(rows, items={"item_id": [4, -9], "price": [1.0, 3.0]})
    assert data.users.decode(data.user).tolist() == rows["user_id"]
    assert data.items.decode(data.item).tolist() == rows["item_id"]
    np.testing.assert_allclose(data.item_features["price"][data.items.encode([-9, 4]), 0], [1, -1])


def test_an_attribute_of_an_item_or_user_without_interactions_shifts_no_row():
    data = mr.data.from_tables(
        ROWS,
        users={"user_id": [0, 2, 1], "age": [0.0, 20.0, 10.0]},
        items={"item_id": [99, 6, 5, 1], "colour": ["never", "six", "five", "never"]},
    )
    (colour,) = data.item_fields
    assert colour.vocabulary.decode(data.item_features["colour"][data.item]).tolist() == ["five", "six", "five"]
    ages = data.user_features["age"][data.user, 0] * data.user_fields[0].scale + data.user_fields[0].mean
    np.testing.assert_allclose(ages, [10, 10, 20])


def test_two_million_items_are_encoded_without_a_python_loop():
    ids = np.arange(2_000_000) * 3 - 5
    vocabulary = Vocabulary.of(ids)
    assert len(vocabulary) == 2_000_001
    some = np.random.default_rng(0).integers(len(ids), size=1000)
    assert vocabulary.encode(ids[some]).tolist() == (some + 1).tolist()
    assert vocabulary.encode(ids[some] + 1).tolist() == [0] * 1000
    assert vocabulary.ids.nbytes == 16_000_000


# Saving


def test_a_model_keeps_how_every_kind_of_field_is_encoded(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "user_id": np.repeat(np.arange(40), 15),
        "item_id": np.concatenate([rng.permutation(20)[:15] for _ in range(40)]),
        "rating": rng.integers(1, 6, 600),
    }
    users = {
        "user_id": np.arange(40),
        "income": rng.lognormal(size=40),
        "rank": rng.lognormal(size=40),
        "device": rng.integers(1000, size=40).astype(str),
        "about": as_objects(["likes old films", None] * 20),
        "face": as_objects([None if i % 3 == 0 else v for i, v in enumerate(rng.normal(size=(40, 4)).tolist())]),
    }
    fields = {
        "income": {"transform": "log"},
        "rank": {"transform": "quantile"},
        "device": {"buckets": 50},
        "about": {"kind": "text", "buckets": 500, "gram": 4},
        "face": {"kind": "multimodal"},
    }
    data = mr.data.from_tables(rows, users=users, fields=fields)
    trained = mr.train(data, "ridge", objective="click", epochs=1, progress=False, buckets=1)
    trained.save(tmp_path / "model")
    loaded = mr.load(tmp_path / "model")
    for was, now in zip(trained.catalogue.user_fields, loaded.catalogue.user_fields, strict=True):
        assert (was.name, was.kind, was.size, was.width) == (now.name, now.kind, now.size, now.width)
        np.testing.assert_array_equal(was.encode(users[was.name]), now.encode(users[was.name]))
    known = {name: users[name][1] for name in fields}
    history = {1: 5.0, 2: 1.0}
    assert loaded.recommend(history, user=known) == trained.recommend(history, user=known)
    assert loaded.recommend(history, user={"device": "never seen"}) != loaded.recommend(history, user=known)
    assert trained.evaluate(baselines=False) == loaded.evaluate(data, baselines=False)
