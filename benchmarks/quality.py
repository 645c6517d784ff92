"""The leaderboard: every strategy and the plain baselines on the same cold users of several random splits.

    python benchmarks/quality.py                        # ten splits, clicks, all strategies
    python benchmarks/quality.py --splits 40 --strategies ridge
    python benchmarks/quality.py --target rating --log quality.jsonl    # may be stopped and started again

Each strategy is trained once a split, with its default settings (or those of `--tuned`), and judged with 1, 3, 5, 10
and all support examples of each test user. Prints Markdown tables: means over splits, each strategy's paired difference
to the baseline that is best in that metric with a 95 % interval (Student's t over splits), and what a strategy costs.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

import metarec_jax as mr
from metarec_jax.evaluation.baselines import OF_RATINGS
from metarec_jax.training.loop import default_optimizer

SHOWN = {
    "click": ("auc", "within_user_auc", "precision@5", "ndcg@5", "mrr@5", "log_loss"),
    "rating": ("rmse", "mae", "ndcg@5"),
}
PAIRED = {"click": ("auc", "within_user_auc"), "rating": ("rmse",)}  # the last one is shown by support size too
LESS_IS_BETTER = ("rmse", "mae", "log_loss")
SUPPORT = (1, 3, 5, 10, None)  # None: all that a test user has
DEFAULT: dict[str, Any] = {"outer": {}, "own": {}}  # settings: of the outer optimiser, and the strategy's own
BUCKETS = (40, 90)  # the same for every split, so that a strategy compiles once


def adapted_values(recommender: mr.Recommender) -> int:
    """Numbers that one adapted user consists of, with eight support examples."""
    data = recommender.catalogue
    features = mr.tasks.features(data, np.zeros(1, int), np.zeros((1, 8), int)) | {"order": np.zeros((1, 8), np.int32)}
    support = mr.Examples(features, np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32))
    shapes = jax.eval_shape(lambda: recommender.strategy.adapt(recommender.params, support, jax.random.key(0)))
    return sum(int(np.prod(x.shape[1:])) for x in jax.tree.leaves(shapes))


def paired(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean difference and half-width of its 95 % interval over splits."""
    difference = mine - theirs
    half = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half)


def trainer(name: str, settings: dict[str, Any] | None = None) -> Callable[..., mr.Recommender]:
    """`mr.train` for one strategy with the settings that `tune.py` writes, else its default ones."""
    settings = settings or DEFAULT
    return partial(
        mr.train,
        strategy=name,
        strategy_options=settings["own"],
        optimizer=default_optimizer(**settings["outer"]),
        progress=False,
        buckets=BUCKETS,
    )


def judge(recommender: mr.Recommender, name: str | None) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by learner and support size; with the baselines and without the learner when `name` is None."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size in SUPPORT:
        results = recommender.evaluate(support=size, baselines=name is None)
        for learner in [name] if name else set(results) & set(mr.evaluation.BASELINES):
            found.setdefault(learner, {})[str(size)] = results[learner]
    return found


def run(
    strategies: Sequence[str],
    splits: range,
    data: mr.data.Dataset,
    protocol: mr.ColdUsers,
    epochs: int,
    log: Path | None,
    tuned: dict[str, Any],
    short: float | None,
) -> list[dict[str, Any]]:
    """Train and judge everything that the log does not hold yet; one row for each learner and split."""
    setting = {"data": data.name, "protocol": repr(protocol), "epochs": epochs, "short": short}

    def settings_of(learner: str) -> dict[str, Any]:
        return {key: tuned.get(learner, DEFAULT)[key] for key in DEFAULT}

    rows = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    rows = [
        row
        for row in rows
        if all(row.get(key) == value for key, value in setting.items())
        and row.get("settings", DEFAULT) == settings_of(row["learner"])
    ]
    done = {(row["learner"], row["seed"]) for row in rows}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    for name in strategies:
        settings = settings_of(name)
        train = trainer(name, settings)
        for seed in splits:
            if (name, seed) in done:
                continue
            start = time.perf_counter()
            recommender = train(data, seed=seed, protocol=protocol, epochs=epochs, short=short)
            seconds = time.perf_counter() - start
            users = len(protocol.split(data, seed).train) * len(recommender.history)
            cost = {"seconds": seconds, "users/s": users / seconds, "values": adapted_values(recommender)}
            found = judge(recommender, name)
            if ("two means", seed) not in done:
                found |= judge(recommender, None)
                done.add(("two means", seed))
            for learner, results in found.items():
                row = setting | {"learner": learner, "seed": seed, "results": results}
                keep(row | cost | {"settings": settings} if learner == name else row)
            shown = PAIRED[protocol.target][-1]
            print(f"{name}, split {seed}: {shown} {found[name]['None'][shown]:.4f}, {seconds:.0f} s", flush=True)
        jax.clear_caches()  # the next strategy shares no program; all of them would exhaust the memory maps
    return [row for row in rows if row["seed"] in splits]


def report(rows: list[dict[str, Any]], target: str) -> None:
    """The Markdown tables."""
    seeds = sorted({row["seed"] for row in rows})
    by = {(row["learner"], row["seed"]): row for row in rows}
    metric = PAIRED[target][-1]

    def values(learner: str, metric: str, size: int | None = None) -> np.ndarray:
        return np.array([by[learner, seed]["results"][str(size)][metric] for seed in seeds])

    complete = [n for n in dict.fromkeys(row["learner"] for row in rows) if all((n, s) in by for s in seeds)]
    complete.sort(key=lambda n: values(n, metric).mean(), reverse=metric not in LESS_IS_BETTER)  # the best first
    baselines = [b for b in mr.evaluation.BASELINES if b in complete]
    learners = [learner for learner in complete if learner not in baselines]

    def against(learner: str, metric: str, size: int | None = None, among: Sequence[str] = baselines) -> str:
        sign = -1 if metric in LESS_IS_BETTER else 1
        best = max(among, key=lambda b: sign * values(b, metric, size).mean())
        mean, half = paired(values(learner, metric, size), values(best, metric, size))
        return "-" if learner in baselines else f"{mean:+.4f} ± {half:.4f} ({best})"

    header = ["learner", *SHOWN[target], *(f"{m} minus best baseline" for m in PAIRED[target])]
    table(
        [*header, "training s, median", "users/s", "adapted values"],
        [
            [learner, *(f"{values(learner, m).mean():.4f}" for m in SHOWN[target])]
            + [against(learner, m) for m in PAIRED[target]]
            + [
                f"{np.median([by[learner, s][cost] for s in seeds]):.0f}" if learner not in baselines else "-"
                for cost in ("seconds", "users/s", "values")
            ]
            for learner in complete
        ],
    )
    print(f"\n{metric} minus the best baseline, by support examples:\n")
    table(
        ["learner", *("all" if size is None else str(size) for size in SUPPORT)],
        [[learner, *(against(learner, metric, size) for size in SUPPORT)] for learner in learners]
        + [[b, *(f"{values(b, metric, size).mean():.4f}" for size in SUPPORT)] for b in baselines],
    )
    of_ratings = [b for b in baselines if b.endswith(OF_RATINGS)]
    if not of_ratings:
        return
    print("\nThe same against the best baseline of clicks and the best of ratings:\n")
    of_clicks = [b for b in baselines if b not in of_ratings]
    table(
        ["learner", "metric", "against", *("all" if size is None else str(size) for size in SUPPORT)],
        [
            [learner, m, name, *(against(learner, m, size, among) for size in SUPPORT)]
            for learner in learners
            for m in PAIRED[target]
            for name, among in (("clicks", of_clicks), ("ratings", of_ratings))
        ],
    )


def table(header: list[str], rows: list[list[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--splits", type=int, default=10, help="how many, 2 or more")
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--target", choices=["click", "rating"], default="click")
    parser.add_argument("--train-on", choices=["window", "all"], default="window")
    parser.add_argument(
        "--epochs", type=int, default=60, help="at most; training stops when validation does not improve"
    )
    parser.add_argument("--short", type=float, help="share of short support sets in training (default: that of `fit`)")
    parser.add_argument("--strategies", nargs="+", default=list(mr.STRATEGIES), choices=list(mr.STRATEGIES))
    parser.add_argument("--tuned", type=Path, help="settings that tune.py wrote; without it the default ones")
    parser.add_argument(
        "--own", type=json.loads, default={}, help="options of all the strategies, as JSON, over the tuned ones"
    )
    parser.add_argument("--log", type=Path, help="JSON lines: results are kept here, and what is here is not run again")
    given = parser.parse_args()
    if given.splits < 2 or given.first < 0:
        parser.error("--splits must be 2 or more, which an interval needs, and --first 0 or more")
    if not isinstance(given.own, dict):
        parser.error(f"--own must be a JSON object of options, as in '{{\"count\": 5}}', got {given.own!r}")
    splits, data = range(given.first, given.first + given.splits), mr.data.load(given.data)
    protocol = mr.ColdUsers(target=given.target, train_on=given.train_on)
    tuned = json.loads(given.tuned.read_text()).get(given.target, {}) if given.tuned else {}
    for name in given.strategies if given.own else ():
        before = tuned.get(name, DEFAULT)
        tuned[name] = before | {"own": before["own"] | given.own}
    rows = run(given.strategies, splits, data, protocol, given.epochs, given.log, tuned, given.short)
    print(f"\n{data.name}, {protocol}, splits {splits[0]} to {splits[-1]}")
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    report(rows, given.target)


if __name__ == "__main__":
    main()
