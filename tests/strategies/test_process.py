"""Neural processes against the same equations written out in numpy, for one user at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, rel_entr, softmax
from scipy.stats import norm

import metarec_jax as mr
from metarec_jax.strategies import process, tanp
from metarec_jax.strategies.decoder import decoder

NAMES = ("cnp", "anp", "tanp")
KEY = jax.random.key(0)


def perturbed(params):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def network(layers, x):
    """The layers of `process.dense`, in numpy."""
    for layer in layers[:-1]:
        x = np.maximum(x @ np.asarray(layer["weight"]) + np.asarray(layer["bias"]), 0)
    return x @ np.asarray(layers[-1]["weight"]) + np.asarray(layers[-1]["bias"])


def inputs(model, params, examples, user):
    """What the encoders read of a user's real examples, `[n, width + 2]`."""
    n = int(examples.mask[user].sum())
    x = examples.features[user, :n]
    columns = (model.embed(params, x), model.apply(params, x)[:, None], examples.target[user, :n, None])
    return np.hstack([np.asarray(c) for c in columns])


def attention(p, query, key, value, heads):
    """One user's multi-head attention, head by head."""
    projected = (x @ np.asarray(p[name]) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    of_heads = zip(*(np.split(x, heads, axis=1) for x in projected), strict=True)
    return np.hstack([softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v for q, k, v in of_heads]) @ np.asarray(
        p["out"]
    )


def test_a_cnp_user_is_the_mean_of_the_encoded_examples(task_batch, tiny_model, jitted):
    support = task_batch().support
    strategy = jitted(mr.cnp(tiny_model, size=6, hidden=8))
    params = perturbed(strategy.init(KEY))
    r = strategy.adapt(params, support, KEY)
    for u in range(5):
        expected = network(params["encoder"], inputs(tiny_model, params["model"], support, u)).mean(0)
        np.testing.assert_allclose(r[u], expected, rtol=1e-4, atol=1e-5)


def test_without_support_the_shared_model_of_a_cnp_answers(task_batch, tiny_model, jitted):
    task = task_batch()
    strategy = jitted(mr.cnp(tiny_model))
    params = perturbed(strategy.init(KEY))
    r = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7))), KEY)
    expected = tiny_model.apply(params["model"], task.query.features)
    np.testing.assert_allclose(strategy.predict(params, r, task.query.features), expected, rtol=1e-5, atol=1e-6)


def test_anp_attends_as_numpy_does_over_one_users_real_examples(task_batch, tiny_model, jitted):
    task = task_batch()
    strategy = jitted(mr.anp(tiny_model, size=6, hidden=8, heads=2))
    params = perturbed(strategy.init(KEY))
    adapted = strategy.adapt(params, task.support, KEY)
    scores = strategy.predict(params, adapted, task.query.features)
    for u in range(5):
        xy = inputs(tiny_model, params["model"], task.support, u)
        n = len(xy)
        s = network(params["encoder"], xy)
        value = s + attention(params["self"], s, s, s, 2)
        np.testing.assert_allclose(adapted["value"][u, :n], value, rtol=1e-4, atol=1e-5)
        phi = np.asarray(tiny_model.embed(params["model"], task.query.features[u]))
        query, key = network(params["key"], phi), network(params["key"], xy[:, :4])
        np.testing.assert_allclose(adapted["key"][u, :n], key, rtol=1e-4, atol=1e-5)
        r = attention(params["cross"], query, key, value, 2)
        latent = network(params["latent_encoder"], xy)
        latent = latent + attention(params["latent_self"], latent, latent, latent, 2)
        mu = network(params["latent"], np.maximum(latent.mean(0), 0))[:6]
        np.testing.assert_allclose(adapted["z"][u], mu, rtol=1e-4, atol=1e-5)
        context = np.hstack([r, np.tile(mu, (len(r), 1))])[None].astype(np.float32)
        expected = decoder(tiny_model, 12, 8).apply(params, context, task.query.features[u : u + 1])[0]
        np.testing.assert_allclose(scores[u], expected, rtol=1e-3, atol=1e-4)


def test_attention_over_nothing_is_zero_and_has_a_finite_gradient():
    x, params = jnp.ones((2, 3, 4)), process.attention(KEY, 4)
    mask = jnp.zeros((2, 3))
    np.testing.assert_array_equal(process.attend(params, x, x, x, mask, 2), 0)
    gradient = jax.grad(lambda p, x: process.attend(p, x, x, x, mask, 2).sum(), (0, 1))(params, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_divergence_of_normals_is_the_integral_that_defines_it():
    rng = np.random.default_rng(0)
    q, p = ((rng.normal(size=(2, 3)), rng.uniform(0.2, 1.0, size=(2, 3))) for _ in range(2))
    grid = np.linspace(-12, 12, 40001)[:, None, None]
    density = norm.pdf(grid, *q)
    expected = (density * (norm.logpdf(grid, *q) - norm.logpdf(grid, *p))).sum(0) * (grid[1] - grid[0]).item()
    np.testing.assert_allclose(process.kl_divergence(q, p), expected.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(process.kl_divergence(q, q), 0, atol=1e-6)


def test_the_deviation_of_the_latent_stays_between_a_tenth_and_one():
    params = process.dense(KEY, 4, 8, 6)
    for scale in (0.0, 1.0, 1e8):
        sigma = process.normal(params, scale * jnp.ones((1, 4)))[1]
        assert (sigma >= 0.0999).all()
        assert (sigma <= 1.0001).all()


@pytest.mark.parametrize("name", ["anp", "tanp"])
def test_training_draws_the_latent_from_support_and_query_together(name, task_batch, tiny_model, jitted):
    task = task_batch()
    nothing = {"clustering": 0.0} if name == "tanp" else {}
    strategy = jitted(mr.STRATEGIES[name](tiny_model, kl=3.0, **nothing))
    params = perturbed(strategy.init(KEY))
    value, aux = strategy.loss(params, task, KEY)
    assert aux["kl"] > 0
    # the posterior reads the query's targets
    other = task.query._replace(target=1 - task.query.target)
    assert strategy.loss(params, task._replace(query=other), KEY)[1]["kl"] != aux["kl"]
    # users whose query is empty have q(z | all) = q(z | support) and do not count
    empty = task.query._replace(mask=np.zeros_like(task.query.mask))
    assert strategy.loss(params, task._replace(query=empty), KEY)[1]["kl"] == 0
    # the weight is that of the divergence alone
    lighter = mr.STRATEGIES[name](tiny_model, kl=1.0, **nothing).loss(params, task, KEY)[0]
    np.testing.assert_allclose(value - lighter, 2 * aux["kl"], rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_tanp_assigns_by_students_kernel(alpha):
    rng = np.random.default_rng(0)
    t, centroids = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    c = np.exp(tanp.log_assignment(t, centroids, alpha))
    np.testing.assert_allclose(c.sum(1), 1, rtol=1e-5)
    kernel = (1 + ((t[:, None] - centroids) ** 2).sum(-1) / alpha) ** (-(alpha + 1) / 2)
    np.testing.assert_allclose(c, kernel / kernel.sum(1, keepdims=True), rtol=1e-4)
    at_a_centroid = jax.grad(lambda t: tanp.log_assignment(t, t, alpha)[0, 1])(jnp.asarray(centroids))
    assert np.isfinite(at_a_centroid).all()


def test_tanps_clustering_loss_is_the_divergence_from_the_sharpened_assignment():
    c = np.random.default_rng(0).dirichlet(np.ones(3), size=6)
    real = np.array([1, 1, 0, 1, 1, 0], bool)
    d = c[real] ** 2 / c[real].sum(0)
    d /= d.sum(1, keepdims=True)
    expected = rel_entr(d, c[real]).sum(1).mean()
    np.testing.assert_allclose(tanp.clustering_loss(jnp.log(c), jnp.asarray(real)), expected, rtol=1e-4)
    assert tanp.clustering_loss(jnp.log(c), jnp.zeros(6, bool)) == 0


@pytest.mark.parametrize("gated", [True, False])
def test_tanps_decoder_is_modulated_layer_by_layer(gated, task_batch, tiny_model, jitted):
    task = task_batch()
    strategy = jitted(mr.tanp(tiny_model, size=6, hidden=8, gated=gated, clusters=3))
    params = perturbed(strategy.init(KEY))
    adapted = strategy.adapt(params, task.support, KEY)
    scores = strategy.predict(params, adapted, task.query.features)
    for u in range(5):
        xy = inputs(tiny_model, params["model"], task.support, u)
        t = network(params["task"], xy).mean(0)
        kernel = 1 / (1 + ((t - np.asarray(params["centroids"])) ** 2).sum(1))
        o = t + kernel / kernel.sum() @ np.asarray(params["centroids"])
        np.testing.assert_allclose(adapted["task"][u], o, rtol=1e-4, atol=1e-5)
        z = network(params["latent"], np.maximum(network(params["encoder"], xy).mean(0), 0))[:6]
        np.testing.assert_allclose(adapted["z"][u], z, rtol=1e-4, atol=1e-5)
        x = task.query.features[u]
        g = np.hstack([tiny_model.embed(params["model"], x), np.tile(z, (len(x), 1))])
        for layer in jax.tree.map(np.asarray, params["decoder"]):
            gamma, beta = np.tanh(o @ layer["gamma"]), np.tanh(o @ layer["beta"])
            if gated:
                eta, delta = np.tanh(o @ layer["eta"]), expit(o @ layer["delta"])
                gamma, beta = delta * gamma + (1 - delta) * eta, delta * beta + (1 - delta) * eta
            g = np.maximum(gamma * (g @ layer["weight"] + layer["bias"]) + beta, 0)
        expected = np.asarray(tiny_model.apply(params["model"], x)) + g @ np.asarray(params["out"])
        np.testing.assert_allclose(scores[u], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_large_targets_and_empty_supports_never_give_nan_in_training(name, task_batch, tiny_model):
    task = task_batch()
    rng = np.random.default_rng(0)
    some = (np.arange(5) > 1)[:, None]
    support = task.support._replace(
        target=(1e4 * rng.normal(size=(5, 7))).astype(np.float32), mask=task.support.mask * some
    )
    hidden = np.where(support.mask > 0, support.target, np.nan).astype(np.float32)
    query = task.query._replace(target=(1e4 * rng.normal(size=(5, 4))).astype(np.float32))
    batch = mr.Task(support._replace(target=hidden), query)
    strategy, optimizer = mr.STRATEGIES[name](tiny_model), optax.adam(0.01)
    step = mr.meta_step(strategy.loss, optimizer)

    @jax.jit
    def train(key):
        params = strategy.init(key)
        keys = jax.random.split(key, 200)
        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(
            lambda c, k: (lambda p, s, a: ((p, s), a["loss"]))(*step(*c, batch, k)), start, keys
        )
        return params, losses, strategy.predict(params, strategy.adapt(params, batch.support, key), query.features)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train(KEY)))


def test_bad_options_are_refused_with_their_values(tiny_model):
    plain = mr.Model(tiny_model.init, tiny_model.apply)
    for name in NAMES:
        with pytest.raises(ValueError, match="needs a model with `embed`"):
            mr.STRATEGIES[name](plain)
        with pytest.raises(ValueError, match="must be positive: size=0"):
            mr.STRATEGIES[name](tiny_model, size=0)
    with pytest.raises(ValueError, match="multiple of heads"):
        mr.anp(tiny_model, size=6, heads=4)
    with pytest.raises(ValueError, match="must not be negative: kl=-1"):
        mr.anp(tiny_model, kl=-1)
    with pytest.raises(ValueError, match="must be positive: alpha=0"):
        mr.tanp(tiny_model, alpha=0)
