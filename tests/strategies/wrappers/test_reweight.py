"""Weights and labels of support examples: what they mean, that they are learned, and that errors are found."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.strategies.wrappers.labels import with_labels
from metarec_jax.strategies.wrappers.reweight import reweighted
from metarec_jax.types import Examples, Task

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
# those that read the mask as weights; of the others nothing is claimed
WEIGHING = (
    *("ridge", "alpaca", "prototypes", "lwa", "nlba"),
    *("maml", "fomaml", "anil", "melu", "meta_sgd", "mamlpp", "imaml", "cavia", "limaml", "mamo"),
    *("cnp", "anp", "tanp", "metaemb", "mwuf", "ensemble", "sparse_maml", "meta_reg", "gated"),
    *("finetune", "finetune_head", "lora"),
)
FAMILIES = ("ridge", "alpaca", "maml", "tanp", "mwuf", "finetune")


@partial(jax.jit, static_argnums=0)
def scores(strategy, params, task):
    adapted = strategy.adapt(params, task.support, jax.random.key(0))
    return strategy.predict(params, adapted, task.query.features)


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.grid) for n in WEIGHING])
def test_an_example_of_weight_two_counts_as_two(name, tiny_model, task_batch):
    strategy, task = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC), task_batch()
    params = jax.tree.map(lambda x: x + 0.1, jax.jit(strategy.init)(jax.random.key(0)))
    support = jax.tree.map(np.asarray, task.support)
    twice = np.array([0, 2])  # these examples of every user
    weight = support.mask.copy()
    weight[:, twice] *= 2
    longer = jax.tree.map(lambda x: np.concatenate([x, x[:, twice]], 1), support)
    weighed = scores(strategy, params, task._replace(support=support._replace(mask=weight)))
    np.testing.assert_allclose(weighed, scores(strategy, params, task._replace(support=longer)), rtol=2e-4, atol=2e-5)
    assert not np.allclose(weighed, scores(strategy, params, task), atol=1e-6)


def noisy_tasks(seed, users=64, examples=24, share=0.3):
    """Users of a linear taste in two features; a share of the support labels is flipped, the query is clean."""
    rng = np.random.default_rng(seed)
    shared = np.array([2.0, -2.0])
    taste = shared + 0.5 * rng.normal(size=(users, 2))

    def part(n, flip):
        x = rng.normal(size=(users, n, 2)).astype(np.float32)
        y = (np.einsum("unf,uf->un", x, taste) > 0).astype(np.float32)
        flipped = rng.random(y.shape) < flip
        return Examples(x, np.where(flipped, 1 - y, y).astype(np.float32), np.ones_like(y)), flipped

    (support, flipped), (query, _) = part(examples, share), part(examples, 0.0)
    return Task(support, query), flipped


def trained(strategy, steps=200):
    optimizer = optax.adam(0.02)
    params = jax.jit(strategy.init)(jax.random.key(0))
    state = optimizer.init(params)
    step = jax.jit(mr.meta_step(strategy.loss, optimizer))
    for i in range(steps):
        params, state, aux = step(params, state, noisy_tasks(i)[0], jax.random.key(i))
    return params, float(aux["loss"])


@pytest.fixture(scope="module")
def linear():
    def init(key):
        return {"w": jnp.zeros(2), "b": jnp.zeros(())}

    return mr.Model(init, lambda p, x: x @ p["w"] + p["b"], lambda p, x: x, width=2)


def test_flipped_labels_are_found_and_weigh_less(linear):
    plain = mr.ridge(linear, loss=LOGISTIC, steps=3)
    robust = reweighted(plain)
    (_, before), (params, after) = trained(plain), trained(robust)
    assert after < before - 0.005
    task, flipped = noisy_tasks(10_000)
    seen = {}

    def spy(inner, support, key):
        seen["mask"] = np.asarray(support.mask)
        return plain.adapt(inner, support, key)

    reweighted(plain._replace(adapt=spy)).adapt(params, task.support, jax.random.key(0))
    assert seen["mask"][flipped].mean() < 0.5 * seen["mask"][~flipped].mean()


def test_no_change_at_first_and_none_for_padding(linear, task_batch):
    plain = mr.ridge(linear, loss=LOGISTIC)
    robust = reweighted(plain)
    task, _ = noisy_tasks(0)
    params = robust.init(jax.random.key(1))
    np.testing.assert_allclose(scores(robust, params, task), scores(plain, params["strategy"], task), rtol=1e-5)
    none = task._replace(support=task.support._replace(mask=np.zeros_like(task.support.mask)))
    assert np.isfinite(scores(robust, params, none)).all()
    gradient = jax.grad(lambda p: robust.loss(p, none, jax.random.key(0))[0])(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_labels_interpolate_between_their_knots(linear):
    plain = mr.ridge(linear, loss=LOGISTIC)
    labelled = with_labels(plain, [0.0, 0.5, 1.0], [0.0, 0.2, 1.0])
    task, _ = noisy_tasks(0)
    grades = np.random.default_rng(0).random(task.support.target.shape).astype(np.float32)
    graded = task._replace(support=task.support._replace(target=grades))
    expected = np.where(grades < 0.5, 0.4 * grades, 0.2 + 1.6 * (grades - 0.5)).astype(np.float32)
    wanted = task._replace(support=task.support._replace(target=expected))
    params = labelled.init(jax.random.key(0))
    own = {name: value for name, value in params.items() if name != "label_shifts"}
    np.testing.assert_allclose(scores(labelled, params, graded), scores(plain, own, wanted), rtol=1e-4, atol=1e-6)


def test_labels_learn_which_grade_tells_nothing(linear):
    """Grade 1/2 is given at random: what it is worth must become that of no evidence, between the others."""

    def graded(seed):
        task, _ = noisy_tasks(seed, share=0.0)
        rng = np.random.default_rng(seed)
        blank = rng.random(task.support.target.shape) < 0.5
        target = np.where(blank, 0.5, task.support.target).astype(np.float32)
        return task._replace(support=task.support._replace(target=target))

    strategy = with_labels(mr.ridge(linear, loss=LOGISTIC, steps=3), [0.0, 0.5, 1.0], [0.0, 0.0, 1.0])
    optimizer = optax.adam(0.02)
    params = strategy.init(jax.random.key(0))
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))
    for i in range(150):
        params, state, _ = step(params, state, graded(i), jax.random.key(i))
    low, middle, high = np.array([0.0, 0.0, 1.0]) + params["label_shifts"]
    assert low + 0.25 * (high - low) < middle < low + 0.75 * (high - low)


def test_labels_want_ascending_knots(linear):
    plain = mr.ridge(linear, loss=LOGISTIC)
    for at, start in (([0.0], [1.0]), ([1.0, 0.0], [0.0, 1.0]), ([0.0, 1.0], [0.0])):
        with pytest.raises(ValueError, match="ascending knots"):
            with_labels(plain, at, start)
