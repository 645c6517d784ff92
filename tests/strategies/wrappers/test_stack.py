"""Stack and content: weighted sums of members, and what the fields of a user's items have in common."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.strategies.catalogue import adapt, score, score_shared
from metarec_jax.strategies.observed import tables
from metarec_jax.strategies.wrappers.stack import default_options
from metarec_jax.tasks.observed import observe
from metarec_jax.tasks.ranking import Known


@pytest.fixture(scope="module")
def made():
    """Data, what the training users did, target, and the support of three users."""
    data = mr.data.synthetic(users=60, items=40)
    protocol = mr.StrongGeneralisation(threshold=3.5)
    split = protocol.split(data, 0)
    target = mr.tasks.Target.fit(protocol, split.train, graded=False)
    known = Known.blank(3, 8, (), ())
    known.items[0, :3], known.target[0, :3], known.weight[0, :3] = [3, 7, 9], [1, 1, 0], 1
    known.items[1, 0], known.target[1, 0], known.weight[1, 0] = 5, 1, 1
    return data, observe(split.train, target), known


def with_tables(strategy, observed):
    return {**jax.jit(strategy.init)(jax.random.key(0)), "tables": jax.device_put(tables(strategy, observed))}


def test_a_stack_is_the_weighted_sum_of_its_members(made):
    data, observed, known = made
    model = mr.models.design(mr.models.fields_of(data))
    members = [
        mr.ials(model, rank=4, sweeps=2),
        mr.ease(model, penalty=20.0),
        mr.content(model),
        mr.transitions(model, size=10, steps=5),
        mr.item_knn(model, neighbours=10),
    ]
    stacked = mr.stack(model, members=members)
    params = with_tables(stacked, observed)
    params["weights"] = [jnp.full(3, 0.01 * i) for i in range(len(members))]
    items = params["tables"]["items"]

    @partial(jax.jit, static_argnums=0)
    def scored(strategy, params):
        return score_shared(strategy, params, adapt(strategy, params, items, known), known, items)

    found = np.asarray(scored(stacked, params))
    wanted = 0
    for i, member in enumerate(members):
        own = with_tables(member, observed)
        scores = scored(member, own)
        count = np.array([2.0, 1.0, 0.0])
        log = np.log1p(count)
        delta = 10 * 0.01 * i * (1 + (log / 2 - 1) + (2 / (1 + count) - 0.3))
        wanted += np.asarray(scores) * np.exp(np.asarray(delta))[:, None] / len(members)
    wanted -= 0.15 * np.asarray(params["tables"]["log_popularity"])
    np.testing.assert_allclose(found[:, 1:], wanted[:, 1:], rtol=2e-4, atol=2e-4)
    rows = jnp.broadcast_to(jnp.arange(41), (3, 41))
    each = jax.jit(lambda params: score(stacked, params, items, adapt(stacked, params, items, known), known, rows))
    np.testing.assert_allclose(each(params), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("items", "members", "dense"), [(1_000, 3, True), (5_000, 5, True), (50_000, 5, False)])
def test_the_members_follow_the_size_of_the_catalogue(made, items, members, dense):
    fields = mr.models.fields_of(made[0])
    strategy = mr.stack(mr.models.design(fields | {"item_id": replace(fields["item_id"], size=items)}))
    assert len(jax.eval_shape(strategy.init, jax.random.key(0))["members"]) == members
    assert default_options("ease", items) == ({} if dense else {"rank": 256})
    assert 20 <= default_options("transitions", items)["size"] <= 200


def test_content_prefers_items_whose_fields_the_user_chose(made):
    data, observed, known = made
    strategy = mr.content(mr.models.design(mr.models.fields_of(data)))
    params = with_tables(strategy, observed)
    items, genre = params["tables"]["items"], data.item_features["genre"]
    scores = np.asarray(score_shared(strategy, params, adapt(strategy, params, items, known), known, items))
    same = genre == genre[5]
    assert scores[1, 1:][same[1:]].min() > scores[1, 1:][~same[1:]].max()


def test_content_adapts_as_its_formula_says(made):
    data, observed, known = made
    model = mr.models.design(mr.models.fields_of(data))
    strategy = mr.content(model, shrink=2.0)
    params = with_tables(strategy, observed)
    x = np.asarray(model.embed({}, observed.features), np.float64)
    count = np.bincount(observed.item[observed.positive], minlength=41)
    mean = count @ x / count.sum()
    deviation = np.sqrt(count @ (x - mean) ** 2 / count.sum())
    z = np.where(deviation > 1e-6, (x - mean) / np.maximum(deviation, 0.05), 0)
    profile = (z[3] + z[7] - 0.3 * z[9]) / (2.0 + 2.3)
    adapted = adapt(strategy, params, params["tables"]["items"], known)
    np.testing.assert_allclose(adapted.columns[0], 0.02 * profile, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(adapted.columns[2], 0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"members": ("luck",)}, "unknown"), ({"members": ()}, "need a member"), ({"options": [{}]}, "need a member")],
)
def test_bad_members_are_refused(made, options, message):
    model = mr.models.design(mr.models.fields_of(made[0]))
    with pytest.raises(ValueError, match=message):
        mr.stack(model, **options)
    with pytest.raises(ValueError, match="must rank"):
        mr.stack(model, members=[mr.ridge(mr.models.linear(mr.models.fields_of(made[0])))])
