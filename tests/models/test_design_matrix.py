"""The design matrix of closed-form learners: one column a code, numbers and their squares, and no parameters."""

import jax
import numpy as np

import metarec_jax as mr
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import ITEM, STATISTICS
from metarec_jax.models.design_matrix import MOST, design

FIELDS = {
    "item_id": Field("item_id", "categorical", 9, 1),
    "item/kind": Field("kind", "categorical", 4, 1),
    "item/tags": Field("tags", "multi", 4, 3),
    "item/price": Field("price", "dense", 0, 2),
    ITEM + STATISTICS: Field(STATISTICS, "dense", 0, 2),
    "user/country": Field("country", "categorical", 3, 1),
    "context/device": Field("device", "categorical", 5, 1),
}


def test_columns_are_codes_shares_of_codes_numbers_and_squares():
    model, rng = design(FIELDS), np.random.default_rng(0)
    kind, tags = np.array([[1, 3, 0]]), np.array([[[1, 3, 0], [2, 2, 2], [0, 0, 0]]])
    price = rng.normal(size=(1, 3, 2)).astype(np.float32)
    features = {"item_id": np.array([[4, 5, 0]]), "item/kind": kind, "item/tags": tags, "item/price": price}
    features |= {ITEM + STATISTICS: price, "user/country": np.array([[2, 2, 2]]), "context/device": kind}
    one_hot = np.eye(4)[kind[0]] * (kind[0] > 0)[:, None]  # an unknown code is in no column
    shares = np.array([[0, 0.5, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 0]])
    expected = np.concatenate([np.ones((3, 1)), one_hot, shares, price[0], price[0] ** 2], 1)
    found = model.embed({}, features)
    assert found.shape[-1] == model.width
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    np.testing.assert_allclose(model.profile.apply({}, features)[0], [[1, 0, 0, 1]] * 3)
    assert model.profile.width == 4
    assert model.items == 9
    assert not np.asarray(model.apply({}, features)).any()


def test_it_has_no_parameters_and_is_what_the_closed_form_learners_need():
    model = design(FIELDS)
    for params in (model.init(jax.random.key(0)), model.profile.init(jax.random.key(0))):
        assert not jax.tree.leaves(params)
    for name in ("ials", "ease", "content", "stack"):
        assert mr.strategies.RANKING[name](model).ranks


def test_codes_beyond_the_last_column_share_columns():
    fields = {"item_id": FIELDS["item_id"], "item/brand": Field("brand", "categorical", MOST + 10, 1)}
    model = design(fields)
    assert model.width == 1 + MOST
    codes = np.array([[1, MOST + 1, MOST - 1]])
    found = np.asarray(model.embed({}, {"item_id": codes % 9, "item/brand": codes}))[0]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found.sum(1), 2)
    assert found[2, MOST] == 1
