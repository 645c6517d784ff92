"""`faithful=True`: each strategy against its paper's equations, written out independently."""

import inspect
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, rel_entr, softmax

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.types import Task, normal_per_user

LOGISTIC, SQUARED = optax.losses.sigmoid_binary_cross_entropy, optax.losses.squared_error
KEY = jax.random.key(0)
NAMES = [name for name, make in mr.STRATEGIES.items() if "faithful" in inspect.signature(make).parameters]
INNER = [name for name in NAMES if "learn_step_size" in inspect.signature(mr.STRATEGIES[name]).parameters]
FAMILIES = ("cavia", "mamo", "anp")
OPTIONS = {"lora": {"groups": ("embedding",)}}  # the only matrix of `tiny_model`


@jax.jit
def perturbed(params):
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def user(examples, u):
    """One user's real examples: features and targets."""
    n = int(examples.mask[u].sum())
    return np.asarray(examples.features[u, :n]), np.asarray(examples.target[u, :n])


def network(layers, x):
    """The layers of `networks.dense`, in numpy."""
    for layer in layers[:-1]:
        x = np.maximum(x @ np.asarray(layer["weight"]) + np.asarray(layer["bias"]), 0)
    return x @ np.asarray(layers[-1]["weight"]) + np.asarray(layers[-1]["bias"])


def concatenated(params, context, phi):
    """v . relu(W [phi, c] + b) + b_0 for one user."""
    first, second = params["layers"]
    x = jnp.concatenate([phi, jnp.broadcast_to(context, (len(phi), len(context)))], -1)
    return (jax.nn.relu(x @ first["weight"] + first["bias"]) @ second["weight"] + second["bias"])[..., 0]


# All of them


@pytest.fixture(params=[n if n in FAMILIES else pytest.param(n, marks=pytest.mark.grid) for n in NAMES], scope="module")
def strategy(request, tiny_model):
    return mr.STRATEGIES[request.param](tiny_model, loss=LOGISTIC, faithful=True, **OPTIONS.get(request.param, {}))


@partial(jax.jit, static_argnums=0)
def initial(strategy):
    return strategy.init(KEY)


@partial(jax.jit, static_argnums=0)
def run(strategy, params, task):
    """Loss, gradient and scores."""
    value, gradient = jax.value_and_grad(lambda p: strategy.loss(p, task, KEY)[0])(params)
    return value, gradient, strategy.predict(params, strategy.adapt(params, task.support, KEY), task.query.features)


def test_padding_and_empty_users_change_nothing(strategy, task_batch):
    task, params = task_batch(), perturbed(initial(strategy))

    def pad(x):
        x = np.asarray(x)
        x = np.concatenate([x, np.zeros((x.shape[0], 3, *x.shape[2:]), x.dtype)], axis=1)
        return np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)])

    value, gradient, scores = run(strategy, params, task)
    found, padded_gradient, padded_scores = run(strategy, params, jax.tree.map(pad, task))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    close(padded_gradient, gradient, atol=2e-6)
    close(padded_scores[:5, :4], scores, atol=1e-5)


def test_no_support_gives_finite_scores_and_gradients(strategy, task_batch):
    task, params = task_batch(), strategy.init(KEY)
    for target in (0.0, 1.0):
        for empty in (0.0, 1.0):
            support = task.support._replace(
                target=np.full_like(task.support.target, target), mask=np.asarray(task.support.mask) * empty
            )
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(strategy, params, Task(support, task.query))))


def test_users_do_not_influence_each_other(strategy, task_batch):
    task, params = task_batch(), perturbed(initial(strategy))
    together = run(strategy, params, task)[2]
    for u in (0, 3):
        alone = jax.tree.map(lambda x, u=u: x[u : u + 1], task)
        close(run(strategy, params, alone)[2][0], together[u], atol=1e-5)


def test_the_default_is_not_faithful():
    for name in NAMES:
        parameter = inspect.signature(mr.STRATEGIES[name]).parameters["faithful"]
        assert parameter.default is False
        assert parameter.kind is parameter.KEYWORD_ONLY


# Inner gradient steps


@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "melu"])
def test_faithful_maml_is_maml_without_learned_step_sizes(name, task_batch, tiny_model):
    task, make = task_batch(), mr.STRATEGIES[name]
    one, two = make(tiny_model, faithful=True), make(tiny_model, learn_step_size=False)
    params = initial(one)
    jax.tree.map(np.testing.assert_array_equal, params, initial(two))
    assert params.keys() == {"model"}
    jax.tree.map(np.testing.assert_array_equal, run(one, params, task), run(two, params, task))


def test_faithful_maml_has_the_gradient_of_one_plain_step_in_float64(task_batch, tiny_model):
    task = task_batch(mask=False)
    strategy = mr.maml(tiny_model, inner=optax.sgd(0.1), steps=1, faithful=True)
    params = perturbed(initial(strategy))
    gradient = run(strategy, params, task)[1]["model"]
    with jax.enable_x64(True):
        task = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), task)
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params["model"])

        def query_loss(theta):
            def one(support, query):
                def mean(w, x):
                    return SQUARED(tiny_model.apply(w, x.features), x.target).mean()

                own = jax.tree.map(lambda w, g: w - 0.1 * g, theta, jax.grad(mean)(theta, support))
                return mean(own, query)

            return jax.vmap(one)(*task).mean()

        np.testing.assert_allclose(strategy.loss(params, task, KEY)[0], query_loss(wide), rtol=1e-5)
        for name, w in wide.items():
            direction = jnp.cos(1.0 + jnp.arange(w.size)).reshape(w.shape)
            ahead, behind = (query_loss(wide | {name: w + h * direction}) for h in (1e-5, -1e-5))
            np.testing.assert_allclose(
                (gradient[name] * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("name", INNER)
def test_a_learned_step_size_or_a_count_is_refused(name, tiny_model):
    make = partial(mr.STRATEGIES[name], tiny_model, faithful=True)
    with pytest.raises(ValueError, match="fixes the step size"):
        make(learn_step_size=True)
    with pytest.raises(ValueError, match="leave count at 0"):
        make(count=5.0)
    make(learn_step_size=False)  # the same thing said twice


def test_faithful_meta_sgd_steps_by_alpha_itself_from_one_random_number(task_batch, tiny_model):
    support = task_batch().support
    strategy = mr.meta_sgd(tiny_model, faithful=True)
    starts = [strategy.init(jax.random.key(seed))["step_size"] for seed in range(50)]
    values = np.array([np.unique(jax.flatten_util.ravel_pytree(start)[0]) for start in starts])
    assert values.shape == (50, 1)  # one number for all entries
    assert (values >= 0.005).all()
    assert (values <= 0.1).all()
    assert np.ptp(values) > 0.05
    params = initial(strategy)
    plain = mr.meta_sgd(tiny_model).init(jax.random.split(KEY)[0])
    close(params["model"], plain["model"], rtol=1e-6)
    alpha = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params["model"])
    got = core.weights(params["model"], strategy.adapt(params | {"step_size": alpha}, support, KEY))
    for u in range(5):
        x, y = user(support, u)
        gradient = jax.grad(lambda w: SQUARED(tiny_model.apply(w, x), y).mean())(params["model"])
        expected = jax.tree.map(lambda w, a, g: w - a * g, params["model"], alpha, gradient)
        close(jax.tree.map(lambda w, u=u: w[u], got), expected)
    with pytest.raises(ValueError, match="neither an inner optimiser nor a count"):
        mr.meta_sgd(tiny_model, faithful=True, inner=optax.sgd(0.1))


def test_faithful_sparse_maml_has_a_mask_for_each_weight_and_a_fixed_step(task_batch, tiny_model):
    support = task_batch().support
    strategy = mr.sparse_maml(tiny_model, inner=optax.sgd(0.1), steps=1, start=0.05, faithful=True)
    params = initial(strategy)
    assert params.keys() == {"model", "mask"}
    mask = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params["model"])
    assert jax.tree.map(jnp.shape, params["mask"]) == jax.tree.map(jnp.shape, mask)
    got = core.weights(params["model"], strategy.adapt(params | {"mask": mask}, support, KEY))
    for u in range(5):
        x, y = user(support, u)
        gradient = jax.grad(lambda w: SQUARED(tiny_model.apply(w, x), y).mean())(params["model"])
        expected = jax.tree.map(lambda w, m, g: w - 0.1 * (m >= -0.05) * g, params["model"], mask, gradient)
        close(jax.tree.map(lambda w, u=u: w[u], got), expected)
    with pytest.raises(ValueError, match="one mask for each weight"):
        mr.sparse_maml(tiny_model, masks="row", faithful=True)


@pytest.mark.parametrize(("size", "steps"), [(20, 3), (2, 1)])
def test_faithful_reptile_steps_on_minibatches(size, steps, task_batch, tiny_model):
    task = task_batch()
    options = {"inner": optax.sgd(0.1), "steps": steps}
    strategy = mr.reptile(tiny_model, minibatch=size, faithful=True, **options)
    params = initial(strategy)
    close(params, initial(mr.reptile(tiny_model, **options)))
    if size == 20:  # a minibatch of all examples is all examples
        close(run(strategy, params, task)[:2], run(mr.reptile(tiny_model, **options), params, task)[:2], rtol=1e-3)
        return
    seen = set()
    for u in range(5):  # a user's step is that of one of the pairs of examples
        alone = jax.tree.map(lambda x, u=u: x[u : u + 1], task)
        (xs, ys), (xq, yq) = user(task.support, u), user(task.query, u)
        x, y = np.concatenate([xs, xq]), np.concatenate([ys, yq])
        pairs = list(combinations(range(len(y)), 2))
        steps_of = [
            jax.flatten_util.ravel_pytree(
                jax.grad(lambda w, i=list(pair): 0.1 * SQUARED(tiny_model.apply(w, x[i]), y[i]).mean())(params)
            )[0]
            for pair in pairs
        ]
        for seed in range(3):
            gradient = jax.grad(lambda p, seed=seed: strategy.loss(p, alone, jax.random.key(seed))[0])(params)
            far = [np.abs(jax.flatten_util.ravel_pytree(gradient)[0] - step).max() for step in steps_of]
            assert min(far) < 1e-6
            seen.add((u, pairs[int(np.argmin(far))]))
    assert len(seen) > 5
    with pytest.raises(ValueError, match="minibatch must be 1 or more"):
        mr.reptile(tiny_model, minibatch=0)


def test_faithful_cavia_moves_an_additional_input_of_one_layer(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.cavia(tiny_model, inner=optax.sgd(0.1), steps=2, size=6, faithful=True)
    params = perturbed(initial(strategy))
    assert params.keys() == {"network"}
    net = params["network"]
    contexts = strategy.adapt(params, task.support, KEY)
    scores = strategy.predict(params, contexts, task.query.features)
    for u in range(5):
        x, y = user(task.support, u)
        phi, new = (tiny_model.embed(net["model"], f) for f in (x, task.query.features[u]))
        c = jnp.zeros(6)
        for _ in range(2):
            c = c - 0.1 * jax.grad(lambda c: SQUARED(concatenated(net, c, phi), y).mean())(c)
        close(contexts[u], c)
        close(scores[u], concatenated(net, c, new))
    empty = task.support._replace(mask=np.zeros((5, 7), np.float32))
    np.testing.assert_array_equal(strategy.adapt(params, empty, KEY), 0)


def test_faithful_limaml_gives_the_embedding_to_the_global_network(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.limaml(tiny_model, inner=optax.sgd(0.1), steps=2, size=6, hidden=5, faithful=True)
    params = perturbed(initial(strategy))
    assert params.keys() == {"block", "network", "profile"}
    net = params["network"]
    embeddings = strategy.adapt(params, task.support, KEY)
    scores = strategy.predict(params, embeddings, task.query.features)

    def embedding(block):  # of the constant profile 1
        return jnp.tanh(block["w1"][0] + block["b1"]) @ block["w2"] + block["b2"]

    for u in range(5):
        x, y = user(task.support, u)
        phi, block = tiny_model.embed(net["model"], x), params["block"]
        for _ in range(2):
            slope = jax.grad(lambda b: SQUARED(concatenated(net, embedding(b), phi), y).mean())(block)
            block = jax.tree.map(lambda w, g: w - 0.1 * g, block, slope)
        close(embeddings[u], embedding(block))
        close(scores[u], concatenated(net, embedding(block), tiny_model.embed(net["model"], task.query.features[u])))


# Closed forms


@pytest.mark.parametrize("name", ["prototypes", "lwa", "nlba"])
def test_faithful_classifiers_read_the_class_means_alone(name, task_batch, tiny_model):
    task = task_batch()
    strategy = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC, faithful=True)
    params = perturbed(initial(strategy))
    assert params.keys() == {"model", "own"}
    own = jax.tree.map(np.asarray, params["own"])
    scores = strategy.predict(params, strategy.adapt(params, task.support, KEY), task.query.features)
    for u in range(5):
        x, y = user(task.support, u)
        phi, new = (np.asarray(tiny_model.embed(params["model"], f)) for f in (x, task.query.features[u]))
        p = np.stack([phi[y == c].mean(0) if (y == c).any() else np.zeros(4) for c in (0, 1)])
        if name == "prototypes":  # the logit of the softmax over classes of minus the squared distances
            distance = ((new[:, None] - p) ** 2).sum(-1)
            np.testing.assert_allclose(expit(scores[u]), softmax(-distance, axis=1)[:, 1], rtol=1e-4)
        elif name == "lwa":
            close(scores[u], new @ (own["weight"] @ p) + own["bias"], rtol=1e-4, atol=1e-5)
        else:
            h = np.maximum(new @ own["layer"] + p[0] @ own["shift"][0] + p[1] @ own["shift"][1], 0)
            close(scores[u], h @ own["out"] + (p * own["skip"]).sum(), rtol=1e-4, atol=1e-5)
    nobody = strategy.adapt(params, task.support._replace(mask=np.zeros((5, 7), np.float32)), KEY)
    blind = strategy.predict(params, nobody, task.query.features)
    phi = np.asarray(tiny_model.embed(params["model"], task.query.features))
    expected = {
        "prototypes": lambda: np.zeros((5, 4)),
        "lwa": lambda: np.full((5, 4), own["bias"]),
        "nlba": lambda: np.maximum(phi @ own["layer"], 0) @ own["out"],
    }[name]()
    close(blind, expected, atol=1e-5)
    with pytest.raises(ValueError, match="needs the logistic loss"):
        mr.STRATEGIES[name](tiny_model, loss=SQUARED, faithful=True)


def test_faithful_ridge_is_ridge_regression_of_the_whole_head(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.ridge(tiny_model, penalty=0.6, faithful=True)
    params = initial(strategy)
    scores = strategy.predict(params, strategy.adapt(params, task.support, KEY), task.query.features)

    def design(x):
        return np.c_[np.asarray(tiny_model.embed(params["model"], x), float), np.ones(len(x))]

    for u in range(5):
        x, y = user(task.support, u)
        x = design(x)
        head = np.linalg.solve(x.T @ x + 0.3 * np.eye(5), x.T @ y)  # the loss is the square, the penalty half of it
        close(scores[u], design(task.query.features[u]) @ head, rtol=1e-3, atol=1e-5)


def test_faithful_lora_scales_the_product_and_adapts_nothing_else(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.lora(
        tiny_model, loss=LOGISTIC, inner=optax.sgd(0.3), steps=3, rank=3, alpha=6.0, groups=("embedding", "head"),
        seed=7, faithful=True,
    )  # fmt: skip
    params = initial(strategy)
    fixed = params["model"]
    start = jax.random.normal(jax.random.fold_in(jax.random.key(7), sorted(fixed).index("w1")), (3, 3)) / np.sqrt(3)
    adapted = strategy.adapt(params, task.support, KEY)
    scores = strategy.predict(params, adapted, task.query.features)
    assert {leaf.shape[1:] for leaf in jax.tree.leaves(adapted)} == {(3, 3), (3, 4), ()}  # no vector adapts
    for u in range(5):
        x, y = user(task.support, u)
        own = {"a": start, "b": jnp.zeros((3, 4))}

        def apply(own, x):
            return tiny_model.apply(fixed | {"w1": fixed["w1"] + 2.0 * own["a"] @ own["b"]}, x)

        for _ in range(3):
            slope = jax.grad(lambda own: LOGISTIC(apply(own, x), y).mean())(own)
            own = jax.tree.map(lambda w, g: w - 0.3 * g, own, slope)
        close(scores[u], apply(own, task.query.features[u]))
    with pytest.raises(ValueError, match="adapts matrices alone"):
        mr.lora(tiny_model, faithful=True).adapt(params, task.support, KEY)
    with pytest.raises(ValueError, match="alpha must be positive"):
        mr.lora(tiny_model, alpha=0.0)


# Neural processes


def encoded(model, params, *parts):
    """[phi, y] of one user's real examples."""
    x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return np.hstack([np.asarray(model.embed(params["model"], x)), y[:, None]])


def attention(p, x, heads):
    """Multi-head self-attention, head by head."""
    projected = (x @ np.asarray(p[name]) for name in ("query", "key", "value"))
    of_heads = zip(*(np.split(part, heads, axis=1) for part in projected), strict=True)
    mixed = np.hstack([softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v for q, k, v in of_heads])
    return mixed @ np.asarray(p["out"])


def posterior(name, params, xy):
    """q(z | examples): mean and deviation."""
    if name == "anp":
        r = network(params["latent_encoder"], xy)
        r = r + attention(params["latent_self"], r, 2)
    else:
        r = network(params["encoder"], xy)
    mu, raw = np.split(network(params["latent"], np.maximum(r.mean(0), 0)), 2)
    return mu, 0.1 + 0.9 * expit(raw)


def test_faithful_cnp_reads_no_shared_score_and_predicts_every_target(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.cnp(tiny_model, size=6, hidden=8, faithful=True)
    params = perturbed(initial(strategy))
    expected = []
    for u in range(5):
        support, query = user(task.support, u), user(task.query, u)
        r = network(params["encoder"], encoded(tiny_model, params, support)).mean(0)
        x, y = (np.concatenate(column) for column in zip(support, query, strict=True))
        scores = np.asarray(concatenated(params, r, tiny_model.embed(params["model"], x)))
        expected.append(((scores - y) ** 2).mean())
    np.testing.assert_allclose(strategy.loss(params, task, KEY)[0], np.mean(expected), rtol=1e-4)


@pytest.mark.parametrize("name", ["anp", "tanp"])
def test_faithful_neural_processes_minimise_the_evidence_lower_bound(name, task_batch, tiny_model):
    """KL(q || p) = log(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2, summed over the numbers of z."""
    task = task_batch()
    options = {"heads": 2} if name == "anp" else {"clusters": 3, "clustering": 0.3}
    strategy = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC, size=6, hidden=8, faithful=True, **options)
    params = perturbed(initial(strategy))
    noise = np.asarray(normal_per_user(KEY, 5, (6,)))
    adapted = strategy.adapt(params, task.support, KEY)
    z, divergence = np.zeros((5, 6), np.float32), np.zeros(5)
    for u in range(5):
        support, query = user(task.support, u), user(task.query, u)
        n, t = posterior(name, params, encoded(tiny_model, params, support))
        m, s = posterior(name, params, encoded(tiny_model, params, support, query))
        close(adapted["z"][u], n, atol=1e-5)
        z[u] = m + s * noise[u]
        divergence[u] = (np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum()
    value, aux = strategy.loss(params, task, KEY)
    np.testing.assert_allclose(aux["kl"], divergence.mean(), rtol=1e-3)
    parts = [(strategy.predict(params, adapted | {"z": z}, part.features), part) for part in task]
    bound = np.zeros(5)
    for u in range(5):
        real = [np.asarray(part.mask[u]) > 0 for _, part in parts]
        scores = np.concatenate([s[u][r] for (s, _), r in zip(parts, real, strict=True)])
        targets = np.concatenate([part.target[u][r] for (_, part), r in zip(parts, real, strict=True)])
        bound[u] = (np.asarray(LOGISTIC(scores, targets)).sum() + divergence[u]) / len(targets)
    grouping = 0.3 * aux["clustering"] if name == "tanp" else 0.0
    np.testing.assert_allclose(value, bound.mean() + grouping, rtol=1e-3)
    with pytest.raises(ValueError, match="remove kl"):
        mr.STRATEGIES[name](tiny_model, kl=0.1, faithful=True)


def test_faithful_tanp_groups_by_the_sharpened_assignment_and_scores_by_its_decoder(task_batch, tiny_model):
    task = task_batch()
    strategy = mr.tanp(tiny_model, size=6, hidden=8, clusters=3, gated=False, faithful=True)
    params = perturbed(initial(strategy))
    adapted = strategy.adapt(params, task.support, KEY)
    scores, c = strategy.predict(params, adapted, task.query.features), np.zeros((5, 3))
    for u in range(5):
        t = network(params["task"], encoded(tiny_model, params, user(task.support, u))).mean(0)
        kernel = 1 / (1 + ((t - np.asarray(params["centroids"])) ** 2).sum(1))
        c[u] = kernel / kernel.sum()
        o = t + c[u] @ np.asarray(params["centroids"])
        phi = np.asarray(tiny_model.embed(params["model"], task.query.features[u]))
        g = np.hstack([phi, np.tile(adapted["z"][u], (4, 1))])
        for layer in jax.tree.map(np.asarray, params["decoder"]):
            gamma, beta = np.tanh(o @ layer["gamma"]), np.tanh(o @ layer["beta"])
            g = np.maximum(gamma * (g @ layer["weight"] + layer["bias"]) + beta, 0)
        close(scores[u], network(params["out"], g)[:, 0], rtol=1e-3, atol=1e-4)
    d = c**2 / c.sum(0)
    d /= d.sum(1, keepdims=True)
    aux = strategy.loss(params, task, KEY)[1]
    np.testing.assert_allclose(aux["clustering"], rel_entr(d, c).sum(1).mean(), rtol=1e-3)


# By name


@pytest.mark.parametrize(
    "name", ["mamo", *(pytest.param(n, marks=pytest.mark.grid) for n in ("maml", "anp", "prototypes"))]
)
def test_a_faithful_strategy_trains_by_name(name, synthetic):
    options = {"objective": "click", "epochs": 1, "progress": False, "buckets": 1, "model_options": {"width": 4}}
    recommender = mr.train(synthetic, name, strategy_options={"faithful": True}, **options)
    assert np.isfinite(recommender.history[-1]["loss"])
