"""Step time against the rows of an embedding table: row-sparse updates and dense ones.

Run `python benchmarks/embeddings.py`; `--help` lists the options. The ids of a step are `distinct` rows, each used
equally often and spread over the whole table: the same work whatever the table. Each step has ids of its own, so that
no row is in a cache because the step before used it, and the tables take turns, so that a device that slows down slows
them all. The learner is as light as one can be (a user is the mean of what the support examples rate), so that nearly
all of a step is the table's; `--learner ridge` measures the default strategy. On a CPU the ratio shows what random rows
cost once the table fits in no cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import metarec_jax as mr
from metarec_jax.core import sparse
from metarec_jax.types import Examples, Task

SUPPORT, QUERY, WIDTH, WARM_UP = 40, 20, 32, 3
DENSE = {"optax.adagrad": (optax.adagrad(0.01), 1), "optax.adam": (optax.adam(0.001), 2)}  # and copies kept as state
SPARSE = {
    "sparse, optax.sgd": optax.sgd(0.01),
    "sparse, optax.adagrad": optax.adagrad(0.01),
    "sparse, rowwise_adagrad": sparse.rowwise_adagrad(0.01),
    "sparse, optax.adam": optax.adam(0.001),
}


def look_up(params: Any, ids: jax.Array) -> jax.Array:
    return params["item"].at[ids].get(mode="clip")


def strategy(rows: int) -> mr.Strategy:
    """The default strategy on a table of items with a linear head."""

    def init(key: jax.Array) -> Any:
        return {"item": jnp.full((rows, WIDTH), 0.1), "head": jnp.ones(WIDTH)}

    return mr.ridge(mr.Model(init, lambda params, ids: look_up(params, ids) @ params["head"], look_up))


def mean_loss(params: Any, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    support, query = (look_up(params["model"], part.features) for part in task)
    taste = jnp.einsum("unf,un->uf", support, task.support.target) * params["model"]["head"]
    scores = jnp.einsum("unf,uf->un", query, taste)
    return jnp.mean(optax.losses.squared_error(scores, task.query.target)), {}


def draw(rng: np.random.Generator, users: int, rows: int, distinct: int) -> Task:
    """A batch of `users * (SUPPORT + QUERY)` ids of `distinct` rows."""
    chosen = rng.choice(rows, distinct, replace=False, shuffle=False)
    ids = rng.permutation(np.resize(chosen, users * (SUPPORT + QUERY))).reshape(users, -1).astype(np.int32)
    target = rng.standard_normal(ids.shape, dtype=np.float32)
    parts = (np.split(a, [SUPPORT], axis=1) for a in (ids, target))
    return Task(*(Examples(i, t, np.ones_like(t)) for i, t in zip(*parts, strict=True)))


def clock(build: Callable[[Any], Any], table_rows: list[int], args: argparse.Namespace) -> dict[int, list[float]]:
    """Milliseconds of `args.repeats` steps by the rows of the table; parameters and state donated.

    Args:
      build: `build(loss) -> (init, step)`.
      table_rows: tables to measure, in turns.
    """
    rng, key, runs = np.random.default_rng(0), jax.random.key(0), {}
    for rows in table_rows:
        learner = strategy(rows)
        init, step = build(mean_loss if args.learner == "mean" else learner.loss)
        params = jax.jit(learner.init)(key)
        runs[rows] = (jax.jit(step, donate_argnums=(0, 1)), params, jax.jit(init)(params))
    del params
    milliseconds: dict[int, list[float]] = {rows: [] for rows in table_rows}
    for _ in range(WARM_UP + args.repeats):
        for rows, (step, params, state) in runs.items():
            task = jax.block_until_ready(jax.device_put(draw(rng, args.users, rows, args.distinct)))
            start = time.perf_counter()
            params, state, _ = jax.block_until_ready(step(params, state, task, key))
            milliseconds[rows].append(1e3 * (time.perf_counter() - start))
            runs[rows] = (step, params, state)
    return {rows: times[WARM_UP:] for rows, times in milliseconds.items()}


def cells(measured: dict[int, list[float]], table_rows: list[int]) -> list[str]:
    """Median and spread for each table, and the largest table's median over the smallest's."""
    median = {rows: statistics.median(times) for rows, times in measured.items()}
    text = [
        f"{median[r]:.2f} ({min(measured[r]):.2f} to {max(measured[r]):.2f})" if r in measured else "skipped: memory"
        for r in table_rows
    ]
    first, last = table_rows[0], table_rows[-1]
    return [*text, f"{median[last] / median[first]:.2f}" if first in median and last in median else ""]


def memory() -> float:
    """Bytes that a dense step may use: what the device has, or 4 GB where it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 4e9)


def arguments() -> argparse.Namespace:
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6, 10**7], help="of the tables")
    parser.add_argument("--users", type=int, default=200 if cpu else 2048, help=f"with {SUPPORT + QUERY} ids each")
    parser.add_argument("--distinct", type=int, default=8000, help="distinct rows that a step uses")
    parser.add_argument("--learner", choices=["ridge", "mean"], default="mean", help="what the table is part of")
    parser.add_argument("--repeats", type=int, default=20 if cpu else 50)
    parser.add_argument("--memory", type=float, default=memory() / 1e9, help="GB that dense steps may use")
    args = parser.parse_args()
    args.rows.sort()
    if not 1 <= args.distinct <= args.rows[0]:
        parser.error(f"--distinct must be between 1 and the fewest --rows, got {args.distinct}")
    return args


def main() -> None:
    args, console, device = arguments(), Console(width=180), jax.devices()[0]
    console.print(
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}, learner {args.learner}. "
        f"{args.users * (SUPPORT + QUERY):,} ids a step, {args.distinct:,} distinct; tables {WIDTH} wide, float32; "
        f"ms a step, median (spread) of {args.repeats}. Dense steps within {args.memory:.1f} GB."
    )
    table = Table("system", *(f"{rows:,} rows" for rows in args.rows), "last / first", box=box.MARKDOWN)
    for name, (optimizer, copies) in DENSE.items():
        gigabytes = (2 + copies) * WIDTH * 4 / 1e9  # a row of the table, its gradient and state
        fit = [rows for rows in args.rows if gigabytes * sum(r for r in args.rows if r <= rows) <= args.memory]
        measured = clock(lambda loss, o=optimizer: (o.init, mr.meta_step(loss, o)), fit, args) if fit else {}
        table.add_row(name, *cells(measured, args.rows))
    for name, optimizer in SPARSE.items():
        build = lambda loss, o=optimizer: sparse.meta_step(loss, optax.adam(0.001), o, {"": "model/item"})  # noqa: E731
        table.add_row(name, *cells(clock(build, args.rows, args), args.rows))
    console.print(table)


if __name__ == "__main__":
    main()
