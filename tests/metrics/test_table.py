"""Table: what is printed, and data frames."""

import doctest
import re

import metarec_jax as mr
from metarec_jax.metrics import table
from metarec_jax.metrics.table import Table

PLAIN = ("item-kNN", "EASE", "iALS")
FOUND = Table({"ials": {"auc": 0.75, "rmse": 1.0}, "popularity": {"auc": 0.5}})


def test_the_example_prints_what_it_says():
    assert doctest.testmod(table).failed == 0


def test_it_is_a_dict_and_becomes_data_frames():
    assert FOUND["ials"]["auc"] == 0.75
    frame = FOUND.to_polars()
    assert frame.columns == ["learner", "auc", "rmse"]
    assert frame.rows() == [("ials", 0.75, 1.0), ("popularity", 0.5, None)]
    assert FOUND.to_pandas().loc["popularity", "auc"] == 0.5
    assert "<table" in FOUND._repr_html_()
    assert str(Table()) == ""


def test_evaluate_prints_itself():
    data = mr.data.synthetic(users=100, items=40)
    recommender = mr.train(data, "ease", epochs=1, progress=False, ratings=None)
    shown = str(recommender.evaluate(support=1))
    assert re.split(" {2,}", shown.splitlines()[0].strip()) == [
        "ease",
        "popularity",
        *(f"{n} + popularity" for n in PLAIN),
    ]
    assert shown.splitlines()[1].startswith("ndcg@100, 1 known")
