"""Cold items warming up: strategies and the plain baselines on new items with no, few and more labelled interactions.

    python benchmarks/cold_items.py                     # five splits of MovieLens-100K, clicks
    python benchmarks/cold_items.py --splits 10 --batch 10 --strategies metaemb ridge

The protocol of Pan et al. (SIGIR 2019, section 5): an item never seen in training is judged cold, from its attributes
alone, and after one, two and three batches of labelled interactions (warm-a, warm-b, warm-c), always on the same query.
The batches are nested. One model a strategy and split serves all phases: in training each item's support set is cut to
the size of a random phase. Prints Markdown tables: means over splits, and the paired difference to the baseline that is
best in that phase, with a 95 % interval (Student's t over splits).
"""

import argparse
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from quality import LESS_IS_BETTER, paired

import metarec_jax as mr
from metarec_jax.strategies import Strategy
from metarec_jax.types import Task

PHASES = ("cold", "warm-a", "warm-b", "warm-c")
METRICS = ("auc", "log_loss")
IN_PHASES = "in phases: "
GENERATED = ("metaemb", "gme", "mwuf", "ridge")


def in_phases(strategy: Strategy, batch: int) -> Strategy:
    """`strategy`, trained on support sets cut to the size of a random phase, each task's its own."""

    def loss(params: Any, task: Task, key: jax.Array) -> Any:
        tasks, places = task.support.mask.shape
        of_task = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(tasks))
        size = batch * jax.vmap(lambda k: jax.random.randint(k, (), 0, len(PHASES)))(of_task)
        mask = jnp.where(jnp.arange(places) < size[:, None], task.support.mask, 0.0)
        return strategy.loss(params, task._replace(support=task.support._replace(mask=mask)), key)

    return strategy._replace(loss=loss)


def maker(name: str, batch: int, existing: Mapping[str, np.ndarray]) -> Callable[..., Strategy]:
    """The strategy of this name for `mr.train`; `gme` gets the attributes of existing items, which are its graph."""
    options = {"existing": existing} if name == "gme" else {}
    return lambda model, **given: in_phases(mr.STRATEGIES[name](model, **options, **given), batch)


def run(strategies: Sequence[str], splits: range, data: mr.data.Dataset, batch: int, query: int, epochs: int) -> None:
    """Train and judge everything, print the tables."""
    data, largest = mr.data.by_item(data), batch * (len(PHASES) - 1)
    protocol = mr.ColdUsers(minimum=query + largest, maximum=len(data.items), query=query, fractions=(0.7, 0.1, 0.2))
    values: dict[str, list[list[list[float]]]] = {}  # learner -> [splits, phases, metrics]
    # items outside the window are never cold items, in no split: the graph stays, and a strategy compiles once
    outside = np.flatnonzero(np.bincount(data.user, minlength=len(data.users)) < protocol.minimum)[1:]
    existing = {f"user/{name}": table[outside] for name, table in data.user_features.items()}
    for name in strategies:  # under a name, by which all splits share what is compiled
        mr.STRATEGIES[IN_PHASES + name] = maker(name, batch, existing)
    for seed in splits:
        for name in strategies:
            start = time.perf_counter()
            recommender = mr.train(
                data,
                IN_PHASES + name,
                mr.strategies.DEFAULT_MODEL.get(name, "mlp"),
                seed=seed,
                protocol=protocol,
                progress=False,
                buckets=(largest,),
                epochs=epochs,
            )
            phases: list[dict[str, dict[str, float]]] = [
                recommender.evaluate(support=n * batch, baselines=name == strategies[0]) for n in range(len(PHASES))
            ]
            for learner in phases[0]:
                rows = [[phase[learner][m] for m in METRICS] for phase in phases]
                values.setdefault(learner.removeprefix(IN_PHASES), []).append(rows)
            aucs = ", ".join(f"{rows[0]:.4f}" for rows in values[name][-1])
            print(f"split {seed} {name}: {aucs}, {time.perf_counter() - start:.0f} s", flush=True)
    table = {learner: np.array(rows) for learner, rows in values.items()}
    baselines = [b for b in mr.evaluation.BASELINES if b in table]
    print(f"\n{data.name}, clicks, {protocol}, batches of {batch}, splits {splits[0]} to {splits[-1]}")
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for m, metric in enumerate(METRICS):
        sign = -1 if metric in LESS_IS_BETTER else 1
        print(f"\n| {metric} | " + " | ".join(PHASES) + " |\n|" + "---|" * (len(PHASES) + 1))
        for learner, rows in table.items():
            cells = []
            for p in range(len(PHASES)):
                best = max(baselines, key=lambda b, m=m, p=p, sign=sign: sign * table[b][:, p, m].mean())
                mean, half = paired(rows[:, p, m], table[best][:, p, m])
                beside = "" if learner in baselines else f" ({mean:+.4f} ± {half:.4f})"
                cells.append(f"{rows[:, p, m].mean():.4f}{beside}")
            print(f"| {learner} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--splits", type=int, default=5, help="how many, 2 or more")
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--batch", type=int, default=5, help="labelled interactions that a phase adds")
    parser.add_argument("--query", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--strategies", nargs="+", default=list(GENERATED), choices=list(mr.STRATEGIES))
    given = parser.parse_args()
    if given.splits < 2 or given.first < 0 or given.batch < 1:
        parser.error("--splits must be 2 or more, which an interval needs, --first 0 or more, --batch 1 or more")
    splits = range(given.first, given.first + given.splits)
    run(given.strategies, splits, mr.data.load(given.data), given.batch, given.query, given.epochs)
