"""Quality for cold users: every strategy and the plain baselines on the same tasks of several random splits.

    python benchmarks/quality.py                        # ten splits, clicks, all strategies
    python benchmarks/quality.py --splits 40 --strategies ridge
    python benchmarks/quality.py --target rating

Prints a Markdown table: means over splits, and each strategy's paired difference to the baseline that is best in that
metric with a 95 % interval (Student's t over splits), and what a strategy costs.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

import metarec_jax as mr

SHOWN = {
    "click": ("auc", "within_user_auc", "precision@5", "ndcg@5", "mrr@5", "log_loss"),
    "rating": ("rmse", "mae", "ndcg@5"),
}
PAIRED = {"click": ("auc", "within_user_auc"), "rating": ("rmse",)}
LESS_IS_BETTER = ("rmse", "mae", "log_loss")


def adapted_values(recommender: mr.Recommender) -> int:
    """Numbers that one adapted user consists of."""
    shapes = jax.eval_shape(
        lambda: recommender.strategy.adapt(
            recommender.params,
            mr.Examples(
                mr.data.features(recommender.catalogue, np.zeros(1, int), np.zeros((1, 8), int)),
                np.zeros((1, 8), np.float32),
                np.ones((1, 8), np.float32),
            ),
            jax.random.key(0),
        )
    )
    return sum(int(np.prod(x.shape[1:])) for x in jax.tree.leaves(shapes))


def paired(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean difference and half-width of its 95 % interval over splits."""
    difference = mine - theirs
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half)


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make` that returns its first result ever after: one strategy value for all splits compiles once."""
    made: list[Any] = []

    def first(*args: Any, **options: Any) -> Any:
        if not made:
            made.append(make(*args, **options))
        return made[0]

    return first


def run(
    strategies: Sequence[str], target: str, splits: range, data: mr.data.Dataset, train_on: str, epochs: int
) -> None:
    """Train and judge everything, print the table."""
    protocol = mr.ColdUsers(target=target, train_on=train_on)
    values: dict[str, list[list[float]]] = {}
    costs: dict[str, list[tuple[float, float, int]]] = {}
    makers = {name: once(mr.STRATEGIES[name]) for name in strategies}
    for seed in splits:
        for name in strategies:
            start = time.perf_counter()
            recommender = mr.train(
                data,
                makers[name],
                mr.strategies.DEFAULT_MODEL.get(name),
                seed=seed,
                protocol=protocol,
                progress=False,
                buckets=BUCKETS,
                epochs=epochs,
            )
            seconds = time.perf_counter() - start
            results = recommender.evaluate(baselines=name == strategies[0])
            results = {name if learner == "strategy" else learner: row for learner, row in results.items()}
            for learner, row in results.items():
                values.setdefault(learner, []).append([row[m] for m in SHOWN[target]])
            users = sum(len(part) for part in protocol.split(data, seed)[:1]) * len(recommender.history)
            costs.setdefault(name, []).append((seconds, users / seconds, adapted_values(recommender)))
            print(
                f"split {seed} {name}: {results[name]['auc' if target == 'click' else 'rmse']:.4f}, {seconds:.0f} s",
                flush=True,
            )
    table = {learner: np.array(rows) for learner, rows in values.items()}
    baselines = [b for b in mr.evaluation.BASELINES if b in table]
    print(f"\n{data.name}, target {target}, {protocol}, splits {splits[0]} to {splits[-1]}")
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    header = ["learner", *SHOWN[target], *(f"{m} minus best baseline" for m in PAIRED[target])]
    header += ["training s, median", "users/s", "adapted values"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for learner, rows in table.items():
        cells = [f"{x:.4f}" for x in rows.mean(0)]
        for metric in PAIRED[target]:
            column, sign = SHOWN[target].index(metric), -1 if metric in LESS_IS_BETTER else 1
            best = max(baselines, key=lambda b: sign * table[b][:, column].mean())
            mean, half = paired(rows[:, column], table[best][:, column])
            cells.append("-" if learner in baselines else f"{mean:+.4f} ± {half:.4f} ({best})")
        cost = np.median(costs[learner], axis=0) if learner in costs else None
        cells += ["-"] * 3 if cost is None else [f"{cost[0]:.0f}", f"{cost[1]:.0f}", f"{cost[2]:.0f}"]
        print(f"| {learner} | " + " | ".join(cells) + " |")


BUCKETS = (40, 90)  # the same for every split, so that a strategy compiles once

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--splits", type=int, default=10, help="how many, 2 or more")
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--target", choices=["click", "rating"], default="click")
    parser.add_argument("--train-on", choices=["window", "all"], default="window")
    parser.add_argument(
        "--epochs", type=int, default=60, help="at most; training stops when validation does not improve"
    )
    parser.add_argument("--strategies", nargs="+", default=list(mr.STRATEGIES), choices=list(mr.STRATEGIES))
    given = parser.parse_args()
    if given.splits < 2 or given.first < 0:
        parser.error("--splits must be 2 or more, which an interval needs, and --first 0 or more")
    splits = range(given.first, given.first + given.splits)
    run(given.strategies, given.target, splits, mr.data.load(given.data), given.train_on, given.epochs)
