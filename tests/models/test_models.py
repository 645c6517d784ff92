"""The feature-field networks against their equations in numpy, and what every one of them promises to strategies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.data.fields import Field
from metarec_jax.models import deepfm, fm, linear, mlp, pretrained, two_tower

MAKERS = {"linear": linear, "mlp": mlp, "fm": fm, "deepfm": deepfm, "two_tower": two_tower}
FIELDS = {
    "item_id": Field("item_id", "categorical", 7, 1),
    "item/genres": Field("genres", "multi", 5, 3),
    "item/vector": Field("vector", "dense", 1, 2),
    "user/job": Field("job", "categorical", 4, 1),
    "user/age": Field("age", "dense", 1, 1),
}
LEADING = (2, 3)


def features(seed=0):
    r = np.random.default_rng(seed)
    found = {}
    for name, field in FIELDS.items():
        if field.kind == "dense":
            found[name] = r.normal(size=(*LEADING, field.width)).astype(np.float32)
        else:
            shape = LEADING if field.kind == "categorical" else (*LEADING, field.width)
            found[name] = r.integers(field.size, size=shape).astype(np.int32)
    return found


def random_params(model, seed=0):
    """Every parameter away from its initial value, so that no term is hidden by a zero."""
    r = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(r.normal(size=a.shape) / 2, jnp.float32), shapes)


def vector(layer, x, kind):
    """What a field's layer says, in numpy: `[..., width]`."""
    layer = jax.tree.map(np.asarray, layer)
    if kind == "dense":
        return x @ layer["kernel"] + layer.get("bias", 0)
    rows = layer["embedding"][x]
    if kind == "categorical":
        return rows
    count = (x > 0).sum(-1)[..., None]
    return np.where(count > 0, (rows * (x > 0)[..., None]).sum(-2) / np.maximum(count, 1), 0)


def vectors(params, x, table="embedding"):
    """`[..., width]` of each field, in the order of the fields."""
    return {n: vector(params[table][n], x[n], f.kind) for n, f in FIELDS.items() if n in params[table]}


def biases(params, x):
    return sum(vectors(params, x, "embedding_bias").values())[..., 0] + np.asarray(params["head"]["bias"])[0]


def layers(x, stack, last=True):
    """ReLU layers; the last is linear if `last`."""
    stack = [jax.tree.map(np.asarray, stack[i]) for i in sorted(stack)]
    for i, layer in enumerate(stack):
        x = x @ layer["kernel"] + layer["bias"]
        x = x if last and i == len(stack) - 1 else np.maximum(x, 0)
    return x


def test_the_machine_is_the_double_sum_over_pairs_of_fields_and_the_user():
    model, x = fm(FIELDS, width=3), features()
    params = random_params(model)
    v = vectors(params, x)
    v["the user"] = np.broadcast_to(np.asarray(params["head"]["kernel"])[:, 0], (*LEADING, 3))
    expected = biases(params, x)
    names = list(v)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            if two == "the user" and one.startswith("user/"):
                continue  # one number for each user: the head's bias
            expected = expected + (v[one] * v[two]).sum(-1)
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_the_deep_machine_adds_an_mlp_on_the_same_vectors():
    model, plain, x = deepfm(FIELDS, width=3, hidden=(6, 5)), fm(FIELDS, width=3), features()
    params = random_params(model)
    kernel = np.asarray(params["head"]["kernel"])
    machine = {**params, "head": {**params["head"], "kernel": kernel[:3]}}
    del machine["layers"]
    deep = layers(np.concatenate(list(vectors(params, x).values()), -1), params["layers"], last=False)
    expected = plain.apply(machine, x) + (deep @ kernel[3:])[..., 0]
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attributes", [True, False])
def test_two_towers_meet_in_a_product(attributes):
    fields = {name: f for name, f in FIELDS.items() if attributes or not name.startswith("user/")}
    model, x = two_tower(fields, width=3, hidden=(6,)), features()
    params = random_params(model)
    v = vectors(params, x)
    item = layers(np.concatenate([v[n] for n in v if not n.startswith("user/")], -1), params["item"])
    user = np.asarray(params["head"]["kernel"])[:, 0]
    if attributes:
        user = user + layers(np.concatenate([v[n] for n in v if n.startswith("user/")], -1), params["user"])
    expected = (item * user).sum(-1) + biases(params, x)
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.embed(params, x), item, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_a_change_of_the_head_moves_the_score_by_its_product_with_embed(name):
    model, x = MAKERS[name](FIELDS, width=3), features()
    params = random_params(model)
    phi = model.embed(params, x)
    assert phi.shape == (*LEADING, model.width)
    move = random_params(model, seed=1)["head"]
    moved = model.apply({**params, "head": jax.tree.map(jnp.add, params["head"], move)}, x)
    expected = model.apply(params, x) + (phi @ move["kernel"])[..., 0] + move["bias"][0]
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_groups_name_embeddings_layers_and_the_head(name):
    model = MAKERS[name](FIELDS)
    groups = model.groups(jax.eval_shape(model.init, jax.random.key(0)))
    top = {"head": "head", "embedding": "embedding", "embedding_bias": "embedding"}
    for part, below in groups.items():
        assert set(jax.tree.leaves(below)) <= {top.get(part, "decision")}
    assert set(groups["embedding_bias"]) == set(FIELDS)
    assert model.profile.width == 2 * 16


@pytest.mark.parametrize("name", MAKERS)
def test_unknown_and_no_values_score_finitely_and_empty_places_of_a_list_count_for_nothing(name):
    model, x = MAKERS[name](FIELDS), features()
    params = random_params(model)
    nothing = jax.tree.map(np.zeros_like, x)
    assert np.isfinite(model.apply(params, nothing)).all()
    one = {**x, "item/genres": np.broadcast_to(np.array([2, 0, 0], np.int32), (*LEADING, 3))}
    other = {**x, "item/genres": np.broadcast_to(np.array([0, 2, 2], np.int32), (*LEADING, 3))}
    np.testing.assert_allclose(model.apply(params, one), model.apply(params, other), rtol=1e-5, atol=1e-6)


def test_a_model_without_item_fields_is_refused():
    users = {"user/job": FIELDS["user/job"]}
    for make in (fm, deepfm, two_tower):
        with pytest.raises(ValueError, match="need a field of the items"):
            make(users)


def test_pretrained_vectors_are_where_a_model_starts_and_frozen_ones_stay():
    x, key, table = features(), jax.random.key(0), np.arange(21, dtype=np.float32).reshape(7, 3)
    model, path = linear(FIELDS, width=3), "embedding/item_id/embedding"
    own = model.init(key)
    expected = {**own, "embedding": {**own["embedding"], "item_id": {"embedding": table}}}
    for freeze in (False, True):
        given = pretrained(model, {path: table}, freeze=freeze)
        params = given.init(key)
        np.testing.assert_array_equal(given.embed(params, x), model.embed(expected, x))
        np.testing.assert_array_equal(given.apply(params, x), model.apply(expected, x))
        assert any(leaf.shape == (7, 3) for leaf in jax.tree.leaves(params)) != freeze
        assert len(jax.tree.leaves(given.groups(params))) == len(jax.tree.leaves(params))
    with pytest.raises(ValueError, match=r"no parameter 'embedding/film/embedding'; choose from .*embedding/item_id"):
        pretrained(model, {"embedding/film/embedding": table})
    with pytest.raises(ValueError, match=r"is \(7, 3\), the given array \(7, 4\); set `width`"):
        pretrained(model, {path: np.zeros((7, 4))})


def test_frozen_vectors_work_with_strategies_and_training(synthetic):
    vectors = np.random.default_rng(0).normal(size=(len(synthetic.items), 4))

    def model(fields):
        return pretrained(linear(fields, width=4), {"embedding/item_id/embedding": vectors}, freeze=True)

    for strategy in ("ridge", "melu"):
        trained = mr.train(synthetic, strategy, model, objective="click", epochs=1, progress=False, buckets=1)
        assert trained.params["model"]["embedding"]["item_id"]["embedding"] is None
        assert np.isfinite(trained.history[0]["log_loss"])


def test_frozen_item_vectors_of_a_tied_sequence_model_are_read():
    data = mr.data.synthetic(users=60, items=40, seed=0)
    fields = mr.models.fields_of(data)
    network = mr.models.gru(fields, width=4, tied=True)
    start = network.init(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(start)
    tables = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    frozen = pretrained(network, {path: leaf for path, leaf in tables.items() if "item_id" in path}, freeze=True)
    features = mr.tasks.features(data, np.array([1]), np.array([[2, 3]]))
    np.testing.assert_array_equal(
        frozen.vectors(frozen.init(jax.random.key(0)), features), network.vectors(start, features)
    )
