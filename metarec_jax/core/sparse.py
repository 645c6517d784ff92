"""Row-sparse embeddings: a meta-step whose cost follows the batch, never the rows of its tables.

A batch touches few rows of an item table. Before anything is differentiated those rows are gathered into a small table
and the batch's ids become positions in it, so that any loss runs on it unchanged and its gradient is that of the rows,
repeated ids summed. Each row has an optimiser of its own, which steps only when a batch touches the row; new rows and
new states are scattered into the old buffers. Sorting, gathering and scattering all have the size of the batch.
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
      rest: state of the optimiser of all parameters that are no tables.
      tables: by path of the table, the row optimiser's state, every array of it `[rows, ...]`.
    """

    rest: Any
    tables: dict[str, Any]


class MetaStep(NamedTuple):
    """A pair of pure functions: jit both, and donate the first two arguments of `step`, or all tables are copied.

    Attributes:
      init: `init(params) -> State`.
      step: `step(params, state, task, key) -> (params, state, aux)`.
    """

    init: Callable[[Params], State]
    step: Callable[[Params, State, Task, jax.Array], tuple[Params, State, dict[str, jax.Array]]]


class _Rows(NamedTuple):
    """The rows of a table that a batch uses, `[n]`: row 0, the others in order, then as many as it takes of no row."""

    read: jax.Array
    write: jax.Array  # beyond the table where nothing is to be written


def meta_step(
    loss: Loss, optimizer: optax.GradientTransformation, row_optimizer: optax.GradientTransformation, tables: Tables
) -> MetaStep:
    """`core.meta_step` with row-sparse tables.

    Every row runs `row_optimizer` alone, as if it were a parameter of its own, in the steps that touch it: those where
    its id occurs in the features, under the mask too. In other steps neither the row nor its state changes. Hence

    - `optax.sgd` and `optax.adagrad` equal the dense update, to which an untouched row's zero gradient means nothing;
    - `optax.adam` is lazy: a row's moments decay, and its bias correction counts, by the row's own steps, where dense
      Adam keeps moving rows that were touched before. Both are equal when every step touches every row. Momentum,
      weight decay and schedules are lazy likewise;
    - `rowwise_adagrad` keeps one number a row;
    - transformations see one row of one table: `optax.clip_by_global_norm` clips each row's norm.

    The loss sees tables of at most (ids in the batch) + 2 rows. It may read them only through the features named, and
    ids only as row numbers: their order stays, id 0 stays 0 (padding of multi-valued fields), negative ids become -1,
    and ids beyond the table stay beyond it. The latter two, which are no rows, train nothing. A penalty on a whole
    table belongs in `row_optimizer`.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, the loss of a strategy.
      optimizer: any optax transformation, for the parameters that are no tables.
      row_optimizer: any optax transformation, for one row.
      tables: for a feature, or a tuple of features that share tables, the tables that its ids index: a path or several,
        of a leaf or of a subtree of tables, in the parameters; names joined by "/". Each leaf is `[rows, ...]`, with
        equal rows for the tables of one feature; features are integer arrays of any shape, in support and query.
        With `models.linear`: `{"item_id": ["model/embedding/item_id", "model/embedding_bias/item_id"]}`.

    Returns:
      `init` and `step`; `aux` is the loss's own with `loss` added, a scalar.

    Raises:
      ValueError: when `init` or `step` is traced: a path or feature that does not exist or occurs twice, a feature that
        is no integer array, tables of one feature with different numbers of rows.

    References:
      Kingma and Ba, Adam, ICLR 2015, algorithm 1, here for each row. Lazy Adam is known from TensorFlow Addons
      (`LazyAdam`) and PyTorch (`SparseAdam`), whose bias correction counts all steps instead.
    """
    groups = {(features,) if isinstance(features, str) else features: paths for features, paths in tables.items()}
    named = [name for features in groups for name in features]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"tables: feature {twice[0]!r} occurs twice; features that share a table go in one tuple")

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
        # The barrier keeps every read before every write: a read fused into its later uses could cost a copy.
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
    """Adagrad with one accumulator for a whole row: the state of a table is `[rows]` instead of `[rows, width]`.

        a <- a + mean(g^2);   row <- row - learning_rate * g / sqrt(a + eps)

    A `row_optimizer`; on a parameter that is no row it would keep one accumulator for each whole array.

    Args:
      learning_rate: step size, or a schedule of it.
      initial_accumulator_value: where `a` starts, 0 or more.
      eps: keeps the root from 0, as in `optax.adagrad`.

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


# --- rows: what a batch uses of a table


def _compact(task: Task, features: tuple[str, ...], rows: int) -> tuple[Task, _Rows]:
    """The task with positions for the ids of `features`, and the rows at those positions; the last is always no row."""
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
    leaf = _leaves(features).get(name)
    if leaf is None:
        raise ValueError(f"tables: the task has no feature {name!r}; it has {sorted(_leaves(features))}")
    ids = jnp.asarray(leaf)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"tables: feature {name!r} must be an integer array, got {ids.dtype}")
    return ids.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(ids.dtype, jnp.int32)))


def _read(tree: Any, rows: jax.Array) -> Any:
    """`[n, ...]` of every `[rows, ...]`; zeros for no row."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="fill", fill_value=0), tree)


def _write(tree: Any, new: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda a, b: a.at[rows].set(b, mode="drop", unique_indices=True), tree, new)


def _advance(
    row_optimizer: optax.GradientTransformation, gradient: jax.Array, state: Any, table: jax.Array
) -> tuple[jax.Array, Any]:
    """One step of each row's optimiser: the new rows `[n, ...]` and their states."""
    updates, state = jax.vmap(row_optimizer.update)(gradient, state, table)
    return optax.apply_updates(table, updates), state


# --- paths: where tables and ids are in their pytrees


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(tree: Any) -> dict[str, jax.Array]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _replace(tree: Any, new: Mapping[str, Any]) -> Any:
    """`tree` with other values at the paths of `new`."""
    return jax.tree.map_with_path(
        lambda path, leaf: new.get(_name(path), leaf), tree, is_leaf=lambda leaf: leaf is None
    )


def _table_leaves(
    params: Params, groups: Mapping[tuple[str, ...], str | Sequence[str]]
) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    """For the features of each group, its tables by path."""
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    leaves, found = _leaves(params), {}
    seen: set[str] = set()
    for features, paths in groups.items():
        tables: dict[str, jax.Array] = {}
        for path in [paths] if isinstance(paths, str) else paths:
            here = [name for name in names if name == path or name.startswith(f"{path}/")]
            if not here:
                raise ValueError(f"tables: the parameters have nothing at {path!r}; their leaves are {names}")
            if twice := [name for name in here if name in seen or here.count(name) > 1]:
                raise ValueError(f"tables: {twice[0]!r} occurs twice; features that share a table go in one tuple")
            seen.update(here)
            tables |= {name: leaves[name] for name in here}
        rows = {name: table.shape[0] if table.ndim else 0 for name, table in tables.items()}
        if len(set(rows.values())) != 1 or 0 in rows.values():
            raise ValueError(f"tables: those of {features} need one number of rows, 1 or more, got {rows}")
        found[features] = tables
    return found
