"""What must hold for every strategy in the list; a new one is tested by being listed."""

import inspect
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax.core._plan import PlainFormWarning
from metarec_jax.types import Examples, Task

LOGISTIC = optax.losses.sigmoid_binary_cross_entropy
READERS = ("in_context",)  # strategies whose model must read the history
FAMILIES = ("ridge", "maml", "mamlpp", "in_context", "alpaca", "prototypes", "tanp", "mwuf", "gated", "lora", "reptile")
LEARNING = ("ridge", "maml", "in_context", "alpaca", "mwuf")  # the slowest test
PLAINLY_TRAINED = ("pretrain", "finetune", "finetune_head", "lora")  # training does not see any adaptation


@pytest.fixture(params=list(mr.STRATEGIES), scope="module")
def strategy(request, tiny_model, tiny_reading_model):
    """Of a module, so that a strategy's tests follow one another and share compiled programs."""
    model = tiny_reading_model if request.param in READERS else tiny_model
    return mr.STRATEGIES[request.param](model, loss=LOGISTIC)


FAMILY = pytest.mark.parametrize(
    "strategy", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.grid) for n in mr.STRATEGIES], indirect=True
)


@pytest.fixture(params=[n if n in FAMILIES else pytest.param(n, marks=pytest.mark.grid) for n in mr.STRATEGIES])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reading_task():
    """A dataset and one batch of its tasks."""
    data = mr.data.synthetic(users=30, items=40, seed=0)
    histories = mr.tasks.Histories.of(data, np.arange(1, 5))
    (batch,) = mr.tasks.batches(histories, mr.tasks.Target("click"), query=5, batch_size=4, buckets=(16,))
    return data, batch.task


def test_shapes_are_those_of_the_interface(strategy, task_batch):
    task, key = task_batch(), jax.random.key(0)

    def everything(key):
        params = strategy.init(key)
        adapted = strategy.adapt(params, task.support, key)
        return adapted, strategy.predict(params, adapted, task.query.features), strategy.loss(params, task, key)

    adapted, found, (value, aux) = jax.eval_shape(everything, key)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(adapted)} == {5}
    assert found.shape == (5, 4)
    assert value.shape == ()
    assert isinstance(aux, dict)


@FAMILY
def test_padding_and_empty_users_never_change_loss_gradient_or_scores(strategy, task_batch):
    task, params = task_batch(mask=False), parameters(strategy)

    def pad(x):
        x = np.asarray(x)
        x = np.concatenate([x, np.zeros((x.shape[0], 3, *x.shape[2:]), x.dtype)], axis=1)
        return np.concatenate([x, np.zeros((2, *x.shape[1:]), x.dtype)])

    padded = jax.tree.map(pad, task)
    expected, gradient = loss_and_gradient(strategy, params, task)
    value, padded_gradient = loss_and_gradient(strategy, params, padded)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), padded_gradient, gradient)
    ragged = task_batch().support
    padding = np.asarray(ragged.mask) == 0
    garbage = ragged._replace(
        features=np.where(padding[..., None], 9.0, ragged.features).astype(np.float32),
        target=np.where(padding, 9.0, ragged.target).astype(np.float32),
    )
    one, two = (scores(strategy, params, Task(support, task.query)) for support in (ragged, garbage))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    one, two = (scores(strategy, params, t) for t in (task, padded))
    np.testing.assert_allclose(two[:5, :4], one, rtol=1e-4, atol=1e-5)


def test_users_do_not_influence_each_other(strategy, task_batch):
    task, params = task_batch(), parameters(strategy)
    together = scores(strategy, params, task)
    for u in range(5):
        alone = jax.tree.map(lambda x, u=u: x[u : u + 1], task)
        np.testing.assert_allclose(scores(strategy, params, alone)[0], together[u], rtol=1e-4, atol=1e-5)


@FAMILY
def test_the_order_of_the_support_set_does_not_matter(strategy, task_batch):
    task, params = task_batch(), parameters(strategy)
    reversed_ = jax.tree.map(lambda x: np.asarray(x)[:, ::-1].copy(), task.support)
    one = scores(strategy, params, task)
    two = scores(strategy, params, Task(reversed_, task.query))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@FAMILY
def test_no_support_one_class_and_any_constant_targets_give_finite_scores_and_gradients(strategy, task_batch):
    task, params = task_batch(), initial(strategy)
    for target in (-2.0, 0.0, 1.0, 3.0):  # learned labels are not bounded
        for empty in (0.0, 1.0):
            support = task.support._replace(
                target=np.full_like(task.support.target, target), mask=np.asarray(task.support.mask) * empty
            )
            value, gradient = loss_and_gradient(strategy, params, Task(support, task.query))
            assert np.isfinite(value)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("name", "options"),
    [("reptile", {}), ("metaemb", {"alpha": 1.0}), ("gme", {"alpha": 1.0}), *((name, {}) for name in PLAINLY_TRAINED)],
)
def test_a_loss_on_the_support_set_moves_neither_its_targets_nor_its_weights(name, options, task_batch, tiny_model):
    """Labels and weights are learned; one that could lower such a loss by moving would run away."""
    task, key = task_batch(), jax.random.key(0)
    strategy = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC, **options)
    params = parameters(strategy)

    def loss(target, mask):
        return strategy.loss(params, Task(task.support._replace(target=target, mask=mask), task.query), key)[0]

    target, mask = jnp.asarray(task.support.target), jnp.asarray(task.support.mask)
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(target, mask)
    assert np.isfinite(value)
    assert not any(np.asarray(gradient).any() for gradient in gradients)
    loss = jax.jit(loss)
    assert loss(jnp.full_like(target, 50.0), mask) == loss(jnp.ones_like(target), mask)


@pytest.mark.parametrize(
    "strategy",
    [
        n if n in LEARNING else pytest.param(n, marks=pytest.mark.grid)
        for n in mr.STRATEGIES
        if n not in PLAINLY_TRAINED
    ],
    indirect=True,
)
def test_meta_training_learns_users_that_differ_in_sign(strategy):
    """User u likes what sign_u * x_0 > 0 says: nothing can be known without adapting, everything with it."""
    rng = np.random.default_rng(0)

    def task(users=64):
        sign = rng.choice([-1.0, 1.0], size=(users, 1))

        def examples(n):
            x = rng.normal(size=(users, n, 3)).astype(np.float32)
            return Examples(x, (sign * x[..., 0] > 0).astype(np.float32), np.ones((users, n), np.float32))

        return Task(examples(16), examples(16))

    key, optimizer = jax.random.key(0), optax.adam(0.02)
    params = initial(strategy)
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))
    for _ in range(300):
        params, state, _ = step(params, state, task(), key)
    held_out = task(256)
    blind = Task(held_out.support._replace(mask=np.zeros((256, 16), np.float32)), held_out.query)
    adapted, unadapted = (
        np.mean((np.asarray(scores(strategy, params, t)) > 0) == (t.query.target > 0.5)) for t in (held_out, blind)
    )
    assert adapted > 0.8
    assert 0.4 < unadapted < 0.6


@partial(jax.jit, static_argnums=0)
def initial(strategy):
    return strategy.init(jax.random.key(0))


def parameters(strategy):
    """Parameters away from their initial zeros, so that no term is hidden by one."""

    def moved(x):
        return x + 0.1 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    return jax.tree.map(moved, jax.device_get(initial(strategy)))


@partial(jax.jit, static_argnums=0)
def loss_and_gradient(strategy, params, task):
    return jax.value_and_grad(lambda p: strategy.loss(p, task, jax.random.key(0))[0])(params)


@partial(jax.jit, static_argnums=0)
def scores(strategy, params, task):
    """Adapt to the support, score the query."""
    return strategy.predict(params, strategy.adapt(params, task.support, jax.random.key(0)), task.query.features)


@pytest.mark.parametrize("network", ["deepfm", pytest.param("gru", marks=pytest.mark.grid), "hstu"])
def test_every_strategy_differentiates_through_every_kind_of_network(name, network, reading_task):
    """By shapes alone, which no compiler needs to see; values are tested on the small networks."""
    data, task = reading_task
    model = mr.models.MODELS[network](mr.models.fields_of(data))
    if name in READERS and not model.history:
        pytest.skip("reads the history, which this network does not")
    strategy = mr.STRATEGIES[name](model, loss=LOGISTIC)
    strategy = mr.with_history(strategy) if model.history else strategy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainFormWarning)  # a recurrent layer is used at every step
        params = jax.eval_shape(strategy.init, jax.random.key(0))
        gradient = jax.eval_shape(jax.grad(lambda p: strategy.loss(p, task, jax.random.key(0))[0]), params)
    assert jax.tree.map(lambda x: x.shape, gradient) == jax.tree.map(lambda x: x.shape, params)


def takes(name, argument):
    return argument in inspect.signature(mr.STRATEGIES[name]).parameters


@pytest.mark.parametrize(
    "name",
    [
        n if n in FAMILIES else pytest.param(n, marks=pytest.mark.grid)
        for n in mr.STRATEGIES
        if takes(n, "inner") and n != "mwuf"  # it reads them too
    ],
)
def test_a_count_holds_users_of_few_examples_back(name, task_batch, tiny_model):
    task = task_batch()
    nothing = task.support._replace(mask=np.zeros_like(task.support.mask))

    def moved(count):
        strategy = mr.STRATEGIES[name](tiny_model, loss=LOGISTIC, count=count)
        params = initial(strategy)
        one, two = (scores(strategy, params, Task(support, task.query)) for support in (task.support, nothing))
        return np.abs(one - two).max()

    assert moved(1e9) < 1e-3 * moved(0.0)
    with pytest.raises(ValueError, match="count must be 0 or more"):
        moved(-1.0)


def test_every_strategy_with_inner_steps_takes_a_count():
    assert all(takes(name, "count") for name in mr.STRATEGIES if takes(name, "inner") or name == "ensemble")
