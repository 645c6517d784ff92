"""Row-sparse tables: dense updates where they must be equal, nothing but the batch's rows touched or paid for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metarec_jax as mr
from metarec_jax import core
from metarec_jax.core import sparse
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples, Task, masked_mean

ROWS, WIDTH = 40, 3
TABLES = {"item_id": ["item", "bias"], "genres": "genre"}


def draw(seed=0, users=4, examples=6, rows=ROWS, low=1):
    """A task with repeated ids, padding of values and of examples (id 0), and few of the rows."""
    rng = np.random.default_rng(seed)
    few = rng.choice(np.arange(low, rows), 8)

    def part(n):
        mask = np.arange(n) < rng.integers(1, n + 1, size=(users, 1))
        genres = rng.integers(0, 5, size=(users, n, 2))
        features = {"item_id": np.where(mask, rng.choice(few, (users, n)), 0), "genres": genres * mask[..., None]}
        features = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), features)
        target = jnp.asarray(rng.normal(size=(users, n)), jnp.float32)
        return Examples(features, target, jnp.asarray(mask, jnp.float32))

    return Task(part(examples), part(examples - 2))


def init(rows=ROWS, seed=0):
    a, b, c, d = jax.random.split(jax.random.key(seed), 4)
    return {
        "item": jax.random.normal(a, (rows, WIDTH)),
        "bias": 0.1 * jax.random.normal(b, (rows,)),
        "genre": jax.random.normal(c, (9, WIDTH)),
        "mix": jax.random.normal(d, (WIDTH,)),
        "none": None,
    }


def apply(params, features):
    present = (features["genres"] > 0)[..., None]
    genre = jnp.where(present, params["genre"][features["genres"]], 0.0).sum(-2)
    item = params["item"][features["item_id"]]
    return jnp.tanh(item + genre) @ params["mix"] + params["bias"][features["item_id"]]


def loss(params, task, key):
    """Each user gets the mean residual of the support as a bias."""
    residual = task.support.target - apply(params, task.support.features)
    scores = apply(params, task.query.features) + jax.vmap(masked_mean)(residual, task.support.mask)[:, None]
    return core.query_loss(scores, task.query, optax.losses.squared_error), {"mean": scores.mean()}


def run(init, step, params, tasks):
    step, state = jax.jit(step), jax.jit(init)(params)
    for task in tasks:
        params, state, aux = step(params, state, task, jax.random.key(0))
    assert step._cache_size() == 1  # nothing is compiled anew in a loop
    return params, state, aux


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adagrad(0.1)], ids=["sgd", "adagrad"])
def test_sgd_and_adagrad_equal_the_dense_update(optimizer):
    tasks, params = [draw(seed) for seed in range(4)], init()
    dense, _, aux = run(optimizer.init, core.meta_step(loss, optimizer), params, tasks)
    rows, _, sparse_aux = run(*sparse.meta_step(loss, optimizer, optimizer, TABLES), params, tasks)
    same(rows, dense, rtol=1e-6, atol=1e-7)
    same(sparse_aux, aux, rtol=1e-6)
    assert np.abs(dense["item"] - params["item"]).max() > 1e-2


def every_row(seed=0, rows=9):
    """A task whose support has every row of both tables."""
    task, ids = draw(seed, rows=rows), jnp.arange(24).reshape(4, 6) % rows
    features = {"item_id": ids, "genres": jnp.stack([ids, ids], -1)}
    return task._replace(support=task.support._replace(features=features))


def test_adam_is_dense_adam_while_every_step_touches_every_row():
    optimizer, params = optax.adam(0.01), init(rows=9)
    tasks = [every_row(seed) for seed in range(4)]
    dense, _, _ = run(optimizer.init, core.meta_step(loss, optimizer), params, tasks)
    rows, state, _ = run(*sparse.meta_step(loss, optimizer, optimizer, TABLES), params, tasks)
    same(rows, dense, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.tables["item"][0].count, 4)


def linear(params, task, key):
    """A loss whose gradient is the target: rows and what they get can be worked out by hand."""
    return (params["item"][task.query.features["item_id"]] * task.query.target[..., None]).sum(), {}


def by_hand(ids, target):
    ids = jnp.asarray(ids, jnp.int32)[None]
    part = Examples({"item_id": ids}, jnp.asarray(target, jnp.float32)[None], jnp.ones(ids.shape))
    return Task(part, part)


def test_adam_runs_by_each_rows_own_steps():
    """Row 3 in steps 1 and 4, row 5 in 2 and 3: each as if the others had not been."""
    optimizer, params = optax.adam(0.1), {"item": jnp.zeros((7, 2))}
    tasks = [by_hand([row, row], target) for row, target in [(3, [1, 2]), (5, [1, 0]), (5, [-2, 1]), (3, [-1, 0])]]
    rows, state, _ = run(*sparse.meta_step(linear, optax.sgd(1.0), optimizer, {"item_id": "item"}), params, tasks)
    expected = np.zeros((7, 2), np.float32)
    for row, gradients in {3: [3.0, -1.0], 5: [1.0, -1.0]}.items():
        alone = jnp.zeros(2)
        own = optimizer.init(alone)
        for g in gradients:
            updates, own = optimizer.update(jnp.full(2, g), own, alone)
            alone += updates
        expected[row] = alone
    np.testing.assert_allclose(rows["item"], expected, rtol=1e-5)
    np.testing.assert_array_equal(state.tables["item"][0].count, [0, 0, 0, 2, 0, 2, 0])


def test_rowwise_adagrad_keeps_one_sum_a_row():
    rng = np.random.default_rng(0)
    params, tasks, table, sums = {"item": jnp.ones((6, WIDTH))}, [], np.ones((6, WIDTH)), np.full(6, 0.1)
    weight = jnp.asarray(rng.normal(size=WIDTH), jnp.float32)

    def weighted(params, task, key):
        return linear({"item": params["item"] * weight}, task, key)

    for _ in range(4):
        ids, target = rng.choice(4, 5), rng.normal(size=5).astype(np.float32)
        tasks.append(by_hand(ids, target))
        gradient = np.zeros((6, WIDTH))
        np.add.at(gradient, ids, target[:, None] * np.asarray(weight))
        sums += np.square(gradient).mean(-1)
        table -= 0.5 * gradient / np.sqrt(sums + 1e-7)[:, None]
    rule = sparse.rowwise_adagrad(0.5)
    rows, state, _ = run(*sparse.meta_step(weighted, optax.sgd(1.0), rule, {"item_id": "item"}), params, tasks)
    np.testing.assert_allclose(rows["item"], table, rtol=1e-5)
    np.testing.assert_allclose(state.tables["item"][0], sums, rtol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_other_rows_and_their_state_keep_their_bits(padded):
    task, params = draw(users=2), init()
    if not padded:  # then no id is 0, and row 0, always among the small table's rows, must stay
        parts = [p._replace(features=jax.tree.map(lambda x: jnp.maximum(x, 1), p.features)) for p in task]
        task = Task(*parts)
    build, step = sparse.meta_step(loss, optax.sgd(0.1), optax.adam(0.1), TABLES)
    state = jax.tree.map(lambda a: a + 1, jax.jit(build)(params))
    rows, new, _ = jax.jit(step)(params, state, task, None)
    for feature, paths in {"item_id": ["item", "bias"], "genres": ["genre"]}.items():
        used = np.unique(np.concatenate([np.ravel(part.features[feature]) for part in task]))
        assert (0 in used) == padded
        for path in paths:
            other = np.setdiff1d(np.arange(len(params[path])), used)
            assert len(other)
            before, after = (params[path], state.tables[path]), (rows[path], new.tables[path])
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[other], b[other]), before, after)
            np.testing.assert_array_equal(new.tables[path][0].count[used], 2)
            assert all((np.asarray(rows[path])[used] != np.asarray(params[path])[used]).ravel())


def test_the_loss_sees_small_tables_and_ids_in_order():
    seen = {}

    def look(params, task, key):
        seen["ids"], seen["rows"] = task.query.features["item_id"], params["item"]
        return params["item"].sum(), {"ids": seen["ids"], "rows": params["item"]}

    params = {"item": 10.0 * jnp.arange(ROWS, dtype=jnp.float32)[:, None]}
    task = by_hand([30, 7, 0, 30, -5, ROWS, ROWS + 9], np.ones(7))
    build, step = sparse.meta_step(look, optax.sgd(1.0), optax.sgd(1.0), {"item_id": "item"})
    rows, _, aux = jax.jit(step)(params, build(params), task, None)
    size = 2 * 7 + 2
    np.testing.assert_array_equal(aux["ids"][0], [2, 1, 0, 2, -1, size, size])
    np.testing.assert_array_equal(aux["rows"][:, 0], [0.0, 70.0, 300.0] + (size - 3) * [0.0])
    moved = np.flatnonzero(rows["item"][:, 0] != params["item"][:, 0])
    np.testing.assert_array_equal(moved, [0, 7, 30])


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_ids_that_are_no_rows_train_nothing(mode):
    def look_up(params, task, key):
        return params["item"].at[task.query.features["item_id"]].get(mode=mode, fill_value=0).sum(), {}

    params = {"item": jnp.ones((5, 2))}
    build, step = sparse.meta_step(look_up, optax.sgd(1.0), optax.sgd(1.0), {"item_id": "item"})
    rows, _, _ = jax.jit(step)(params, build(params), by_hand([2, 5, -1, 99, -7], np.ones(5)), None)
    np.testing.assert_array_equal(rows["item"], jnp.ones((5, 2)).at[2].set(0.0))


def test_features_may_share_a_table():
    def shared(params, task, key):
        item = params["item"][task.query.features["item_id"]] * task.query.target[..., None]
        return (item * params["item"][task.query.features["before"]]).sum(), {}

    tasks, params, optimizer = [], {"item": init()["item"]}, optax.adagrad(0.1)
    for seed in range(3):
        task = draw(seed)
        before = [{"item_id": p.features["item_id"], "before": p.features["item_id"][:, ::-1] + 1} for p in task]
        tasks.append(Task(*(p._replace(features=f) for p, f in zip(task, before, strict=True))))
    dense, _, _ = run(optimizer.init, core.meta_step(shared, optimizer), params, tasks)
    step = sparse.meta_step(shared, optax.sgd(1.0), optimizer, {("item_id", "before"): "item"})
    rows, _, _ = run(*step, params, tasks)
    same(rows, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [partial(mr.maml, steps=1), mr.ridge], ids=["maml", "ridge"])
def test_strategies_and_models_run_unchanged(make, synthetic):
    learner, optimizer = make(mr.models.linear(mr.models.fields_of(synthetic))), optax.sgd(0.1)
    train, rng = mr.ColdUsers().split(synthetic, seed=0).train, np.random.default_rng(0)
    made = batches(train, Target("click"), query=5, batch_size=8, buckets=(16,), rng=rng)
    tasks = [batch.task for batch, _ in zip(made, range(3), strict=False)]
    named = ["item_id", "item/genre"]
    tables = {name: [f"model/embedding/{name}", f"model/embedding_bias/{name}"] for name in named}
    params = learner.init(jax.random.key(1))
    dense, _, _ = run(optimizer.init, core.meta_step(learner.loss, optimizer), params, tasks)
    rows, _, _ = run(*sparse.meta_step(learner.loss, optimizer, optimizer, tables), params, tasks)
    same(rows, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), sparse.rowwise_adagrad(0.1)], ids=["adam", "rowwise"])
def test_a_step_never_makes_another_array_of_a_tables_size(optimizer):
    build, step = sparse.meta_step(loss, optax.adam(0.1), optimizer, TABLES)

    def memory(rows):
        params = jax.eval_shape(lambda: init(rows))
        state, task = jax.eval_shape(build, params), jax.eval_shape(lambda: draw())
        program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, task, None).compile()
        return program.memory_analysis()

    few, many = memory(10**3), memory(10**6)
    assert many.temp_size_in_bytes <= few.temp_size_in_bytes + 10**4
    assert many.output_size_in_bytes - many.alias_size_in_bytes < 10**3


def test_bad_input_is_named():
    params, task = init(), draw()

    def build(tables, task=task, params=params):
        start, step = sparse.meta_step(loss, optax.sgd(0.1), optax.sgd(0.1), tables)
        return jax.eval_shape(step, params, jax.eval_shape(start, params), task, None)

    build(TABLES)
    for tables, message in [
        ({"item_id": "items"}, "nothing at 'items'"),
        ({"item_id": ["item", "item"]}, "'item' occurs twice"),
        ({"item_id": "item", "genres": "item"}, "'item' occurs twice"),
        ({"item_id": "item", ("genres", "item_id"): "genre"}, "'item_id' occurs twice"),
        ({"item_id": ["item", "genre"]}, "one number of rows"),
        ({"item": "item"}, "no feature 'item'"),
        ({"item_id": []}, "one number of rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(tables)
    floats = Task(*(p._replace(features=jax.tree.map(jnp.float32, p.features)) for p in task))
    with pytest.raises(ValueError, match="'item_id' must be an integer array, got float32"):
        build(TABLES, floats)
    with pytest.raises(ValueError, match="one number of rows"):
        build({"item_id": "scalar"}, params=params | {"scalar": jnp.zeros(())})
