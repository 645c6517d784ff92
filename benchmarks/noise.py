"""Noise: what random ratings in the support sets cost, and what learning to distrust them wins back.

    python benchmarks/noise.py                          # ten splits of ml-100k, 20 % of the support ratings
    python benchmarks/noise.py --noise 0.4 --splits 20 --log noise.jsonl    # may be stopped and started again

Of each test user's support ratings a share is replaced by random ones, any rating of the data as likely; the queries
stay as they are. The default learner is the reference, on clean support sets and on noisy ones (the mean of several
draws of the noise). Beside it: the same with `mr.reweight`, and one trained with noisy support sets from the start.
Prints a Markdown table with paired 95 % intervals over splits, and the share of the loss that is won back.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from quality import paired, table

import metarec_jax as mr
from metarec_jax.evaluation.baselines import score_baselines
from metarec_jax.metrics.scoring import score_tasks, summarise

SHOWN = ("auc", "within_user_auc", "ndcg@5", "log_loss")
BUCKETS = (40, 90)  # the same for every split, so that a strategy compiles once
BEFORE = "alpaca"  # the default
DRAWS = 5  # of the noise


def corrupted(histories: mr.tasks.Histories, share: float, query: int, seed: list[int]) -> mr.tasks.Histories:
    """The same users, a share of their interactions after the first `query` rated at random."""
    rng, data = np.random.default_rng(seed), histories.data
    levels, rating = np.unique(data.rating), data.rating.copy()
    for u in range(len(histories)):
        support = histories.index[histories.starts[u] : histories.starts[u + 1]][query:]
        hit = support[rng.random(len(support)) < share]
        rating[hit] = rng.choice(levels, len(hit))
    return replace(histories, data=replace(data, rating=rating))


def judge(recommender: mr.Recommender, test: mr.tasks.Histories) -> dict[str, float]:
    query, target = recommender.protocol.query, recommender.target
    width = -(-int(test.lengths.max()) // 32) * 32
    tasks = mr.tasks.batches(test, target, query=query, batch_size=len(test), buckets=(width,))
    return summarise(score_tasks(recommender.strategy, recommender.params, tasks, target), target.kind)


def run(data: mr.data.Dataset, protocol: mr.ColdUsers, seed: int, noise: float, epochs: int) -> dict[str, Any]:
    """`{learner: {"clean" or "noisy": metrics}}` of one split."""
    options: dict[str, Any] = {"seed": seed, "protocol": protocol, "buckets": BUCKETS, "epochs": epochs}
    plain = mr.train(data, progress=False, **options)
    systems = {
        BEFORE: plain,
        f"{BEFORE}, reweighted": mr.reweight(plain, noise=noise, buckets=1, batch_size=64, progress=False),
        f"{BEFORE}, trained with noise": mr.train(data, progress=False, noise=noise, **options),
    }
    split, query = plain.split(), protocol.query
    noisy = [corrupted(split.test, noise, query, [seed, draw]) for draw in range(DRAWS)]

    def judged(test: mr.tasks.Histories) -> dict[str, dict[str, float]]:
        baselines = score_baselines(split.train, test, plain.target, query=query)
        own = {name: judge(recommender, test) for name, recommender in systems.items()}
        return own | {name: summarise(scores, plain.target.kind) for name, scores in baselines.items()}

    clean, each = judged(split.test), [judged(test) for test in noisy]
    return {
        name: {"clean": row, "noisy": {m: float(np.mean([e[name][m] for e in each])) for m in row}}
        for name, row in clean.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--splits", type=int, default=10, help="how many, 2 or more")
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--log", type=Path, help="JSON lines: results are kept here, and what is here is not run again")
    given = parser.parse_args()
    if given.splits < 2 or not 0 < given.noise < 1:
        parser.error("--splits must be 2 or more, --noise between 0 and 1")
    data, protocol = mr.data.load("ml-100k"), mr.ColdUsers()
    setting = {"noise": given.noise, "epochs": given.epochs}
    lines = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    known = {row["seed"]: row for row in map(json.loads, lines) if all(row[k] == v for k, v in setting.items())}
    rows = []
    for seed in range(given.first, given.first + given.splits):
        if seed not in known:
            known[seed] = setting | {
                "seed": seed,
                "results": run(data, protocol, seed, given.noise, given.epochs),
            }
            if given.log:
                with given.log.open("a") as file:
                    file.write(json.dumps(known[seed]) + "\n")
        rows.append(known[seed])
        print(f"split {seed}: done", flush=True)

    def values(learner: str, kind: str, metric: str) -> np.ndarray:
        return np.array([row["results"][learner][kind][metric] for row in rows])

    print(f"\n{data.name}, {protocol}, splits {given.first} to {given.first + given.splits - 1}, noise {given.noise}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    learners = list(rows[0]["results"])
    difference = {
        n: paired(values(n, "noisy", "within_user_auc"), values(BEFORE, "noisy", "within_user_auc")) for n in learners
    }
    shown = {(n, "noisy"): f"{mean:+.4f} ± {half:.4f}" for n, (mean, half) in difference.items()}
    table(
        ["learner", "support", *SHOWN, f"within_user_auc minus {BEFORE} on noisy support"],
        [
            [learner, kind, *(f"{values(learner, kind, m).mean():.4f}" for m in SHOWN), shown.get((learner, kind), "")]
            for learner in learners
            for kind in ("clean", "noisy")
        ],
    )
    cost, half = paired(values(BEFORE, "clean", "within_user_auc"), values(BEFORE, "noisy", "within_user_auc"))
    print(f"\nThe noise costs {BEFORE} {cost:.4f} ± {half:.4f} within users. Won back:")
    for learner in learners[1:]:
        if learner not in mr.evaluation.BASELINES:
            print(f"- {learner}: {difference[learner][0] / cost:.0%}")


if __name__ == "__main__":
    main()
