"""What must hold for every model that reads histories: time's direction, padding, order, and adaptation on top."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.data.fields import Field
from metarec_jax.models.attention import HSTUBlock, TransformerBlock
from metarec_jax.models.sequence import GRU
from metarec_jax.types import Examples, History, Task

LOSS = optax.losses.sigmoid_binary_cross_entropy
FIELDS = {
    "item_id": Field("item_id", "categorical", 12, 1),
    "item/genres": Field("genres", "multi", 6, 3),
    "item/year": Field("year", "dense", 1, 1),
    "user/age": Field("age", "categorical", 5, 1),
}
READERS = ("gru", "transformer", "hstu")


@pytest.fixture(params=READERS)
def model(request):
    return mr.models.MODELS[request.param](FIELDS, width=4, layers=2)


def examples(seed=0, users=3, count=6):
    """Interactions in shuffled places; `order` has gaps."""
    rng = np.random.default_rng(seed)
    features = {
        "item_id": rng.integers(1, 12, (users, count)).astype(np.int32),
        "item/genres": rng.integers(0, 6, (users, count, 3)).astype(np.int32),
        "item/year": rng.normal(size=(users, count, 1)).astype(np.float32),
        "user/age": np.repeat(rng.integers(0, 5, (users, 1)), count, 1).astype(np.int32),
        "order": np.stack([rng.permutation(3 * count)[:count] for _ in range(users)]).astype(np.int32),
    }
    return Examples(
        features, (rng.random((users, count)) < 0.5).astype(np.float32), np.ones((users, count), np.float32)
    )


def drawn(model):
    """Parameters away from their initial zeros."""
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    return jax.tree.map(lambda x: x + 0.3 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def own_places(support):
    return np.broadcast_to(np.arange(support.mask.shape[1], dtype=np.int32), support.mask.shape)


def of_support(model, params, support, past=None):
    """Scores of the support set, each example with the others as its past."""
    past = support if past is None else past
    return np.asarray(jax.jit(model.apply)(params, History(support.features, past, own_places(support))))


def of_query(model, params, support, query):
    own = np.full(query.mask.shape, -1, np.int32)
    return np.asarray(jax.jit(model.apply)(params, History(query.features, support, own)))


def test_an_interaction_is_scored_from_the_earlier_ones_only(model):
    support, query, params = examples(), examples(1, count=2), drawn(model)
    before, order = of_support(model, params, support), support.features["order"]
    rows = np.arange(3)
    for rank in range(6):
        at = np.argsort(order, 1)[:, rank]
        target, item, year = (
            np.array(a) for a in (support.target, support.features["item_id"], support.features["item/year"])
        )
        target[rows, at], item[rows, at], year[rows, at] = 1 - target[rows, at], 1 + item[rows, at] % 11, 7.0
        past = Examples(support.features | {"item_id": item, "item/year": year}, target, support.mask)
        after = of_support(model, params, support, past)
        later = order > order[rows, at][:, None]
        np.testing.assert_array_equal(after[~later], before[~later])  # itself included
        assert (np.abs(after - before)[later] > 1e-6).all()
        assert (np.abs(of_query(model, params, past, query) - of_query(model, params, support, query)) > 1e-7).all()


def test_time_is_the_feature_order_and_not_the_place(model):
    support, query, params = examples(), examples(1, count=2), drawn(model)
    shuffle = np.random.default_rng(0).permutation(6)
    shuffled = jax.tree.map(lambda x: x[:, shuffle], support)
    np.testing.assert_allclose(
        of_support(model, params, shuffled), of_support(model, params, support)[:, shuffle], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        of_query(model, params, shuffled, query), of_query(model, params, support, query), rtol=1e-5, atol=1e-6
    )
    timeless = support._replace(features={k: v for k, v in support.features.items() if k != "order"})
    by_place = support._replace(features=support.features | {"order": own_places(support)})
    np.testing.assert_array_equal(of_query(model, params, timeless, query), of_query(model, params, by_place, query))


def test_padding_reaches_no_score_and_no_gradient_even_when_it_is_nan(model):
    support, query, params = examples(), examples(1, count=2), drawn(model)

    def pad(x, value):
        filled = np.full((3, 4, *x.shape[2:]), value if np.issubdtype(x.dtype, np.floating) else 0, x.dtype)
        return np.concatenate([filled[:, :2], x, filled[:, 2:]], 1)

    padded = jax.tree.map(partial(pad, value=np.nan), support)._replace(mask=pad(support.mask, 0.0))
    np.testing.assert_allclose(
        of_query(model, params, padded, query), of_query(model, params, support, query), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        of_support(model, params, padded)[:, 2:8], of_support(model, params, support), rtol=1e-5, atol=1e-6
    )
    own = np.full((3, 2), -1, np.int32)
    one, two = (
        jax.jit(jax.grad(lambda p, past=past: (model.apply(p, History(query.features, past, own)) ** 2).sum()))(params)
        for past in (support, padded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), two, one)


def test_features_without_a_history_are_those_of_a_user_without_a_past(model):
    query, params = examples(1, count=2), drawn(model)
    plain = jax.jit(model.apply)(params, query.features)
    empty = examples()._replace(mask=np.zeros((3, 6), np.float32))
    np.testing.assert_allclose(of_query(model, params, empty, query), plain, rtol=1e-5, atol=1e-6)
    nothing = jax.tree.map(lambda x: x[:, :0], empty)
    np.testing.assert_allclose(of_query(model, params, nothing, query), plain, rtol=1e-5, atol=1e-6)


def test_one_user_and_a_batch_of_users_agree(model):
    support, params = examples(), drawn(model)
    batch = History(support.features, support, own_places(support))
    for function, shape in ((model.apply, (3, 6)), (model.embed, (3, 6, model.width))):
        function = jax.jit(function)
        together = function(params, batch)
        assert together.shape == shape
        for u in range(3):
            alone = function(params, jax.tree.map(lambda x, u=u: x[u], batch))
            np.testing.assert_allclose(alone, together[u], rtol=1e-5, atol=1e-6)


ON_TOP = [(name, reader) for name in ("ridge", "maml", "melu", "anil", "in_context") for reader in READERS]
SOME = [("ridge", "gru"), ("maml", "transformer"), ("in_context", "hstu")]


@pytest.mark.parametrize(
    ("name", "reader"), [x if x in SOME else pytest.param(*x, marks=pytest.mark.grid) for x in ON_TOP]
)
def test_strategies_adapt_on_top_of_them(reader, name):
    model = mr.models.MODELS[reader](FIELDS, width=4)
    options = {"steps": 1} if name in ("maml", "melu", "anil") else {}
    strategy = mr.with_history(mr.STRATEGIES[name](model, loss=LOSS, **options))
    params = jax.jit(strategy.init)(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(lambda p, task: strategy.loss(p, task, jax.random.key(0))[0]))
    support = examples()
    few = support._replace(mask=support.mask * np.array([[1.0], [0.0], [1.0]], np.float32))
    with warnings.catch_warnings():
        if reader == "gru" and name in ("maml", "melu"):  # a loop over time has no factored form: told, and right
            warnings.simplefilter("ignore", core.fastweights.PlainFormWarning)
        value, gradient = loss(params, Task(few, examples(1, count=2)))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("reader", ["transformer", "hstu"])
def test_adapted_layers_stay_factored_and_agree_with_weights_of_each_users_own(reader):
    model, support, query = mr.models.MODELS[reader](FIELDS, width=32), examples(), examples(1, count=2)
    params = drawn(model)
    groups = model.groups(params)
    flags = jax.tree.map(lambda group: group == "decision", groups)
    given = support._replace(features=History(support.features, support, own_places(support)))
    asked = History(query.features, support, np.full((3, 2), -1, np.int32))

    @partial(jax.jit, static_argnames="form")
    def adapted(form):
        own = core.adapt(model.apply, params, given, loss=LOSS, adapted=flags, steps=2, form=form)
        return own, core.predict(model.apply, params, own, asked)

    (factored, one), (_, two) = adapted("auto"), adapted("plain")
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    formed = [e.value[0].size for e in factored.leaves if isinstance(e, core.fastweights.Explicit)]
    assert max(formed) < 32 * 32  # biases, norms and small tables; no layer


def test_recurrent_weights_are_held_for_each_user_and_the_warning_says_so():
    model, support = mr.models.gru(FIELDS, width=4), examples()
    strategy = mr.with_history(mr.melu(model, loss=LOSS, steps=1))
    with pytest.warns(core.fastweights.PlainFormWarning, match="scan"):
        jax.eval_shape(lambda key: strategy.adapt(strategy.init(key), support, key), jax.random.key(0))


def test_gru_states_follow_the_recurrence():
    """Cho et al., 2014, in the form with the reset gate behind the recurrent product."""
    encoder, x = GRU(4, 1, nnx.Rngs(0)), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    cell = nnx.to_pure_dict(nnx.state(encoder))["cells"][0]
    kernel, bias, recurrent = (
        np.asarray(a) for a in (cell["dense_i"]["kernel"], cell["dense_i"]["bias"], cell["dense_h"]["kernel"])
    )

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    h, states = np.zeros(4), [np.zeros(4)]
    for token in x:
        (xr, xz, xn), (hr, hz, hn) = np.split(token @ kernel + bias, 3), np.split(h @ recurrent, 3)
        update = sigmoid(xz + hz)
        h = (1 - update) * np.tanh(xn + sigmoid(xr + hr) * hn) + update * h
        states.append(h)
    np.testing.assert_allclose(encoder(x, jnp.arange(5)), states, rtol=1e-4, atol=1e-5)


def test_transformer_block_is_causal_softmax_attention():
    block, x = TransformerBlock(4, 2, nnx.Rngs(0)), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    attention = nnx.to_pure_dict(nnx.state(block.attention))
    query, key, value = (
        np.einsum("td,dhk->thk", normed(x), np.asarray(attention[n]["kernel"])) for n in ("query", "key", "value")
    )
    scores = np.einsum("ihk,jhk->hij", query, key) / 2**0.5
    weights = np.exp(scores) * np.tril(np.ones((5, 5)))
    weights /= weights.sum(-1, keepdims=True)
    y = x + np.einsum("hij,jhk,hkd->id", weights, value, np.asarray(attention["out"]["kernel"]))
    wide = np.maximum(normed(y) @ np.asarray(block.wide.kernel[...]), 0)
    np.testing.assert_allclose(
        block(x, jnp.arange(5)), y + wide @ np.asarray(block.narrow.kernel[...]), rtol=1e-3, atol=1e-4
    )


def test_hstu_block_follows_equations_1_to_3():
    block, rng = HSTUBlock(4, 2, nnx.Rngs(0)), np.random.default_rng(0)
    for table in (block.distance, block.gap):
        table.embedding[...] = jnp.asarray(rng.normal(size=table.embedding.shape).astype(np.float32))
    distance, gap = np.asarray(block.distance.embedding[...]), np.asarray(block.gap.embedding[...])
    x, order = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 1, 3, 10, 80], np.int32)

    def silu(a):
        return a / (1 + np.exp(-a))

    u, v, q, k = np.split(silu(normed(x) @ np.asarray(block.project.kernel[...])), 4, -1)
    read = np.zeros((5, 4))
    for h, cut in enumerate((slice(0, 2), slice(2, 4))):
        for i in range(5):
            for j in range(i + 1):
                bias = distance[i - j, h] + gap[int(np.log2(1 + order[i] - order[j])), h]
                read[i, cut] += silu(q[i, cut] @ k[j, cut] / 2**0.5 + bias) * v[j, cut]
    expected = x + (normed(read) * u) @ np.asarray(block.out.kernel[...])
    np.testing.assert_allclose(block(x, jnp.asarray(order)), expected, rtol=1e-3, atol=1e-4)


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_adapting_a_transformer_never_forms_the_users_weights():
    """Peak temporary memory of a second-order meta-gradient, from the compiler: a fraction of what copies take."""
    users, model = 64, mr.models.transformer(FIELDS, width=256, layers=1, heads=4)
    strategy = mr.with_history(mr.melu(model, loss=LOSS, steps=1, learn_step_size=False))
    params = jax.eval_shape(strategy.init, jax.random.key(0))
    task = Task(examples(users=users, count=4), examples(1, users=users, count=2))
    gradient = jax.jit(jax.grad(lambda p, task: strategy.loss(p, task, jax.random.key(0))[0]))
    memory = gradient.lower(params, task).compile().memory_analysis()
    copies = 4 * users * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < copies / 4


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        mr.models.transformer(FIELDS, width=8, heads=3)
    for name in READERS:
        with pytest.raises(ValueError, match="layers"):
            mr.models.MODELS[name](FIELDS, layers=0)
    with pytest.raises(ValueError, match="not the user's"):
        mr.models.gru({"user/age": FIELDS["user/age"]})
