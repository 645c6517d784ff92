"""SPMD: users, and rows of tables, sharded over eight devices get the results of one device, on every kind of mesh."""

import subprocess
import sys

import pytest

SCRIPT = r"""
import os, re, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import metarec_jax as mr
from metarec_jax import core

USERS, EXAMPLES, squared = 32, 6, optax.losses.squared_error
rng = np.random.default_rng(0)

def examples(failing):
    x, y = rng.normal(size=(USERS, EXAMPLES, 5)), rng.normal(size=(USERS, EXAMPLES))
    mask = np.arange(EXAMPLES) < rng.integers(1, EXAMPLES + 1, USERS)[:, None]
    if failing:
        x[3, 0, 0] = np.inf
    rows = rng.integers(0, 7, (USERS, EXAMPLES))
    return mr.Examples({"x": x.astype("f"), "row": rows.astype("i")}, y.astype("f"), mask.astype("f"))

shapes = {"w": (5, 4), "b": (4,), "table": (7, 4), "out": (4,)}
params = {name: jnp.array(rng.normal(size=shape), "f") for name, shape in shapes.items()}

def apply(p, features):
    return jnp.tanh(features["x"] @ p["w"] + p["b"] + p["table"][features["row"]]) @ p["out"]

def loss_of(adapt, **options):
    def loss(params, task, key):
        adapted = adapt(apply, params, task.support, **options)
        scores = core.predict(apply, params, adapted, task.query.features)
        return core.query_loss(scores, task.query, squared), {}
    return loss

losses = {
    "factored": loss_of(core.adapt, steps=1, form="dual"),
    "explicit": loss_of(core.adapt, steps=3, optimizer=optax.adam(0.05, eps_root=1e-8), form="plain"),
    "implicit": loss_of(core.implicit.adapt, damping=2.0, steps=5),
    "chunked": core.chunked(loss_of(core.adapt, steps=2), 16),
}
step = jax.value_and_grad(losses[sys.argv[1]], has_aux=True)
task = mr.Task(examples(True), examples(False))
(value, _), gradient = jax.jit(step)(params, task, None)

def on_mesh(kind):
    mesh = jax.make_mesh((8,), ("users",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(task, NamedSharding(mesh, P("users")))
        shared = jax.device_put(params, NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(shared, sharded, None).compile()
        collectives = "all-gather|all-to-all|collective-permute|all-reduce"
        lines = re.findall(rf"= (.*) (?:{collectives})(?:-start)?\(", compiled.as_text())
        sent = [size for line in lines for size in re.findall(r"\w+\[([\d,]*)\]", line)]
        assert sent, "nothing was sent, so that nothing was sharded"
        assert not any(size.split(",")[0] in ("16", "32") for size in sent), sent  # arrays of all users or of a chunk
        return compiled(shared, sharded, None)

def in_shard_map(varying, check):
    mesh = jax.make_mesh((8,), ("users",), axis_types=(AxisType.Auto,))
    def local(params, task):
        own = jax.lax.pcast(params, "users", to="varying") if varying else params
        (value, _), gradient = step(own, task, None)
        mean = (lambda x: jax.lax.pmean(x, "users")) if varying or not check else (lambda x: x / 8)
        return jax.lax.pmean(value, "users"), jax.tree.map(mean, gradient)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("users")), out_specs=(P(), P()), check_vma=check)
    value, gradient = jax.jit(mapped)(params, task)
    return (value, {}), gradient

for name, run in {
    "automatic": lambda: on_mesh(AxisType.Auto),
    "explicit": lambda: on_mesh(AxisType.Explicit),
    "shard_map": lambda: in_shard_map(False, True),
    "shard_map, varying parameters": lambda: in_shard_map(True, True),
    "shard_map, unchecked": lambda: in_shard_map(False, False),
}.items():
    (got, _), got_gradient = run()
    np.testing.assert_allclose(got, value, rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()), err_msg=name)
print("equal")
"""


@pytest.mark.parametrize(
    "loss", ["factored", "chunked", *(pytest.param(n, marks=pytest.mark.grid) for n in ("explicit", "implicit"))]
)
def test_sharded_users_get_the_loss_and_gradient_of_one_device(loss):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, loss], capture_output=True, text=True, timeout=300, check=False)
    assert ran.stdout.endswith("equal\n"), ran.stderr[-3000:]


TABLES = r"""
import os, re
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
import jax, jax.numpy as jnp, numpy as np, optax
import metarec_jax as mr
from metarec_jax import core

USERS, EXAMPLES, ROWS, WIDTH = 32, 6, 80_000, 16
rng = np.random.default_rng(0)

def examples():
    ids, y = rng.integers(0, ROWS, (USERS, EXAMPLES)), rng.normal(size=(USERS, EXAMPLES))
    return mr.Examples({"item_id": ids.astype("i")}, y.astype("f"), np.ones((USERS, EXAMPLES), "f"))

def apply(params, features):
    return jnp.tanh(params["table"][features["item_id"]]) @ params["w"]

def loss(params, task, key):
    adapted = core.adapt(apply, params, task.support, steps=1)
    scores = core.predict(apply, params, adapted, task.query.features)
    return core.query_loss(scores, task.query, optax.losses.squared_error), {}

init, step = core.sparse.meta_step(loss, optax.adam(0.01), optax.adagrad(0.1), {"item_id": "table"})
params = {"table": rng.normal(size=(ROWS, WIDTH)).astype("f"), "w": rng.normal(size=WIDTH).astype("f")}
task, state = mr.Task(examples(), examples()), init(jax.tree.map(jnp.array, params))
one = jax.jit(step)(params, state, task, None)

layout = core.Layout(jax.make_mesh((2, 4), ("users", "rows")), rows="rows")
params = {"table": layout.split(params["table"]), "w": layout.place(params["w"])}
state = core.sparse.State(layout.place(state.rest), layout.split(state.tables))
given = params, state, layout.batch(task), None
kept = jax.tree.map(lambda x: x.sharding, given[:2])
compiled = jax.jit(step, out_shardings=(*kept, None)).lower(*given).compile()
sent = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", compiled.as_text())
sizes = [size.split(",") for line in sent for size in re.findall(r"\[([\d,]+)\]", line)]
numbers = [int(np.prod([int(n) for n in size])) for size in sizes]
ids = 2 * USERS * EXAMPLES
assert 0 < max(numbers) <= (ids + 2) * WIDTH, max(numbers)  # rows of the batch, no table
whole = sum(x.nbytes for x in jax.tree.leaves(one[:2]))
assert compiled.memory_analysis().argument_size_in_bytes < whole / 4 + 20_000
assert compiled.memory_analysis().temp_size_in_bytes < whole / 20
for a, b in zip(jax.tree.leaves(layout.gather(compiled(*given))), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
print("equal")
"""


def test_tables_sharded_by_rows_are_stepped_as_on_one_device():
    ran = subprocess.run([sys.executable, "-c", TABLES], capture_output=True, text=True, timeout=300, check=False)
    assert ran.stdout.endswith("equal\n"), ran.stderr[-3000:]
