"""Noise: what random ratings in the support sets cost, and what learning to distrust them wins back.

    python benchmarks/noise.py                          # ten splits of ml-100k, 20 % of the support ratings
    python benchmarks/noise.py --noise 0.4 --splits 20 --log noise.jsonl    # may be stopped and started again

Of each test user's support ratings a share is replaced by random ones, any rating of the data as likely; the queries
stay as they are. `alpaca` as it is by default is the reference, on clean and on noisy support sets. Beside it: `alpaca`
and `robust` (`reweighted` alpaca) trained with support sets as noisy and clean queries. Prints a Markdown table with
paired 95 % intervals over splits, and the share of the loss that is won back.
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
from metarec_jax.data.candidates import candidates, judged_on
from metarec_jax.evaluation.evaluate import score_baselines, score_tasks, summarise

SHOWN = ("auc", "within_user_auc", "ndcg@5", "log_loss")
BUCKETS = (40, 90)  # the same for every split, so that a strategy compiles once
BEFORE = "alpaca"  # as it is by default


def corrupted(histories: mr.data.Histories, share: float, query: int, seed: int) -> mr.data.Histories:
    """The same users, a share of their interactions after the first `query` rated at random."""
    rng, data = np.random.default_rng([seed, 0]), histories.data
    levels, rating = np.unique(data.rating), data.rating.copy()
    for u in range(len(histories)):
        support = histories.index[histories.starts[u] : histories.starts[u + 1]][query:]
        hit = support[rng.random(len(support)) < share]
        rating[hit] = rng.choice(levels, len(hit))
    return replace(histories, data=replace(data, rating=rating))


def run(data: mr.data.Dataset, protocol: mr.ColdUsers, seed: int, noise: float, epochs: int) -> dict[str, Any]:
    """`{learner: {"clean" or "noisy": metrics}}` of one split."""
    systems: dict[str, dict[str, Any]] = {
        BEFORE: {"strategy": "alpaca"},
        f"{BEFORE}, trained with noise": {"strategy": "alpaca", "noise": noise},
        "robust, trained with noise": {"strategy": "robust", "noise": noise},
    }
    found: dict[str, Any] = {}
    for name, options in systems.items():
        options = options | {"buckets": BUCKETS, "epochs": epochs, "progress": False}
        recommender = mr.train(data, seed=seed, protocol=protocol, **options)
        split, target = protocol.split(recommender.catalogue, seed), recommender.target
        sets = {"clean": split.test, "noisy": corrupted(split.test, noise, protocol.query, seed)}
        for kind, test in sets.items():
            judged = candidates(test, target, query=protocol.query)
            width = -(-int(test.lengths.max()) // 32) * 32
            tasks = mr.data.batches(test, target, query=protocol.query, batch_size=len(test), buckets=(width,))
            scores = score_tasks(
                recommender.strategy, recommender.params, (judged_on(b, test, judged) for b in tasks), target
            )
            found.setdefault(name, {})[kind] = summarise(scores, target.kind)
            if name == BEFORE:
                for other, plain in score_baselines(split.train, test, target, query=protocol.query).items():
                    found.setdefault(other, {})[kind] = summarise(plain, target.kind)
    return found


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
    table(
        ["learner", "support", *SHOWN, f"within_user_auc minus {BEFORE} on noisy support"],
        [
            [learner, kind, *(f"{values(learner, kind, m).mean():.4f}" for m in SHOWN)]
            + [f"{difference[learner][0]:+.4f} ± {difference[learner][1]:.4f}" if kind == "noisy" else ""]
            for learner in learners
            for kind in ("clean", "noisy")
        ],
    )
    cost, half = paired(values(BEFORE, "clean", "within_user_auc"), values(BEFORE, "noisy", "within_user_auc"))
    print(f"\nThe noise costs {BEFORE} {cost:.4f} ± {half:.4f} within users. Won back:")
    for learner in learners[1:]:
        if "trained" in learner:
            print(f"- {learner}: {difference[learner][0] / cost:.0%}")


if __name__ == "__main__":
    main()
