"""What is exported runs without this package and says the same."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr

CALLER = """
import json, sys
import jax, numpy as np

function = jax.export.deserialize(bytearray(open("recommend.jax", "rb").read()))
described = json.load(open("recommend.json"))
answers = []
for users in (1, 3):
    items = np.zeros((users, described["longest"]), np.int32)
    ratings, weights = np.zeros((2, *items.shape), np.float32)
    for place, (item, rating) in enumerate({100: 5.0, 103: 1.0}.items()):
        items[0, place], ratings[0, place], weights[0, place] = described["items"].index(item), rating, 1
    blank = [
        {name: np.zeros((users, *f["shape"]), f["dtype"]) for name, f in described[side].items()}
        for side in ("user", "context")
    ]
    blank[0]["country"][0] = described["user"]["country"]["values"].index("de")
    scores, rows = function.call(items, ratings, weights, *blank)
    found = zip(np.array(rows), np.array(scores))
    answers.append([[[described["items"][r], float(s)] for r, s in zip(*user)] for user in found])
assert "metarec_jax" not in sys.modules
print(json.dumps(answers))
"""


def test_the_exported_function_recommends_the_same_in_a_fresh_process(stocked, tmp_path):
    stocked.export(tmp_path, k=5, longest=8)
    done = subprocess.run([sys.executable, "-c", CALLER], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, three = json.loads(done.stdout)
    known = stocked.recommend({100: 5.0, 103: 1.0}, k=5, user={"country": "de"})
    nobody = stocked.recommend({}, k=5)
    for found, expected in ((one[0], known), (three[0], known), (three[1], nobody), (three[2], nobody)):
        assert [item for item, _ in found] == [r.item for r in expected]
        np.testing.assert_allclose([score for _, score in found], [r.score for r in expected], rtol=1e-5)


@pytest.mark.parametrize(
    "strategy", ["in_context", *(pytest.param(n, marks=pytest.mark.grid) for n in ("ridge", "melu"))]
)
def test_other_strategies_are_exported_too_for_ratings(strategy, synthetic, tmp_path):
    import jax

    protocol = mr.ColdUsers(target="rating")
    trained = mr.train(synthetic, strategy, protocol=protocol, epochs=1, progress=False, buckets=1)
    trained.export(tmp_path, k=4, longest=8)
    function = jax.export.deserialize(bytearray((tmp_path / "recommend.jax").read_bytes()))
    items, (ratings, weights) = np.zeros((2, 8), np.int32), np.zeros((2, 2, 8), np.float32)
    items[0, :2], ratings[0, :2], weights[0, :2] = trained.stock.encode([1, 2]), [5.0, 1.0], 1
    scores, rows = function.call(items, ratings, weights, {}, {})
    for i, expected in enumerate(trained.batch.recommend([{1: 5.0, 2: 1.0}, {}], k=4)):
        assert trained.stock.decode(np.asarray(rows[i])).tolist() == [r.item for r in expected]
        np.testing.assert_allclose(scores[i], [r.score for r in expected], rtol=1e-4)


def test_item_vectors_are_written_as_a_table(stocked, tmp_path):
    stocked.export_vectors(tmp_path / "items.parquet")
    stocked.export_vectors(tmp_path / "items.npz")
    table, arrays = pl.read_parquet(tmp_path / "items.parquet"), np.load(tmp_path / "items.npz")
    assert table["item_id"].to_list() == arrays["item_id"].tolist() == list(range(100, 150))
    assert table["title"][3] == "Thing 3"
    np.testing.assert_array_equal(np.array(table["vector"].to_list(), np.float32), arrays["vector"])
    assert len(np.unique(arrays["vector"], axis=0)) == 50
    with pytest.raises(ValueError, match=r"written as \.parquet or \.npz"):
        stocked.export_vectors(tmp_path / "items.csv")


def test_bad_sizes_are_refused(stocked, tmp_path):
    for options in ({"k": 0}, {"k": 51}, {"longest": 0}):
        with pytest.raises(ValueError, match="need 1 <= k < 51"):
            stocked.export(tmp_path, **options)
