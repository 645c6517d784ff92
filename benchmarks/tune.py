"""Tuning: the same number of random trials for every strategy, judged on validation users only.

    python benchmarks/tune.py --log tune.jsonl          # all strategies, clicks; may be stopped and started again
    python benchmarks/tune.py --strategies ridge maml --trials 16 --target rating

A trial draws the outer learning rate and penalty and the strategy's own settings (`SPACE`) from a seeded generator,
trains on several splits, and is worth its best validation loss, averaged over the splits; the first trial of each
strategy is its default. Test users are never looked at. Writes the best trial of each strategy to
`benchmarks/tuned.json`, which `quality.py --tuned` reads, and prints a Markdown table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from quality import DEFAULT, trainer

import metarec_jax as mr
from metarec_jax.training.loop import SELECT

TUNED = Path(__file__).with_name("tuned.json")
OUTER = {"learning_rate": (1e-3, 1e-2), "penalty": (3e-4, 1e-2)}  # drawn log-uniformly
STEPS = {"steps": (1, 3, 5, 8)}
SPACE: dict[str, dict[str, tuple[Any, ...]]] = {  # a strategy's own settings: one of each tuple, all as likely
    "ridge": {"penalty": (0.3, 1.0, 3.0), "bias_penalty": (0.3, 1.0, 3.0)},
    "alpaca": {"full": (True, False), "scale": (0.1, 0.3, 1.0)},
    **{name: STEPS for name in ("maml", "fomaml", "reptile", "anil", "melu", "sparse_maml", "gated", "mamo", "mamlpp")},
    "meta_sgd": {"steps": (1, 2, 3)},
    "imaml": {"steps": (8, 16, 32), "damping": (0.3, 1.0, 3.0)},
    "meta_reg": STEPS | {"penalty": (0.03, 0.1, 0.3)},
    "cavia": STEPS | {"size": (8, 16, 32)},
    "limaml": STEPS | {"size": (8, 16, 32)},
    "cnp": {"size": (16, 32, 64)},
    "anp": {"size": (16, 32, 64), "kl": (0.01, 0.1, 1.0)},
    "tanp": {"size": (16, 32, 64), "kl": (0.01, 0.1, 1.0), "alpha": (0.3, 1.0, 3.0)},
    "in_context": {"dense": (0.0, 1.0)},
    **{name: {"count": (0.3, 1.0, 3.0)} for name in ("prototypes", "lwa", "nlba")},
    "metaemb": {"alpha": (0.1, 0.5), "size": (16, 32)},
    "gme": {"alpha": (0.1, 0.5), "size": (16, 32)},
    "mwuf": {"size": (16, 32), "hidden": (16, 32)},
    "finetune": STEPS,
    "finetune_head": {"steps": (2, 5, 10, 20)},
    "lora": {"steps": (2, 5, 10, 20), "rank": (2, 4, 8)},
}


def drawn(name: str, trial: int, seed: int) -> dict[str, Any]:
    """The settings of a trial: `{"outer": ..., "own": ...}`; the same for the same name, number and seed."""
    if trial == 0:
        return dict(DEFAULT)
    rng = np.random.default_rng([seed, trial, *name.encode()])
    outer = {k: float(np.exp(rng.uniform(*np.log(limits)))) for k, limits in OUTER.items()}
    return {"outer": outer, "own": {k: values[rng.integers(len(values))] for k, values in SPACE.get(name, {}).items()}}


def validation_loss(name: str, settings: dict[str, Any], data: Any, protocol: mr.ColdUsers, splits: range) -> float:
    """Mean over splits of the best epoch's validation loss; infinite where training fails."""
    train, found = trainer(name, settings), []
    for split in splits:
        try:
            history = train(data, seed=split, protocol=protocol).history
        except FloatingPointError:
            return float("inf")
        found.append(min(entry[SELECT[protocol.target]] for entry in history))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--target", choices=["click", "rating"], default="click")
    parser.add_argument("--trials", type=int, default=8, help="of each strategy, its default settings among them")
    parser.add_argument("--splits", type=int, default=3, help="seeds 0 and up; report on others")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--strategies", nargs="+", default=list(mr.STRATEGIES), choices=list(mr.STRATEGIES))
    parser.add_argument("--log", type=Path, help="JSON lines: trials are kept here, and what is here is not run again")
    given = parser.parse_args()
    if given.trials < 1 or given.splits < 1:
        parser.error("--trials and --splits must be 1 or more")
    data, protocol = mr.data.load(given.data), mr.ColdUsers(target=given.target)
    setting = {"data": data.name, "protocol": repr(protocol), "splits": given.splits, "seed": given.seed}
    rows = [json.loads(line) for line in given.log.read_text().splitlines()] if given.log and given.log.exists() else []
    done = {(r["strategy"], r["trial"]): r for r in rows if all(r[key] == value for key, value in setting.items())}
    best: dict[str, Any] = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    table = []
    for name in given.strategies:
        for trial in range(given.trials):
            if (name, trial) not in done:
                settings = drawn(name, trial, given.seed)
                loss = validation_loss(name, settings, data, protocol, range(given.splits))
                done[name, trial] = setting | {"strategy": name, "trial": trial, "loss": loss, **settings}
                jax.clear_caches()  # a trial's programs serve no other
                if given.log:
                    with given.log.open("a") as file:
                        file.write(json.dumps(done[name, trial]) + "\n")
            row = done[name, trial]
            print(f"{name}, trial {trial}: {row['loss']:.4f} {row['outer']} {row['own']}", flush=True)
        trials = [done[name, trial] for trial in range(given.trials)]
        chosen = min(trials, key=lambda row: row["loss"])
        best.setdefault(given.target, {})[name] = {k: chosen[k] for k in ("outer", "own", "loss", "trial")} | {
            "default loss": trials[0]["loss"],
            "trials": given.trials,
            "splits": given.splits,
        }
        TUNED.write_text(json.dumps(best, indent=1, sort_keys=True) + "\n")
        outer = ", ".join(f"{k} {v:.2g}" for k, v in chosen["outer"].items()) or "default"
        own = ", ".join(f"{k} {v}" for k, v in chosen["own"].items()) or "default"
        table.append(f"| {name} | {trials[0]['loss']:.4f} | {chosen['loss']:.4f} | {outer} | {own} |")
    print(f"\n{data.name}, {protocol}, {given.trials} trials, splits 0 to {given.splits - 1}, validation users\n")
    print(f"| strategy | {SELECT[given.target]}, default | best trial | outer | own |\n|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
