"""Meta-Embedding, GME and MWUF against their equations, written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.models.profile import profile
from metarec_jax.strategies.cold_items import gme, metaemb, shared_values
from metarec_jax.strategies.decoder import decoder
from metarec_jax.strategies.mwuf import mwuf
from metarec_jax.types import Examples, Task, mean_loss

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
KEY = jax.random.key(0)
FIELDS = {
    "user/genres": mr.data.Field("genres", "multi", 6, 3),
    "user/kind": mr.data.Field("kind", "categorical", 4, 1),
}
EXISTING = {  # of seven tasks
    "user/genres": np.array([[1, 0, 0], [1, 2, 0], [3, 0, 0], [4, 5, 0], [5, 0, 0], [2, 3, 0], [0, 0, 0]]),
    "user/kind": np.array([1, 2, 3, 1, 2, 3, 0]),
}
ALL = pytest.mark.parametrize("make", [metaemb, partial(gme, existing=EXISTING, neighbours=3), gme, mwuf])


@pytest.fixture
def model(tiny_model):
    """The tiny model with a profile of the user's genres and kind beside its own features."""

    def reading(f):
        return lambda params, features: f(params, features["x"])

    return tiny_model._replace(
        apply=reading(tiny_model.apply), embed=reading(tiny_model.embed), profile=profile(FIELDS, 3)
    )


@pytest.fixture
def task(task_batch):
    """Tasks of five users whose attributes are those of the first existing ones."""

    def with_attributes(examples):
        places = examples.mask.shape[1]
        own = {name: np.repeat(codes[:5, None], places, axis=1) for name, codes in EXISTING.items()}
        return examples._replace(features={"x": examples.features, **own})

    return Task(*map(with_attributes, task_batch()))


@pytest.mark.parametrize("steps", [1, 2])
def test_an_embedding_warms_up_by_gradient_steps_from_the_generated_one(model, task, steps):
    strategy, score = metaemb(model, loss=LOGISTIC, steps=steps, size=4), decoder(model, 4)
    params = strategy.init(KEY)
    own = jax.tree.map(lambda x: x[:, :1], {name: task.support.features[name] for name in FIELDS})
    z = model.profile.apply(params["generator"]["profile"], own)[:, 0]
    expected = np.tanh(np.asarray(z @ params["generator"]["out"]))

    def support_loss(embedding, user):
        scores = score.apply(params["decoder"], embedding[None], jax.tree.map(lambda x: x[None], user.features))
        return mean_loss(LOGISTIC, scores[0], user)

    for _ in range(steps):
        expected = expected - 0.1 * jax.vmap(jax.grad(support_loss))(jnp.asarray(expected), task.support)
    np.testing.assert_allclose(strategy.adapt(params, task.support, KEY), expected, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighed_sum_of_the_cold_and_the_warm_loss(model, task):
    cold, warm, both = (metaemb(model, loss=LOGISTIC, alpha=alpha) for alpha in (1.0, 0.0, 0.1))
    params = cold.init(KEY)
    values = [float(strategy.loss(params, task, KEY)[0]) for strategy in (cold, warm, both)]
    assert values[2] == pytest.approx(0.1 * values[0] + 0.9 * values[1], rel=1e-5)
    start = warm.adapt(params, task.support._replace(mask=np.zeros((5, 7), np.float32)), KEY)  # nothing to learn from
    scores = warm.predict(params, start, task.support.features)
    assert values[0] == pytest.approx(float(mr.core.query_loss(scores, task.support, LOGISTIC)), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_meta_gradient_goes_through_the_warm_up_into_the_generator(model, task, steps):
    strategy, score = metaemb(model, loss=LOGISTIC, steps=steps, size=4), decoder(model, 4)
    params = strategy.init(KEY)

    def written_out(params):
        def of_one(user):
            support, query = jax.tree.map(lambda x: x[None], user)
            own = {name: support.features[name][:, 0] for name in FIELDS}
            z = model.profile.apply(params["generator"]["profile"], own)

            def mean(embedding, examples):
                scores = score.apply(params["decoder"], embedding, examples.features)
                return (LOGISTIC(scores, examples.target) * examples.mask).sum() / examples.mask.sum()

            embedding = jnp.tanh(z @ params["generator"]["out"])
            cold = mean(embedding, support)
            for _ in range(steps):
                move = jax.grad(mean)(embedding, support)
                embedding = embedding - 0.1 * jnp.exp(params["log_step_size"]) * move
            return 0.1 * cold + 0.9 * mean(embedding, query)

        return jax.vmap(of_one)(task).mean()

    expected = jax.jit(jax.grad(written_out))(params)
    found = jax.jit(jax.grad(lambda p: strategy.loss(p, task, KEY)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)


@ALL
def test_without_support_the_attributes_alone_decide(make, model, task):
    strategy = make(model, loss=LOGISTIC)
    params = strategy.init(KEY)
    mask = np.zeros((5, 7), np.float32)
    one = strategy.adapt(params, task.support._replace(mask=mask), KEY)
    noise = task.support._replace(target=1 - task.support.target, mask=mask)
    np.testing.assert_array_equal(one, strategy.adapt(params, noise, KEY))
    same = jax.tree.map(lambda x: np.repeat(x[:1], 5, axis=0), {name: task.support.features[name] for name in FIELDS})
    alike = strategy.adapt(params, task.support._replace(features=task.support.features | same, mask=mask), KEY)
    np.testing.assert_allclose(alike, np.repeat(alike[:1], 5, axis=0), rtol=1e-5)
    assert np.abs(np.diff(one, axis=0)).max(1).min() > 1e-4  # every neighbour in the batch has other attributes
    assert np.abs(np.diff(strategy.predict(params, one, same_examples(task)), axis=0)).min() > 1e-6


def test_meta_training_puts_what_attributes_say_into_the_cold_embedding(model):
    """Tasks of kind 1 are liked, others are not: a learner that never sees the kind can do no better than chance."""
    rng, strategy = np.random.default_rng(0), metaemb(model, loss=LOGISTIC)

    def tasks(users=64):
        kind = rng.integers(1, 3, size=users)

        def examples(n):
            x = rng.normal(size=(users, n, 3)).astype(np.float32)
            own = {"user/kind": np.repeat(kind[:, None], n, 1), "user/genres": np.zeros((users, n, 3), int)}
            return Examples({"x": x, **own}, np.repeat(kind[:, None] == 1, n, 1) * 1.0, np.ones((users, n), np.float32))

        return Task(examples(4), examples(4))

    optimizer = optax.adam(0.02)
    params = strategy.init(KEY)
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))
    for _ in range(60):
        params, state, _ = step(params, state, tasks(), KEY)
    held_out = tasks()
    cold = strategy.adapt(params, held_out.support._replace(mask=np.zeros((64, 4), np.float32)), KEY)
    scores = strategy.predict(params, cold, held_out.query.features)
    assert np.mean((np.asarray(scores) > 0) == (held_out.query.target > 0.5)) > 0.95


def test_neighbours_are_the_tasks_that_share_the_most_values(task):
    shared = np.asarray(shared_values(EXISTING, task.support))
    for u in range(5):
        for i in range(7):
            genres = [set(EXISTING["user/genres"][k]) - {0} for k in (u, i)]
            kinds = [EXISTING["user/kind"][k] for k in (u, i)]
            assert shared[u, i] == len(genres[0] & genres[1]) + (kinds[0] == kinds[1] != 0)


def test_the_generated_embedding_is_that_of_graph_attention(model, task):
    strategy = gme(model, loss=LOGISTIC, existing=EXISTING, neighbours=7, steps=0, size=4)
    params = strategy.init(KEY)
    found = strategy.adapt(params, task.support, KEY)
    p = jax.tree.map(np.asarray, params["generator"])
    z = np.asarray(model.profile.apply(p["profile"], EXISTING))
    shared = np.asarray(shared_values(EXISTING, task.support))
    for u in range(5):  # user u has the attributes of task u
        linked = [z[u], *(z[i] for i in range(7) if shared[u, i])]
        values = np.array(linked) @ p["value"]
        pairs = np.array([np.concatenate([values[0], value]) @ p["attention"].T.ravel() for value in values])
        weight = np.exp(np.where(pairs > 0, pairs, 0.2 * pairs))
        refined = (weight / weight.sum()) @ values
        elu = np.where(refined > 0, refined, np.expm1(refined))
        np.testing.assert_allclose(found[u], np.tanh(elu @ p["out"]), rtol=1e-4, atol=1e-5)


def test_a_task_that_shares_nothing_attends_to_itself_alone(model, task):
    few = {name: codes[:1] for name, codes in EXISTING.items()}
    strategy = gme(model, loss=LOGISTIC, existing=few, steps=0, size=4)
    params = strategy.init(KEY)
    alone = gme(model, loss=LOGISTIC, existing=jax.tree.map(np.zeros_like, few), steps=0, size=4)
    linked = np.asarray(shared_values(few, task.support))[:, 0] > 0
    same = np.isclose(strategy.adapt(params, task.support, KEY), alone.adapt(params, task.support, KEY)).all(1)
    assert linked.tolist() == [True, True, False, True, False]  # a genre or the kind in common with task 0
    assert same.tolist() == [True, False, True, False, True]  # task 0 is its own only neighbour


def test_the_warm_embedding_is_the_cold_one_scaled_and_shifted(model, task):
    strategy = mwuf(model, loss=LOGISTIC, steps=0, size=4)
    params = strategy.init(KEY)
    found = strategy.adapt(params, task.support, KEY)
    p = jax.tree.map(np.asarray, params)

    def network(net, x):
        return np.maximum(x @ net["in"] + net["bias"], 0) @ net["out"]

    z = np.asarray(model.profile.apply(p["profile"], EXISTING))
    for u in range(5):
        n = int(task.support.mask[u].sum())
        phi = np.asarray(model.embed(p["decoder"]["model"], {"x": task.support.features["x"][u, :n]}))
        means = np.concatenate([phi.mean(0), (task.support.target[u, :n, None] * phi).mean(0)])
        expected = (1 + network(p["scale"], z[u])) * p["common"] + network(p["shift"], means)
        np.testing.assert_allclose(found[u], expected, rtol=1e-4, atol=1e-6)


def test_bad_arguments_are_refused_at_construction(model, tiny_model):
    for make in (metaemb, gme, mwuf):
        with pytest.raises(ValueError, match="embed"):
            make(mr.Model(tiny_model.init, tiny_model.apply))
        with pytest.raises(ValueError, match="steps >= 0"):
            make(model, steps=-1)
    with pytest.raises(ValueError, match="alpha"):
        metaemb(model, alpha=1.5)
    with pytest.raises(ValueError, match="neighbours"):
        gme(model, neighbours=0)
    with pytest.raises(ValueError, match="hidden"):
        mwuf(model, hidden=0)
    with pytest.raises(ValueError, match="profile"):
        gme(tiny_model, existing=EXISTING)
    with pytest.raises(ValueError, match="integer field"):
        gme(model, existing={"user/year": np.zeros((7, 1), np.float32)})


def same_examples(task):
    """The query's features with the same examples for every user."""
    return task.query.features | {"x": np.repeat(task.query.features["x"][:1], 5, axis=0)}
