"""Scales and tails of numbers against plain formulas."""

import numpy as np
import polars as pl
import pytest

import metarec_jax as mr
from metarec_jax.data.cleaning import clean, rating_between
from metarec_jax.data.fields import Field
from metarec_jax.data.normalise import centre_users, knots, rescale, transformed
from metarec_jax.errors import DataError


@pytest.mark.parametrize(
    ("source", "target", "given", "expected"),
    [
        ("percent", "stars", [0, 25, 100], [1, 2, 5]),
        ("ten", "stars", [0, 5, 10], [1, 3, 5]),
        ("thumbs", "unit", [-1, 0, 1], [0, 0.5, 1]),
        ((5, 1), (1, 5), [1, 4, 5], [5, 2, 1]),
        ((1, 7), "ten", [1, 4, 7], [0, 5, 10]),
    ],
)
def test_ratings_go_from_one_scale_to_another(source, target, given, expected):
    rows = {"user_id": [1, 2, 3], "item_id": [1, 2, 3], "rating": given}
    data = mr.data.from_tables(rows, clean=[rescale(source, target)])
    np.testing.assert_allclose(data.rating, expected)
    assert data.report["rescale"] == sum(g != e for g, e in zip(given, expected, strict=True))


def test_a_rating_off_its_scale_is_refused_unless_dropped_first():
    rows = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "rating": [50.0, 101.0, -1.0]}
    with pytest.raises(DataError, match=r"rating 101.0 is outside 0 to 100 \(2 such rows\)"):
        mr.data.from_tables(rows, clean=[rescale("percent")])
    data = mr.data.from_tables(rows, clean=[rating_between(0, 100), rescale("percent")])
    assert data.rating.tolist() == [3.0]


@pytest.mark.parametrize("scale", ["likes", (1, 1), (0, np.inf)])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        rescale(scale)


def test_a_users_centre_is_the_shrunk_mean_of_earlier_ratings_only():
    rng = np.random.default_rng(0)
    users, times, ratings = rng.integers(3, size=40), rng.permutation(40), rng.integers(1, 6, 40).astype(float)
    table = pl.DataFrame({"user_id": users, "item_id": np.arange(40), "rating": ratings, "timestamp": times})
    centred = clean(table, [centre_users(3.0, weight=2.0)])[0]
    expected = []
    for u, t, r in zip(users, times, ratings, strict=True):
        before = [y for v, s, y in zip(users, times, ratings, strict=True) if v == u and s < t]
        expected.append(r - (2 * 3 + sum(before)) / (2 + len(before)))
    np.testing.assert_allclose(centred["rating"], expected)
    assert centred["item_id"].to_list() == list(range(40))


def test_the_log_keeps_sign_and_order_and_missing_values():
    x = np.array([[-1e6], [-1], [0], [np.nan], [1e6]])
    expected = [-np.log1p(1e6), -np.log(2), 0, np.nan, np.log1p(1e6)]
    np.testing.assert_allclose(transformed(x, "log", None)[:, 0], expected)


def test_quantiles_are_shares_and_ties_share_the_middle():
    x = np.random.default_rng(0).lognormal(size=(10_000, 1))
    share = transformed(x, "quantile", knots(x, "quantile"))[:, 0]
    exact = (x[:, 0].argsort().argsort() + 0.5) / len(x)
    np.testing.assert_allclose(share, exact, atol=0.01)  # percentiles
    ties = np.array([[0.0]] * 50 + [[1.0]] * 50)
    assert transformed(np.array([[0.0], [1.0], [9.0], [-9.0]]), "quantile", knots(ties, "quantile"))[:, 0] == (
        pytest.approx([0.25, 0.75, 0.75, 0.25], abs=0.01)
    )


@pytest.mark.parametrize("transform", ["log", "clip", "quantile"])
def test_one_huge_value_no_longer_drowns_the_others(transform):
    values = np.append(np.random.default_rng(0).exponential(size=999), 1e9)
    plain = Field.fit("price", values).encode(values)
    field = Field.fit("price", values, transform=transform)
    assert plain[:-1].std() < 1e-6 < 0.1 < field.encode(values)[:-1].std()
    encoded = field.encode(values)
    np.testing.assert_allclose([encoded.mean(), encoded.std()], [0, 1], atol=1e-5)
    order = np.argsort(values)
    assert (np.diff(encoded[order, 0]) >= 0).all()
    assert field.encode([None])[0, 0] == 0


def test_bins_span_every_piecewise_linear_function_of_the_number_clipped_at_its_ends():
    values = np.random.default_rng(0).lognormal(size=2000)
    field = Field.fit("price", values, transform="bins")
    at = np.quantile(values, np.linspace(0, 1, 9))
    probe = np.concatenate([np.geomspace(at[0], at[-1], 50), [0.0, 1e9]])
    worth = np.random.default_rng(1).normal(size=9)
    bins = field.encode(probe)
    np.testing.assert_allclose(bins @ worth, np.interp(probe, at, worth), atol=1e-5)
    np.testing.assert_allclose(bins.sum(1), 1, atol=1e-6)
    assert ((bins > 0).sum(1) <= 2).all()
    assert (field.encode([None]) == 0).all()


def test_bins_of_few_distinct_values_and_of_vectors():
    field = Field.fit("rooms", np.array([1.0, 1, 1, 2, 2, 3]), transform="bins")
    assert len(np.unique(field.encode(np.array([1.0, 2, 3])), axis=0)) == 3
    pair = Field.fit("place", np.random.default_rng(0).normal(size=(50, 2)), transform="bins")
    assert pair.encode(np.zeros((3, 2))).shape == (3, 18) == (3, pair.width)
    with pytest.raises(DataError, match="row 0 has 3 values where the others have 2"):
        pair.encode(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="not for a multimodal vector"):
        Field.fit("poster", np.random.default_rng(0).normal(size=(9, 4)), kind="multimodal", transform="bins")


def test_the_transform_of_a_number_is_learned_where_a_line_cannot_follow(tmp_path):
    """Items are liked when their price is neither low nor high: bins find it, a line cannot; and they are saved."""
    rng = np.random.default_rng(0)
    price = rng.lognormal(size=200)
    liked = (np.abs(np.argsort(np.argsort(price)) - 100) < 50).astype(float)
    users = np.repeat(np.arange(80), 50)
    items = np.concatenate([rng.permutation(200)[:50] for _ in range(80)])
    table = {"user_id": users, "item_id": items, "rating": liked[items]}
    protocol = mr.Scenario("cold item", new=0.3, query=6, minimum=8, target="click", threshold=1.0)
    found = {}
    for transform in (None, "bins"):
        stock = {"item_id": np.arange(200), "price": price}
        data = mr.data.from_tables(table, items=stock, fields={"price": {"transform": transform}})
        trained = mr.train(data, protocol=protocol, epochs=10, progress=False, buckets=1)
        found[transform] = trained.evaluate(baselines=False)["alpaca"]["auc"]
    assert found["bins"] > found[None] + 0.15
    trained.save(tmp_path / "model")
    assert mr.load(tmp_path / "model").recommend({1: 1.0}, k=3) == trained.recommend({1: 1.0}, k=3)


def test_an_unknown_transform_or_one_of_text_is_refused():
    with pytest.raises(ValueError, match="one of log, clip, quantile, bins, got 'sqrt'"):
        Field.fit("price", np.arange(3.0), transform="sqrt")
    with pytest.raises(ValueError, match="for numbers, this field is categorical"):
        Field.fit("job", np.array(["a"]), transform="log")
