"""MAMO's memories and inner loop against numpy and against gradient descent on each user's own weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

import metarec_jax as mr
from metarec_jax.models.model import Encoder
from metarec_jax.strategies.mamo import attention, read

KEY = jax.random.key(0)


def perturbed(params):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


@pytest.fixture
def model(tiny_model):
    """A model whose users have a profile: the first two features."""
    return tiny_model._replace(profile=Encoder(lambda key: {"w": jnp.eye(2)}, lambda p, x: x[..., :2] @ p["w"], 2))


@pytest.fixture
def batch(task_batch):
    """Users whose first two features are the same in all of their examples."""
    task = task_batch()
    own = np.random.default_rng(1).normal(size=(5, 1, 2)).astype(np.float32)

    def fill(part):
        features = np.concatenate([np.broadcast_to(own, (*part.mask.shape, 2)), part.features[..., 2:]], -1)
        return part._replace(features=features)

    return mr.Task(fill(task.support), fill(task.query))


def by_hand(model, params, own, tau, shared):
    """One user's profile, attention, initial weights, and the score of weights, with the shared model's if `shared`."""
    p, memory = np.asarray(own @ params["encoder"]["w"]), np.asarray(params["profile"])
    a = softmax(memory @ p / np.linalg.norm(memory, axis=1) / np.linalg.norm(p))

    def start(memory):
        return np.tensordot(a, np.asarray(memory), 1)

    w = {
        "user": jax.tree.map(lambda phi, m: phi - tau * start(m), params["user"], params["bias_term"]),
        "preference": start(params["preference"]),
        "head": params["head"],
    }

    def score(w, x):
        e = jax.nn.relu(p @ w["user"]["weight"] + w["user"]["bias"])
        phi = model.embed(params["model"], x)
        z = jax.nn.relu(jnp.concatenate([jnp.broadcast_to(e, (len(x), 4)), phi], -1) @ w["preference"])
        score = z @ w["head"]["weight"] + w["head"]["bias"]
        return score + model.apply(params["model"], x) if shared else score

    return p, a, w, score


def test_memories_are_read_by_the_softmax_of_cosines():
    rng = np.random.default_rng(0)
    p, memory = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    cosines = p @ memory.T / np.linalg.norm(p, axis=1)[:, None] / np.linalg.norm(memory, axis=1)
    a = attention(p, memory)
    np.testing.assert_allclose(a, softmax(cosines, axis=1), rtol=1e-5)
    values = rng.normal(size=(4, 2, 3)).astype(np.float32)
    expected = sum(a[0, k] * values[k] for k in range(4))
    np.testing.assert_allclose(read(a[0], values), expected, rtol=1e-5)
    nobody = jax.grad(lambda p: attention(p, memory)[0, 0])(jnp.zeros((1, 3)))
    assert np.isfinite(nobody).all()


def test_a_user_starts_from_what_the_memories_say_and_descends_from_there(model, batch):
    steps, lr, tau, loss = 3, 0.05, 0.7, optax.losses.squared_error
    strategy = mr.mamo(
        model, inner=optax.sgd(lr), steps=steps, tau=tau, memories=3, size=4, hidden=5, learn_step_size=False
    )
    params = perturbed(strategy.init(KEY))
    adapted = strategy.adapt(params, batch.support, KEY)
    scores = strategy.predict(params, adapted, batch.query.features)
    for u in range(5):
        n = int(batch.support.mask[u].sum())
        _, _, w, score = by_hand(model, params, batch.support.features[u, 0, :2], tau, shared=True)

        def support_loss(w, u=u, n=n, score=score):
            return loss(score(w, batch.support.features[u, :n]), batch.support.target[u, :n]).mean()

        for _ in range(steps):
            w = jax.tree.map(lambda x, g: x - lr * g, w, jax.grad(support_loss)(w))
        np.testing.assert_allclose(scores[u], score(w, batch.query.features[u]), rtol=1e-3, atol=1e-4)


def test_faithful_mamo_writes_each_memory_by_attention(model, batch, jitted):
    lr, rate, tau, squared = 0.05, 0.2, 0.7, optax.losses.squared_error
    strategy = jitted(
        mr.mamo(model, inner=optax.sgd(lr), steps=2, tau=tau, memories=3, size=4, hidden=5, faithful=True)
    )
    params = perturbed(strategy.init(KEY))
    assert "log_step_size" not in params
    assert strategy.outer == "own"
    optimizer = optax.sgd(rate)
    step = jax.jit(mr.meta_step(strategy.loss, optimizer))
    after, _, aux = step(params, optimizer.init(params), batch, KEY)
    names = ("profile", "bias_term", "preference")
    writes = jax.tree.map(jnp.zeros_like, {name: params[name] for name in names})
    losses = []
    for u in range(5):
        (x, y), (xq, yq) = (
            (part.features[u, : int(part.mask[u].sum())], part.target[u, : int(part.mask[u].sum())]) for part in batch
        )
        p, a, w, score = by_hand(model, params, x[0, :2], tau, shared=False)
        slope = jax.grad(lambda w, x=x, y=y, score=score: squared(score(w, x), y).mean())
        start = slope(w)["user"]
        for _ in range(2):
            w = jax.tree.map(lambda x, g: x - lr * g, w, slope(w))
        losses.append(squared(score(w, xq), yq).mean())
        own_write = {"profile": p, "bias_term": start, "preference": w["preference"]}
        writes = jax.tree.map(lambda total, x, a=a: total + np.multiply.outer(a, x) / 5, writes, own_write)
    np.testing.assert_allclose(aux["loss"], np.mean(losses), rtol=1e-4)
    for name in names:
        expected = jax.tree.map(lambda m, x: (1 - rate) * m + rate * x, params[name], writes[name])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), after[name], expected)


def test_faithful_mamo_trains_all_but_the_memories_on_the_query_loss(task_batch, tiny_model, jitted):
    task = task_batch()
    options = {"steps": 2, "memories": 3, "size": 4, "hidden": 5}
    strategy = jitted(mr.mamo(tiny_model, faithful=True, **options))
    params = perturbed(strategy.init(KEY))

    def query_loss(params):
        scores = strategy.predict(params, strategy.adapt(params, task.support, KEY), task.query.features)
        return mr.core.query_loss(scores, task.query, optax.losses.squared_error)

    exact = jax.jit(jax.grad(query_loss))(params)
    got = jax.jit(jax.grad(lambda p: strategy.loss(p, task, KEY)[0]))(params)
    for name in ("user", "head", "model"):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got[name], exact[name])


def test_every_memory_gets_the_exact_meta_gradient(model, batch, jitted):
    strategy = jitted(mr.mamo(model, steps=2, memories=3, size=4, hidden=5))
    params = perturbed(strategy.init(KEY))
    loss = jax.jit(lambda p: strategy.loss(p, batch, KEY)[0])
    gradient = jax.jit(jax.grad(loss))(params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        exact = jax.jit(lambda p: strategy.loss(p, jax.tree.map(lambda x: np.asarray(x, np.float64), batch), KEY)[0])
        for name in ("profile", "bias_term", "preference", "user", "encoder"):
            direction = jax.tree.map(lambda x: jnp.cos(1.0 + jnp.arange(x.size)).reshape(x.shape), wide[name])
            ahead, behind = (
                exact(wide | {name: jax.tree.map(lambda x, d, h=h: x + h * d, wide[name], direction)})
                for h in (1e-5, -1e-5)
            )
            along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient[name], direction)))
            np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=1e-2, atol=1e-5)
            assert any(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradient[name]))


def test_users_start_apart_without_any_example(model, batch, jitted):
    strategy = jitted(mr.mamo(model))
    params = perturbed(strategy.init(KEY))
    nothing = batch.support._replace(mask=np.zeros((5, 7), np.float32))
    _, user = strategy.adapt(params, nothing, KEY)
    expected = attention(batch.support.features[:, 0, :2] @ params["encoder"]["w"], params["profile"])
    np.testing.assert_allclose(user["attention"], expected, rtol=1e-5)
    assert np.ptp(user["attention"], axis=0).max() > 1e-3


def test_bad_options_are_refused(tiny_model):
    with pytest.raises(ValueError, match="needs a model with `embed`"):
        mr.mamo(mr.Model(tiny_model.init, tiny_model.apply))
    with pytest.raises(ValueError, match="memories=0"):
        mr.mamo(tiny_model, memories=0)
