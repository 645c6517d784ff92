"""Tables in memory and on disk: every form gives the same dataset, what cannot be used a clear error."""

import datetime

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from metarec_jax.data import cleaning
from metarec_jax.data.fetch import load
from metarec_jax.data.fields import MAX_VALUES, Field
from metarec_jax.data.tables import from_tables, read_table
from metarec_jax.errors import DataError

FORMS = {
    "lists": lambda t: {c: v.tolist() for c, v in t.items()},
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "lazy polars": pl.LazyFrame,
    "arrow": pa.table,
    "arrow record batch": pa.RecordBatch.from_pydict,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strings", [False, True])
def test_every_form_of_a_table_gives_the_same_dataset(table, form, strings, assert_same_data):
    if strings:
        table["item_id"] = np.array([f"item {i}" for i in table["item_id"]])
    items = {
        "item_id": table["item_id"][[0, 1, 3]],
        "title": np.array(["A", "B", "C"]),
        "colour": np.array(["red", "blue", "red"]),
        "price": np.array([1.0, 3.0, 8.0]),
    }
    made = FORMS[form]
    assert_same_data(from_tables(made(table), items=made(items)), from_tables(table, items=items))


def test_a_dataset_holds_every_interaction_as_rows(table):
    data = from_tables(table)
    assert data.users.decode(data.user).tolist() == table["user_id"].tolist()
    assert data.items.decode(data.item).tolist() == table["item_id"].tolist()
    assert data.rating.tolist() == table["rating"].tolist()
    assert data.timestamp.tolist() == table["timestamp"].tolist()
    assert data.report == {"rows": 5, "duplicates": 0}
    assert repr(data) == "Dataset(tables: 5 interactions, 3 users, 4 items)"


def test_of_two_ratings_the_later_by_time_stays():
    data = from_tables(
        {
            "user_id": [1, 1, 1, 2],
            "item_id": [5, 5, 5, 5],
            "rating": [1, 2, 3, 4],
            "timestamp": [10, 30, 20, 5],
        }
    )
    assert data.rating.tolist() == [2, 4]
    assert data.report == {"rows": 4, "duplicates": 2}


@pytest.mark.parametrize("time", [None, [7, 7, 7, 7]])
def test_of_two_ratings_at_one_time_the_later_row_stays(time):
    table = {"user_id": [1, 1, 2, 1], "item_id": [5, 6, 5, 5], "rating": [1, 2, 3, 4]}
    data = from_tables(table | ({"timestamp": time} if time else {}))
    assert list(zip(data.user.tolist(), data.item.tolist(), data.rating.tolist(), strict=True)) == [
        (1, 2, 2.0),
        (2, 1, 3.0),
        (1, 1, 4.0),
    ]
    assert data.report["duplicates"] == 1


def test_the_latest_of_random_duplicates_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    user, item, time = (rng.integers(n, size=300) for n in (6, 6, 4))
    data = from_tables({"user_id": user, "item_id": item, "rating": np.arange(300.0), "timestamp": time})
    latest = {}
    for row in range(300):
        pair = user[row], item[row]
        if pair not in latest or time[row] >= time[latest[pair]]:
            latest[pair] = row
    assert data.rating.tolist() == sorted(latest.values())


@pytest.mark.parametrize("time", [10**11, -(10**11), 2**53 + 1, 2**63 - 1, 1e30])
def test_times_beyond_thousands_of_years_are_refused(table, time):
    with pytest.raises(DataError, match=r"'timestamp'.*row 1.*milliseconds"):
        from_tables(table | {"timestamp": [0, time, 0, 0, 0]})


def test_integers_and_floats_may_be_mixed_in_ratings(table):
    assert from_tables(table | {"rating": [4, 3.5, 5, 2.5, 1]}).rating.tolist() == [4, 3.5, 5, 2.5, 1]


def test_dates_become_seconds(table):
    moment = datetime.datetime(2024, 5, 17, 12, 30)
    seconds = int(moment.replace(tzinfo=datetime.UTC).timestamp())
    for times in (np.array([moment] * 5, "M8[s]"), np.array([moment] * 5, "M8[ns]"), [moment] * 5):
        assert from_tables(table | {"timestamp": times}).timestamp.tolist() == [seconds] * 5
    frame = pd.DataFrame(table).assign(timestamp=pd.to_datetime([moment] * 5))
    assert from_tables(frame).timestamp.tolist() == [seconds] * 5


def test_large_ids_of_any_width_stay_apart(table):
    ids = np.array([2**31, 2**31 + 2**32, 2**62, 2**62 + 1, 5])
    for dtype in (np.int64, np.uint64):
        data = from_tables(table | {"item_id": ids.astype(dtype)}, items={"item_id": ids, "x": np.arange(5.0)})
        assert data.items.decode(data.item).tolist() == ids.tolist()


def test_columns_of_other_names_are_found_by_columns(table, assert_same_data):
    renamed = {"kunde": table["user_id"], "ware": table["item_id"], "sterne": table["rating"]}
    columns = {"user_id": "kunde", "item_id": "ware", "rating": "sterne"}
    del table["timestamp"]
    data = from_tables(renamed, users={"kunde": [10, 20, 30], "age": [1, 2, 3]}, columns=columns)
    assert_same_data(data, from_tables(table, users={"user_id": [10, 20, 30], "age": [1, 2, 3]}))


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_a_missing_column_is_named_with_the_way_out(table, column):
    table["other"] = table.pop(column)
    with pytest.raises(DataError, match=rf"'{column}' is missing .*other.*columns="):
        from_tables(table)


@pytest.mark.parametrize("column", ["user_id", "item_id", "rating", "timestamp"])
@pytest.mark.parametrize("rules", [(), (cleaning.duplicates(),)])
def test_a_column_named_by_columns_must_be_there(table, column, rules):
    with pytest.raises(DataError, match=r"column 'stars' is missing .*columns="):
        from_tables(table, columns={column: "stars"}, clean=rules)


@pytest.mark.parametrize("rules", [(), (cleaning.duplicates(),)])
def test_without_ratings_every_interaction_counts_one(table, rules):
    del table["rating"]
    data = from_tables(table, clean=rules)
    assert data.rating.tolist() == [1.0] * 5
    assert data.rating.dtype == np.float32
    assert data.timestamp.tolist() == table["timestamp"].tolist()
    renamed = {"who": table["user_id"], "sku": table["item_id"]}
    assert from_tables(renamed, columns={"user_id": "who", "item_id": "sku"}).rating.tolist() == [1.0] * 5


def test_without_ratings_repeated_plays_count_once(table):
    data = from_tables({"user_id": [1, 1, 1, 2], "item_id": [5, 5, 6, 5]})
    assert list(zip(data.user.tolist(), data.item.tolist(), strict=True)) == [(1, 1), (1, 2), (2, 1)]
    assert data.report == {"rows": 4, "duplicates": 1}


def test_a_rule_about_ratings_needs_them(table):
    del table["rating"]
    with pytest.raises(DataError, match="needs the column 'rating'"):
        from_tables(table, clean=[cleaning.rating_between(1, 5)])


def test_an_unknown_key_of_columns_is_named(table):
    with pytest.raises(DataError, match=r"'user'.*user_id"):
        from_tables(table, columns={"user": "user_id"})


@pytest.mark.parametrize("empty", [{}, {"user_id": [], "item_id": [], "rating": []}, pd.DataFrame()])
def test_an_empty_table_is_refused(empty):
    with pytest.raises(DataError, match="empty"):
        from_tables(empty)


def test_columns_of_different_lengths_and_other_things_are_refused(table):
    with pytest.raises(DataError, match="equally long"):
        from_tables(table | {"rating": [1.0]})
    with pytest.raises(DataError, match="not a table"):
        from_tables(3)


BAD_IDS = {
    "float": ([1.0, 2.0, 3.0, 4.0, 5.0], 0),
    "gap among floats": (np.array([1, 2, np.nan, 4, 5]), 2),
    "fraction": ([1, 2, 3.5, 4, 5], 2),
    "gap": ([1, 2, 3, None, 5], 3),
    "gap among strings": (["a", None, "c", "d", "e"], 1),
    "NaN among strings": (np.array(["a", "b", np.nan, "d", "e"], object), 2),
    "string among integers": ([1, 2, "c", 4, 5], 2),
    "integer among strings": (np.array(["a", "b", "c", "d", 5], object), 4),
    "63 bits exceeded": (np.array([1, 2, 3, 4, 2**63], np.uint64), 4),
    "64 bits exceeded": ([1, 2**64, 3, 4, 5], 1),
}


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("case", BAD_IDS)
def test_a_bad_id_is_named_with_its_column_and_row(table, column, case):
    values, row = BAD_IDS[case]
    with pytest.raises(DataError, match=rf"interactions: column '{column}'.*row {row}\b"):
        from_tables(table | {column: values})


@pytest.mark.parametrize("values", [[True] * 5, [[1]] * 5, [datetime.date(2020, 1, 1)] * 5])
def test_an_id_column_of_another_type_is_named(table, values):
    with pytest.raises(DataError, match="'user_id' holds"):
        from_tables(table | {"user_id": values})


def test_missing_ids_of_pandas_are_named(table):
    frame = pd.DataFrame(table)
    for values in (pd.array([1, None, 3, 4, 5], "Int64"), pd.array(["a", None, "b", "c", "d"], "string")):
        with pytest.raises(DataError, match=r"'item_id'.*row 1\b"):
            from_tables(frame.assign(item_id=values))


@pytest.mark.parametrize("column", ["rating", "timestamp"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_a_number_that_is_none_is_named_with_its_column_and_row(table, column, value):
    values = [*table[column][:3].tolist(), value, 1.0]
    for given in (values, np.array(values, float)):
        with pytest.raises(DataError, match=rf"'{column}' is .* row 3 \(1 such rows\)"):
            from_tables(table | {column: given})


def test_numbers_beyond_their_type_are_refused(table):
    with pytest.raises(DataError, match=r"'rating' is 1e\+60 in row 4"):
        from_tables(table | {"rating": [1, 2, 3, 4, 1e60]})
    with pytest.raises(DataError, match=r"'timestamp' is 1e\+60 in row 0"):
        from_tables(table | {"timestamp": [1e60, 2, 3, 4, 5]})


@pytest.mark.parametrize("values", [["4", "2", "5", "3", "1"], [True] * 5, [datetime.date(2020, 1, 1)] * 5])
def test_ratings_that_are_no_numbers_are_refused(table, values):
    with pytest.raises(DataError, match=r"'rating' holds .*not numbers"):
        from_tables(table | {"rating": values})


def test_one_rating_of_another_type_is_named_with_its_row(table):
    with pytest.raises(DataError, match=r"'rating'.*str.*row 2.*'good'"):
        from_tables(table | {"rating": [1.0, 2.0, "good", 4.0, 5.0]})


# Attributes


def test_an_id_twice_in_an_attribute_table_is_named(table):
    with pytest.raises(DataError, match="items: item_id 7 stands in more than one row"):
        from_tables(table, items={"item_id": [7, 5, 7], "x": ["a", "b", "c"]})
    with pytest.raises(DataError, match="users: user_id 20 stands in more than one row"):
        from_tables(table, users={"user_id": [20, 20], "x": ["a", "b"]})


def test_ids_of_another_type_in_an_attribute_table_are_refused(table):
    with pytest.raises(DataError, match=r"items: column 'item_id'.*type"):
        from_tables(table, items={"item_id": ["7"], "x": ["a"]})


def test_items_nobody_rated_are_in_the_catalogue_and_items_without_attributes_are_unknown(table):
    data = from_tables(table, items={"item_id": [7, 99], "colour": ["red", "blue"], "price": [1.0, 3.0]})
    assert data.items.ids.tolist() == [5, 6, 7, 9, 99]
    row = {i: r for r, i in enumerate(data.items.ids.tolist(), 1)}
    colour, price = data.item_features["colour"], data.item_features["price"]
    assert colour[0] == 0
    assert colour[row[5]] == 0
    assert {colour[row[7]], colour[row[99]]} == {1, 2}
    np.testing.assert_allclose(price[[row[7], row[99], row[5], 0]], [[-1], [1], [0], [0]])


def test_titles_are_kept_and_are_no_field(table):
    items = {"item_id": [7, 5], "title": ["Sieben", None]}
    data = from_tables(table, items=items)
    assert data.titles is not None
    assert data.titles[data.items.encode([7, 5, 9, 12345])].tolist() == ["Sieben", "", "", ""]
    assert data.item_fields == ()
    other = from_tables(table, items={"item_id": [7, 5], "name": ["Sieben", "Fünf"]}, title="name")
    assert other.titles is not None
    assert other.titles[other.items.encode([5])].tolist() == ["Fünf"]


def test_a_numeric_attribute_is_standardised_and_a_missing_one_is_the_mean(table):
    values = [2.0, None, 4.0, 9.0]
    data = from_tables(table, items={"item_id": [5, 6, 7, 9], "price": values})
    known = np.array([2.0, 4.0, 9.0])
    expected = [0.0, *(0.0 if v is None else (v - known.mean()) / known.std() for v in values)]
    np.testing.assert_allclose(data.item_features["price"][:, 0], expected, rtol=1e-6)
    as_nan = from_tables(table, items={"item_id": [5, 6, 7, 9], "price": np.array([2, np.nan, 4, 9])})
    np.testing.assert_array_equal(as_nan.item_features["price"], data.item_features["price"])


def test_a_constant_attribute_is_zero(table):
    data = from_tables(table, users={"user_id": [10, 20, 30], "age": [40, 40, 40]})
    assert data.user_features["age"].tolist() == [[0.0]] * 4


def test_vectors_are_dense_and_of_one_length(table):
    vectors = [[1.0, 2.0], [3.0, 2.0], None]
    data = from_tables(table, items={"item_id": [5, 6, 7], "v": vectors})
    np.testing.assert_allclose(data.item_features["v"], [[0, 0], [-1, 0], [1, 0], [0, 0], [0, 0]])
    with pytest.raises(DataError, match=r"'v': row 1 has 3 values where the others have 2"):
        data.item_fields[0].encode([[1.0, 2.0], [1.0, 2.0, 3.0]])
    with pytest.raises(DataError, match=r"'v': row 0 has 1 values where the others have 2"):
        from_tables(table, items={"item_id": [5, 6], "v": [[1.0], [1.0, 2.0]]})
    with pytest.raises(DataError, match=r"'v': row 1 holds .*no number"):
        data.item_fields[0].encode([[1.0, 2.0], [1.0, "x"]])
    data = from_tables(table, items={"item_id": [5, 6, 7], "v": [[1.0, 2.0], [1.0, None], [3.0, 4.0]]})
    assert data.item_features["v"][2, 1] == 0


@pytest.mark.parametrize("values", [[1.0, np.inf], [None, -np.inf], [[1.0], [np.inf]]])
def test_an_infinite_attribute_is_named_with_its_row(table, values):
    with pytest.raises(DataError, match=r"'x': row 1 is infinite"):
        from_tables(table, items={"item_id": [5, 6], "x": values})


def test_a_constant_number_is_not_blown_up_by_the_rounding_of_its_mean():
    values = np.full(20, np.log1p(96.0))
    assert (values - values.sum() / 20).any()  # the mean is not the number
    np.testing.assert_allclose(Field.fit("constant", values).encode(values), 0, atol=1e-6)


def test_lists_are_multi_valued_with_every_value_kept(table):
    genres = [["Drama", "War"], [], ["War"], None]
    data = from_tables(table, items={"item_id": [5, 6, 7, 9], "genres": genres})
    (field,) = data.item_fields
    assert (field.kind, field.width, field.size) == ("multi", 2, 3)
    assert field.vocabulary is not None
    shown = [{str(field.vocabulary.ids[c - 1]) for c in row if c} for row in data.item_features["genres"]]
    assert shown == [set(), {"Drama", "War"}, set(), {"War"}, set()]


def test_multi_valued_rows_are_cut_at_the_documented_length():
    field = Field.fit("tags", np.array([[str(i) for i in range(MAX_VALUES + 9)], ["0"]], object))
    codes = field.encode([[str(i) for i in range(MAX_VALUES + 9)], ["0", None, "new"], "0", None])
    assert codes.shape == (4, MAX_VALUES)
    assert (codes[0] > 0).all()
    zero = field.vocabulary.encode(["0"])[0]
    assert codes[1].tolist() == codes[2].tolist() == [zero] + [0] * (MAX_VALUES - 1)
    assert not codes[3].any()


def test_a_categorical_value_never_seen_is_unknown(table):
    data = from_tables(table, users={"user_id": [10, 20, 30], "job": ["cook", None, "poet"]})
    (field,) = data.user_fields
    codes = data.user_features["job"]
    assert codes.tolist() == [0, 1, 0, 2]
    assert field.encode(["poet", "pilot", None, float("nan"), "cook"]).tolist() == [2, 0, 0, 0, 1]


def test_an_attribute_without_any_value_is_unknown_everywhere(table):
    data = from_tables(table, users={"user_id": [10, 20, 30], "job": [None, None, None]})
    assert data.user_features["job"].tolist() == [0, 0, 0, 0]


def test_an_attribute_of_mixed_or_other_types_is_named(table):
    with pytest.raises(DataError, match=r"users: column 'x' mixes .*row 1"):
        from_tables(table, users={"user_id": [10, 20], "x": [1, "two"]})
    with pytest.raises(DataError, match="'x' holds date"):
        from_tables(table, users={"user_id": [10], "x": [datetime.date(2020, 1, 1)]})


# Files


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("strings", [False, True])
def test_files_give_what_the_table_gives(table, kind, strings, tmp_path, assert_same_data):
    if strings:
        table["item_id"] = np.array([f'a "quoted", {i}' for i in table["item_id"]])
    frame, path = pd.DataFrame(table), tmp_path / f"ratings.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    assert_same_data(from_tables(read_table(path)), from_tables(table))


def test_files_without_ratings_are_positive_only(table, tmp_path, assert_same_data):
    del table["rating"]
    path = tmp_path / "plays.csv"
    pd.DataFrame(table).to_csv(path, index=False)
    assert load(path).rating.tolist() == [1.0] * 5
    assert_same_data(load(path), from_tables(table))


def test_a_truncated_parquet_file_is_named(table, tmp_path):
    path = tmp_path / "ratings.parquet"
    pd.DataFrame(table).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"ratings\.parquet.*cut short"):
        read_table(path)


@pytest.mark.parametrize("end", ["20,7", "20,7,", '20,"7'])
def test_a_csv_file_cut_in_its_last_row_is_named(tmp_path, end):
    path = tmp_path / "ratings.csv"
    path.write_text(f"user_id,item_id,rating,timestamp\n10,5,3,1\n{end}")
    with pytest.raises(DataError, match=r"ratings\.csv.*cut short"):
        read_table(path)


def test_a_whole_csv_file_needs_no_last_line_break(tmp_path, assert_same_data):
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    path.write_text('user_id,item_id,rating\n10,"x, y",3\n20,"x, y",4')
    other.write_text('user_id,item_id,rating\n10,"x, y",3\n20,"x, y",4\n')
    assert_same_data(from_tables(read_table(path)), from_tables(read_table(other)))


def test_a_file_that_is_not_there_or_not_a_table_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "table.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"table\.xlsx.*'\.xlsx'.*\.parquet"):
        read_table(tmp_path / "table.xlsx")
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.csv"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"user_id,item_id\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"binary\.csv"):
        read_table(tmp_path / "binary.csv")


def test_json_lines_are_read_and_a_cut_or_mixed_file_is_told(tmp_path):
    path = tmp_path / "ratings.jsonl"
    lines = ['{"user_id": "ann", "item_id": 1, "rating": 3}', '{"user_id": "bob", "item_id": 2, "rating": 4.5}']
    path.write_text("\n".join(lines) + "\n")
    data = from_tables(read_table(path))
    assert data.users.ids.tolist() == ["ann", "bob"]
    assert data.rating.tolist() == [3, 4.5]
    assert load(path).rating.tolist() == [3, 4.5]
    path.write_text("\n".join(lines)[:-12])
    with pytest.raises(DataError, match=r"ratings\.jsonl"):
        read_table(path)
    path.write_text(lines[0] + '\n{"user_id": 7, "item_id": "x", "rating": "good"}\n')
    with pytest.raises(DataError, match=r"rating|user_id|cannot be read"):
        from_tables(read_table(path))
