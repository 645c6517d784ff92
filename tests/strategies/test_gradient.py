"""What distinguishes MAML, FOMAML, ANIL, MeLU and Reptile from each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.types import History

LOSS = optax.losses.squared_error


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("maml", {"w1", "b1", "w2", "b2"}),
        ("fomaml", {"w1", "b1", "w2", "b2"}),
        ("reptile", {"w1", "b1", "w2", "b2"}),
        ("melu", {"b1", "w2", "b2"}),
        ("anil", {"w2", "b2"}),
    ],
)
def test_each_adapts_its_own_groups_and_shares_the_rest(name, adapted, task_batch, tiny_model, jitted):
    strategy = jitted(mr.STRATEGIES[name](tiny_model))
    params = strategy.init(jax.random.key(0))
    fast = strategy.adapt(params, task_batch().support, jax.random.key(0))
    own = core.weights(params.get("model", params), fast)
    assert {leaf for leaf, value in own.items() if value is not None} == adapted


def test_fomaml_is_the_query_gradient_at_the_adapted_weights(task_batch, tiny_model, jitted):
    task, key, inner = task_batch(mask=False), jax.random.key(0), optax.sgd(0.1)
    strategy = jitted(mr.fomaml(tiny_model, inner=inner, learn_step_size=False, steps=2))
    params = strategy.init(key)
    fast = core.weights(params["model"], strategy.adapt(params, task.support, key))
    per_user = jax.vmap(jax.grad(lambda w, x, y: LOSS(tiny_model.apply(w, x), y).mean()))
    expected = jax.tree.map(lambda g: g.mean(0), per_user(fast, task.query.features, task.query.target))
    gradient = jax.jit(jax.grad(lambda p: strategy.loss(p, task, key)[0]))(params)["model"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)
    exact = jitted(mr.maml(tiny_model, inner=inner, learn_step_size=False, steps=2))
    second_order = jax.jit(jax.grad(lambda p: exact.loss(p, task, key)[0]))(params)["model"]
    assert not np.allclose(second_order["w1"], gradient["w1"], rtol=1e-2)


def test_reptile_moves_towards_the_mean_of_the_users_own_weights(task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)
    strategy = jitted(mr.reptile(tiny_model, inner=optax.sgd(0.1), steps=3))
    params = strategy.init(key)
    everything = jax.tree.map(lambda s, q: jnp.concatenate([s, q], 1), task.support, task.query)
    own = core.inner.adapt(tiny_model.apply, params, everything, loss=LOSS, steps=3)
    gradient = jax.jit(jax.grad(lambda p: strategy.loss(p, task, key)[0]))(params)
    jax.tree.map(
        lambda g, p, w: np.testing.assert_allclose(g, p - w.mean(0), rtol=1e-4, atol=1e-6),
        gradient,
        params,
        own,
    )


def test_reptile_never_scores_an_example_by_reading_itself(task_batch, tiny_model, jitted):
    def apply(params, features):
        """Score of an example: how often its own target's place is read, all others being hidden."""
        if not isinstance(features, History):
            return jnp.zeros(features.shape[:-1]) + params["b"]
        _, past, own = features
        same = (past.features == features.now[..., :, None, :]).all(-1) & (past.mask > 0)
        readable = own[..., :, None] != jnp.arange(past.mask.shape[-1])
        return params["b"] + (same & readable).sum(-1)

    task = task_batch(mask=False)
    model = mr.Model(lambda key: {"b": jnp.zeros(())}, apply, history=True)
    strategy = jitted(mr.with_history(mr.reptile(model, loss=LOSS, steps=1)))
    value, _ = strategy.loss(model.init(None), task, jax.random.key(0))
    # with no score but the bias, the loss after one step from 0 is that of the bias alone
    target = np.concatenate([task.support.target, task.query.target], 1)
    bias = 2 * 0.0125 * target.mean(1, keepdims=True)
    np.testing.assert_allclose(value, np.mean((bias - target) ** 2), rtol=1e-5)


def test_training_on_the_engine_has_the_loss_curve_of_the_plain_form(synthetic):
    def plain(model, *, loss):
        """MAML on `core.inner`, the reference."""
        inner = functools.partial(core.inner.adapt, model.apply, loss=loss, optimizer=optax.sgd(0.1), steps=2)

        def adapt(params, support, key):
            sizes = jax.tree.map(jnp.exp, params["log_step_size"])
            return inner(params["model"], support, step_size=sizes)

        def predict(params, fast, features):
            return core.inner.predict(model.apply, params["model"], fast, features)

        def meta_loss(params, task, key):
            scores = predict(params, adapt(params, task.support, key), task.query.features)
            return core.query_loss(scores, task.query, loss), {}

        return mr.Strategy(mr.maml(model, loss=loss).init, adapt, predict, meta_loss)

    options = {"objective": "click", "epochs": 3, "progress": False, "seed": 2, "buckets": 1}
    options |= {"model": "mlp", "model_options": {"width": 4}}
    engine, reference = (mr.train(synthetic, s, **options) for s in (functools.partial(mr.maml, steps=2), plain))
    for one, two in zip(engine.history, reference.history, strict=True):
        assert one.keys() == two.keys()
        np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-3)
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)


def test_the_default_inner_step_shrinks_with_the_curvature_of_the_loss():
    def step(loss):
        inner = mr.strategies.gradient.default_inner(loss)
        return inner.update(1.0, inner.init(0.0))[0]

    np.testing.assert_allclose(step(optax.losses.sigmoid_binary_cross_entropy), -0.1, rtol=1e-6)
    np.testing.assert_allclose(step(optax.losses.squared_error), -0.0125, rtol=1e-6)
    np.testing.assert_allclose(step(lambda s, t: jnp.abs(s - t)), -0.1, rtol=1e-6)


def test_learned_step_sizes_start_at_one_and_get_a_gradient(task_batch, tiny_model):
    task, key = task_batch(), jax.random.key(0)
    learned, fixed = mr.maml(tiny_model), mr.maml(tiny_model, learn_step_size=False)
    params = learned.init(key)
    plain = {"model": params["model"]}
    np.testing.assert_allclose(learned.loss(params, task, key)[0], fixed.loss(plain, task, key)[0], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: learned.loss(p, task, key)[0]))(params)["log_step_size"]
    assert all(abs(g) > 1e-6 for g in jax.tree.leaves(gradient))


def test_what_does_not_fit_is_refused_with_what_to_do(tiny_model):
    plain = mr.Model(tiny_model.init, tiny_model.apply)
    with pytest.raises(ValueError, match="needs a model with `groups`"):
        mr.anil(plain)
    with pytest.raises(ValueError, match="choose from embedding, decision, head"):
        mr.maml(tiny_model, groups=("haed",))
    only_head = tiny_model._replace(groups=lambda params: jax.tree.map(lambda _: "head", params))
    with pytest.raises(ValueError, match="no parameters in the groups"):
        mr.maml(only_head, groups=("decision",)).init(jax.random.key(0))
