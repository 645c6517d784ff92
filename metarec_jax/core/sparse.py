"""Row-sparse embeddings: a meta-step whose cost depends on the batch size, not on the number of table rows.

A batch touches few rows of an item table. These rows are gathered into a compact table and the batch's ids are mapped
to positions in it. Any loss runs on the compact table unchanged; its gradient sums over repeated ids. Each row has its
own optimiser state, updated only when a batch touches the row. New rows and states are scattered into the old buffers.
The sort, gather and scatter have the size of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core.outer import Loss
from metarec_jax.types import Features, Params, Task

Tables = Mapping[str | tuple[str, ...], str | Sequence[str]]


class State(NamedTuple):
    """State of a row-sparse meta-step.

    Attributes:
      rest: optimiser state of the parameters that are not tables.
      tables: table path -> state of the row optimiser, with arrays `[rows, ...]`.
    """

    rest: Any
    tables: dict[str, Any]


class MetaStep(NamedTuple):
    """A row-sparse meta-step as two pure functions.

    Jit both. Donate the first two arguments of `step`; otherwise all tables are copied.

    Attributes:
      init: `init(params) -> State`.
      step: `step(params, state, task, key) -> (params, state, aux)`.
    """

    init: Callable[[Params], State]
    step: Callable[[Params, State, Task, jax.Array], tuple[Params, State, dict[str, jax.Array]]]


class _Rows(NamedTuple):
    """Row numbers `[n]` of the compact table: row 0, the batch's other rows in order, then padding beyond the table."""

    read: jax.Array
    write: jax.Array  # beyond the table where nothing must be written


def meta_step(
    loss: Loss, optimizer: optax.GradientTransformation, row_optimizer: optax.GradientTransformation, tables: Tables
) -> MetaStep:
    """Build a meta-step with row-sparse embedding tables; otherwise as `core.meta_step`.

    Each row is a separate parameter of `row_optimizer`. A step updates a row and its state only if the row's id occurs
    in the features, including padded examples. Hence:

    - `optax.sgd` and `optax.adagrad` equal the dense update, which leaves a row with zero gradient unchanged.
    - `optax.adam` is lazy: a row's moments decay, and its bias correction counts, only in steps that touch the row.
      Dense Adam keeps moving rows that were touched before. Both are equal if every step touches every row. Momentum,
      weight decay and schedules are lazy too.
    - `rowwise_adagrad` keeps one number per row.
    - Transformations see one row of one table: `optax.clip_by_global_norm` clips each row's norm.

    The loss sees tables of at most (ids in the batch) + 2 rows. It must read them only through the named features and
    use ids only as row numbers. Ids keep their order and id 0 stays 0 (padding of multi-valued fields). Negative ids
    become -1 and ids beyond the table stay beyond it; neither trains any row. Put a penalty on a whole table into
    `row_optimizer`.

    Tables and their states may be sharded by rows over devices (`core.Layout.split`), users over others. Devices then
    exchange ids and rows of the batch, never a table.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, the loss of a strategy.
      optimizer: any optax transformation, for the parameters that are not tables.
      row_optimizer: any optax transformation, for one row.
      tables: maps a feature, or a tuple of features that share tables, to the parameter path or paths of the tables
        that its ids index. A path joins names by "/" and may end at a subtree. Each leaf is `[rows, ...]`, with equal
        rows for all tables of one feature. Features are integer arrays of any shape, in support and query. With
        `models.linear`: `{"item_id": ["model/embedding/item_id", "model/embedding_bias/item_id"]}`.

    Returns:
      `MetaStep`; its `aux` is that of the loss, with the scalar "loss" added.

    Raises:
      ValueError: a feature occurs twice. When `init` or `step` is traced: a path or feature is missing, a path occurs
        twice, a feature is not an integer array, or tables of one feature differ in rows.

    Example:
      A table of 1,000 rows and a batch that reads row 7: the other rows are never touched.

      >>> import optax
      >>> def loss(params, task, key):
      ...     return ((params["table"][task.query.features["item_id"]] - task.query.target) ** 2).mean(), {}
      >>> init, step = mr.core.sparse.meta_step(loss, optax.sgd(0.1), optax.sgd(0.1), {"item_id": "table"})
      >>> examples = mr.Examples({"item_id": jnp.array([[7]])}, jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> params = {"table": jnp.zeros(1000)}
      >>> params, _, _ = jax.jit(step)(params, init(params), mr.Task(examples, examples), jax.random.key(0))
      >>> round(float(params["table"][7]), 3), int((params["table"] != 0).sum())
      (0.4, 1)

    References:
      Kingma and Ba, Adam, ICLR 2015, algorithm 1, here for each row. Lazy Adam is known from TensorFlow Addons
      (`LazyAdam`) and PyTorch (`SparseAdam`), whose bias correction counts all steps instead.
    """
    groups = {(features,) if isinstance(features, str) else features: paths for features, paths in tables.items()}
    named = [name for features in groups for name in features]
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"tables: feature {repeated[0]!r} occurs twice; features that share a table go in one tuple")

    def init(params: Params) -> State:
        leaves = _table_leaves(params, groups)
        rows = {path: leaf for group in leaves.values() for path, leaf in group.items()}
        return State(
            optimizer.init(_replace(params, dict.fromkeys(rows))),
            {path: jax.vmap(row_optimizer.init)(table) for path, table in rows.items()},
        )

    def step(params: Params, state: State, task: Task, key: jax.Array) -> tuple[Params, State, dict[str, jax.Array]]:
        old: dict[str, tuple[jax.Array, Any]] = {}
        at: dict[str, _Rows] = {}
        for features, leaves in _table_leaves(params, groups).items():
            task, rows = _compact(task, features, len(next(iter(leaves.values()))))
            old |= {path: (table, state.tables[path]) for path, table in leaves.items()}
            at |= dict.fromkeys(leaves, rows)
        # The barrier orders all reads before all writes: a read fused into a later use could force a copy of the table.
        read = jax.lax.optimization_barrier({path: _read(old[path], at[path].read) for path in old})
        small = _replace(params, {path: table for path, (table, _) in read.items()})

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(small, task, key)
        by_path = _leaves(gradient)
        new = {
            path: _advance(row_optimizer, by_path[path], row_state, table) for path, (table, row_state) in read.items()
        }
        rest, gradient = (_replace(tree, dict.fromkeys(old)) for tree in (params, gradient))
        updates, rest_state = optimizer.update(gradient, state.rest, rest)
        rest = optax.apply_updates(rest, updates)

        written = {path: _write(old[path], new[path], at[path].write) for path in old}
        params = _replace(rest, {path: table for path, (table, _) in written.items()})
        row_states = {path: row_state for path, (_, row_state) in written.items()}
        return params, State(rest_state, row_states), {**aux, "loss": value}

    return MetaStep(init, step)


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule, initial_accumulator_value: float = 0.1, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Build Adagrad with one accumulator per row: a table's state is `[rows]` instead of `[rows, width]`.

        a <- a + mean(g^2);   row <- row - learning_rate * g / sqrt(a + eps)

    For use as a `row_optimizer`. On any other parameter it keeps one accumulator for the whole array.

    Args:
      learning_rate: step size, or a schedule of it.
      initial_accumulator_value: initial value of `a`, 0 or more.
      eps: added under the root for numerical stability, as in `optax.adagrad`.

    Example:
      The mean square of the gradient (1, 7) is 25, so the step is (1, 7) / 5 with a learning rate of 1:

      >>> optimizer = mr.core.sparse.rowwise_adagrad(1.0, initial_accumulator_value=0.0)
      >>> updates, state = optimizer.update(jnp.array([1.0, 7.0]), optimizer.init(jnp.zeros(2)))
      >>> np.asarray(updates).round(3)
      array([-0.2, -1.4], dtype=float32)

    References:
      Gupta, Bengio and Weston, Training Highly Multiclass Classifiers, JMLR 15, 2014; for embeddings Lerer et al.,
      PyTorch-BigGraph, SysML 2019.
    """

    def init(params: Params) -> Params:
        return jax.tree.map(lambda row: jnp.full((), initial_accumulator_value, row.dtype), params)

    def update(gradient: Params, sums: Params, params: Params = None) -> tuple[Params, Params]:
        sums = jax.tree.map(lambda a, g: a + jnp.mean(jnp.square(g)), sums, gradient)
        scale = jax.tree.map(lambda a: jnp.where(a > 0, jax.lax.rsqrt(a + eps), 0.0), sums)
        return jax.tree.map(jnp.multiply, scale, gradient), sums

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


# --- rows: the compact tables of a batch


def _compact(task: Task, features: tuple[str, ...], rows: int) -> tuple[Task, _Rows]:
    """Replace the ids of `features` by positions in a compact table; return the task and the rows at the positions.

    The last position is never a row of the table.
    """
    ids = [_ids(part.features, name) for part in task for name in features]
    flat = jnp.concatenate([x.ravel() for x in ids])
    known = (flat >= 0) & (flat < rows)
    size = min(flat.size + 1, rows) + 1
    read, position = jnp.unique(
        jnp.append(0, jnp.where(known, flat, rows)), return_inverse=True, size=size, fill_value=rows
    )
    place = jnp.arange(size)
    used = (read < rows) & ((place > 0) | jnp.any(flat == 0))
    flat = jnp.where(known, position[1:], jnp.where(flat < 0, -1, size))
    ends = [sum(x.size for x in ids[: i + 1]) for i in range(len(ids) - 1)]
    compact = iter(x.reshape(old.shape) for x, old in zip(jnp.split(flat, ends), ids, strict=True))
    parts = [part._replace(features=_replace(part.features, {n: next(compact) for n in features})) for part in task]
    return Task(*parts), _Rows(read, jnp.where(used, read, rows + place))


def _ids(features: Features, name: str) -> jax.Array:
    """Return a feature's ids, validated, as integers of at least 32 bits."""
    leaf = _leaves(features).get(name)
    if leaf is None:
        raise ValueError(f"tables: the task has no feature {name!r}; choose from {sorted(_leaves(features))}")
    ids = jnp.asarray(leaf)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"tables: feature {name!r} must be an integer array, got {ids.dtype}")
    return ids.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(ids.dtype, jnp.int32)))


def _read(tree: Any, rows: jax.Array) -> Any:
    """Gather `[n, ...]` from every array `[rows, ...]`; zeros for rows beyond the table."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="fill", fill_value=0), tree)


def _write(tree: Any, new: Any, rows: jax.Array) -> Any:
    """Scatter `new` `[n, ...]` into every array `[rows, ...]`; rows beyond the table are dropped."""
    return jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop", unique_indices=True), tree, new)


def _advance(
    row_optimizer: optax.GradientTransformation, gradient: jax.Array, state: Any, table: jax.Array
) -> tuple[jax.Array, Any]:
    """Step each row's optimiser; return the new rows `[n, ...]` and their states."""
    updates, state = jax.vmap(row_optimizer.update)(gradient, state, table)
    return optax.apply_updates(table, updates), state


# --- paths of tables and features in their pytrees


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> dict[str, jax.Array]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """Replace the values of `tree` at the paths of `new`."""
    return jax.tree.map_with_path(
        lambda path, leaf: new.get(_name(path), leaf), tree, is_leaf=lambda leaf: leaf is None
    )


def _table_leaves(
    params: Params, groups: Mapping[tuple[str, ...], str | Sequence[str]]
) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """Return the tables of each feature group, by path."""
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves, tables_of = _leaves(params), {}
    seen: set[str] = set()
    for features, paths in groups.items():
        tables: dict[str, jax.Array] = {}
        for path in [paths] if isinstance(paths, str) else paths:
            matches = [name for name in names if name == path or name.startswith(f"{path}/")]
            if not matches:
                raise ValueError(f"tables: the parameters have nothing at {path!r}; their leaves are {names}")
            if repeated := [name for name in matches if name in seen or matches.count(name) > 1]:
                raise ValueError(f"tables: {repeated[0]!r} occurs twice; features that share a table go in one tuple")
            seen.update(matches)
            tables |= {name: leaves[name] for name in matches}
        rows = {name: table.shape[0] if table.ndim else 0 for name, table in tables.items()}
        if len(set(rows.values())) != 1 or 0 in rows.values():
            raise ValueError(f"tables: all tables of {features} need one number of rows, 1 or more, got {rows}")
        tables_of[features] = tables
    return tables_of
