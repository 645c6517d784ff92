"""What distinguishes plain training, fine-tuning of all or of the head, and low-rank fine-tuning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.strategies.gradient import ALL
from metarec_jax.types import Examples, History, Task

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
FAMILY = ("pretrain", "finetune", "finetune_head", "lora")


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_is_that_of_plain_training_on_all_examples_of_all_users(name, task_batch, tiny_model, jitted):
    task, key = task_batch(mask=False), jax.random.key(0)
    strategy = jitted(mr.STRATEGIES[name](tiny_model, loss=LOGISTIC))
    params = strategy.init(key)
    x, y = (np.concatenate([getattr(e, part) for e in task], 1) for part in ("features", "target"))
    flat_x, flat_y = x.reshape(-1, 3), y.reshape(-1)  # no users: 5 * 11 examples
    value, gradient = jax.value_and_grad(lambda p: LOGISTIC(tiny_model.apply(p, flat_x), flat_y).mean())(
        params["model"]
    )
    got, got_gradient = jax.value_and_grad(lambda p: strategy.loss(p, task, key)[0])(params)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got_gradient, {"model": gradient})


def test_each_user_counts_once_however_many_examples_it_has(task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)
    strategy = jitted(mr.pretrain(tiny_model, loss=LOGISTIC))
    params = strategy.init(key)
    means = []
    for u in range(5):
        kept = [np.asarray(e.mask[u]) > 0 for e in task]
        x, y = (
            np.concatenate([getattr(e, part)[u][k] for e, k in zip(task, kept, strict=True)])
            for part in task[0]._fields[:2]
        )
        means.append(LOGISTIC(tiny_model.apply(params["model"], x), y).mean())
    np.testing.assert_allclose(strategy.loss(params, task, key)[0], np.mean(means), rtol=1e-6)
    step = core.chunked(strategy.loss, 2)
    np.testing.assert_allclose(step(params, task, key)[0], np.mean(means), rtol=1e-6)


def test_plain_training_adapts_nothing_and_the_family_shares_its_parameters(task_batch, tiny_model):
    task, key = task_batch(), jax.random.key(0)
    made = {name: mr.STRATEGIES[name](tiny_model, loss=LOGISTIC) for name in FAMILY}
    params = made["pretrain"].init(key)
    shared = tiny_model.apply(params["model"], task.query.features)
    for name, strategy in made.items():
        jax.tree.map(np.testing.assert_array_equal, strategy.init(key), params)
        got = scores(strategy, params, task.support, task.query.features)
        assert np.allclose(got, shared, atol=1e-6) == (name == "pretrain")
    assert made["pretrain"].adapt(params, task.support, key).size == 0


def test_only_the_head_moves_and_each_step_is_one_of_gradient_descent(task_batch, tiny_model, jitted):
    task, key = task_batch(mask=False), jax.random.key(0)
    strategy = jitted(mr.finetune_head(tiny_model, loss=LOGISTIC, inner=optax.sgd(0.3), steps=2))
    params = strategy.init(key)
    own = core.weights(params["model"], jax.jit(strategy.adapt)(params, task.support, key))
    assert {name for name, leaf in own.items() if leaf is not None} == {"w2", "b2"}
    phi = np.tanh(task.support.features @ np.asarray(params["model"]["w1"]) + np.asarray(params["model"]["b1"]))
    w, b = np.tile(params["model"]["w2"], (5, 1)), np.zeros(5)
    for _ in range(2):
        error = 1 / (1 + np.exp(-(np.einsum("unf,uf->un", phi, w) + b[:, None]))) - task.support.target
        w, b = w - 0.3 * np.einsum("unf,un->uf", phi, error) / 7, b - 0.3 * error.mean(1)
    np.testing.assert_allclose(own["w2"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own["b2"], b, rtol=1e-4, atol=1e-6)


def test_finetuning_moves_every_parameter(task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)
    strategy = jitted(mr.finetune(tiny_model, loss=LOGISTIC))
    params = strategy.init(key)
    own = core.weights(params["model"], jax.jit(strategy.adapt)(params, task.support, key))
    assert all(not np.allclose(own[name], leaf) for name, leaf in params["model"].items())


def test_low_rank_finetuning_is_gradient_descent_on_the_factors_and_the_biases(task_batch, tiny_model, jitted):
    task, key = task_batch(), jax.random.key(0)  # ragged: the mean is over a user's real examples
    strategy = jitted(mr.lora(tiny_model, loss=LOGISTIC, inner=optax.sgd(0.3), steps=3, rank=2, groups=ALL, seed=7))
    params = strategy.init(key)
    fixed = params["model"]
    number = sorted(fixed).index("w1")  # leaves of a dict are sorted
    a = jax.random.normal(jax.random.fold_in(jax.random.key(7), number), (3, 2)) / np.sqrt(3)
    adapted = jax.jit(strategy.adapt)(params, task.support, key)
    scores = jax.jit(strategy.predict)(params, adapted, task.query.features)

    def changed(own):
        return {"w1": fixed["w1"] + own["a"] @ own["b"], **{name: own[name] for name in ("b1", "w2", "b2")}}

    def loss(own, user):
        return (
            LOGISTIC(tiny_model.apply(changed(own), user.features), user.target) * user.mask
        ).sum() / user.mask.sum()

    gradient = jax.jit(jax.grad(loss))
    for u in range(5):
        user = jax.tree.map(lambda x: x[u], task.support)
        own = {"a": a, "b": jnp.zeros((2, 4)), **{name: fixed[name] for name in ("b1", "w2", "b2")}}
        for _ in range(3):
            own = jax.tree.map(lambda w, g: w - 0.3 * g, own, gradient(own, user))
        expected = tiny_model.apply(changed(own), task.query.features[u])
        np.testing.assert_allclose(scores[u], expected, rtol=1e-4, atol=1e-6)
        assert np.linalg.matrix_rank(changed(own)["w1"] - fixed["w1"], tol=1e-6) == 2
    # A, B, vectors, the bias and whether it failed: no user has a W
    assert {leaf.shape[1:] for leaf in jax.tree.leaves(adapted)} == {(3, 2), (2, 4), (4,), ()}


@pytest.mark.parametrize("name", ["finetune", "lora"])
def test_finetuning_tells_users_apart_of_whom_plain_training_learns_nothing(name, tiny_model):
    rng, key, optimizer = np.random.default_rng(0), jax.random.key(0), optax.adam(0.02)

    def task(users):
        sign = rng.choice([-1.0, 1.0], size=(users, 1))
        x = rng.normal(size=(2, users, 16, 3)).astype(np.float32)
        return Task(*(Examples(x, (sign * x[..., 0] > 0).astype(np.float32), np.ones((users, 16))) for x in x))

    options = {"inner": optax.sgd(1.0), "steps": 20} | ({"rank": 2, "groups": ALL} if name == "lora" else {})
    strategy, plain = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC, **options), mr.pretrain(tiny_model, loss=LOGISTIC)
    params = strategy.init(key)
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))
    for _ in range(200):
        params, state, _ = step(params, state, task(64), key)
    support, query = task(256)
    tuned, shared = (
        np.mean((scores(s, params, support, query.features) > 0) == (query.target > 0.5)) for s in (strategy, plain)
    )
    assert tuned > 0.8
    assert 0.4 < shared < 0.6


def test_on_a_model_with_tables_low_rank_finetuning_leaves_them_alone(synthetic, jitted):
    model = mr.models.mlp(mr.models.fields_of(synthetic), width=4, hidden=(8,))
    strategy = jitted(mr.lora(model, loss=LOGISTIC, rank=2))
    params = strategy.init(jax.random.key(0))
    rows = np.arange(1, 13).reshape(2, 6)
    support = mr.Examples(mr.tasks.features(synthetic, np.array([1, 2]), rows), np.eye(2, 6), np.ones((2, 6)))
    adapted = jax.eval_shape(strategy.adapt, params, support, jax.random.key(0))
    inputs = 4 * 2  # two fields
    assert sorted(leaf.shape[1:] for leaf in jax.tree.leaves(adapted) if leaf.ndim > 1) == sorted(
        [(inputs, 2), (2, 8), (8,), (8, 1), (1,)]
    )


def test_an_example_of_the_support_never_reads_itself_in_training(task_batch, tiny_reading_model, jitted):
    task, key = task_batch(mask=False), jax.random.key(0)
    strategy = jitted(mr.with_history(mr.pretrain(tiny_reading_model, loss=LOGISTIC)))
    params = strategy.init(key)
    own = jnp.broadcast_to(jnp.arange(7), (5, 7))
    apart = [
        LOGISTIC(tiny_reading_model.apply(params["model"], History(e.features, task.support, place)), e.target)
        for e, place in zip(task, (own, jnp.full((5, 4), -1)), strict=True)
    ]
    np.testing.assert_allclose(strategy.loss(params, task, key)[0], jnp.concatenate(apart, 1).mean(), rtol=1e-6)


def test_bad_arguments_are_refused(tiny_model):
    plain = mr.Model(tiny_model.init, tiny_model.apply)
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        mr.lora(tiny_model, rank=0)
    with pytest.raises(ValueError, match="choose from embedding, decision, head"):
        mr.lora(tiny_model, groups=("attention",))
    with pytest.raises(ValueError, match="choose from embedding, decision, head"):
        mr.finetune(tiny_model, groups=("attention",))
    for make in (mr.finetune_head, mr.lora):
        with pytest.raises(ValueError, match="needs a model with `groups`"):
            make(plain)


@partial(jax.jit, static_argnums=0)
def scores(strategy, params, support, features):
    return strategy.predict(params, strategy.adapt(params, support, jax.random.key(0)), features)
