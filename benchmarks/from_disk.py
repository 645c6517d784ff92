"""From tables on disk to a trained recommender: time and peak memory of data with a million users and items.

    python benchmarks/from_disk.py                                   # 30 million rows; about 2 GB of disk
    python benchmarks/from_disk.py --rows 3000000 --users 100000 --items 100000

Writes synthetic interactions as Parquet files once: each user belongs to one of 200 tastes, a taste chooses 70 % of its
items from its own share of the catalogue, and both follow a power law. Then, in a fresh process each, runs
`mr.data.prepare` and `mr.train` on what it has written. Prints the seconds of each stage, the peak memory, and nDCG@100
of test users with all and with three positives, beside that of popularity.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TASTES, OWN = 200, 0.7  # number of tastes; share of a user's items from the taste's own part of the catalogue
TESTED = 512  # test users that are evaluated


def generate(folder: Path, rows: int, users: int, items: int, per_file: int = 10_000_000) -> None:
    """Write Parquet files of `rows` interactions."""
    import polars as pl

    rng = np.random.default_rng(0)
    for i, begin in enumerate(range(0, rows, per_file)):
        n = min(per_file, rows - begin)
        user = rng.integers(0, users, n)
        of_taste = (
            user * 2_654_435_761 % TASTES + TASTES * (rng.random(n) ** 2 * (items // TASTES)).astype(np.int64)
        ) % items
        item = np.where(rng.random(n) < OWN, of_taste, (rng.random(n) ** 2 * items).astype(np.int64))
        time_of = rng.integers(1_500_000_000, 1_700_000_000, n)
        table = pl.DataFrame({"user_id": user, "item_id": item, "timestamp": time_of})
        table.write_parquet(folder / f"part-{i:04}.parquet")


def prepared(source: Path, out: Path) -> dict[str, float]:
    import metarec_jax as mr

    began = time.perf_counter()
    done = mr.data.prepare(sorted(source.glob("*.parquet")), out)
    written = time.perf_counter()
    done.dataset()
    joined = time.perf_counter()
    return {"interactions": done.dataset().rating.size, "prepare": written - began, "join": joined - written}


def trained(out: Path, strategy: str) -> dict[str, float]:
    import metarec_jax as mr
    from metarec_jax.metrics.ranking import list_metrics, lists_of, rank

    began = time.perf_counter()
    data = mr.data.Prepared.open(out).dataset()
    recommender = mr.train(data, strategy, ratings=None)
    seconds = time.perf_counter() - began
    trained, test = recommender.trained, mr.StrongGeneralisation().split(data).test
    test = test.take(np.arange(min(TESTED, len(test))))
    most = np.argsort(-np.bincount(data.item, minlength=len(data.items)), kind="stable")
    found = {"train": seconds, "users": len(data.users) - 1, "epochs": len(trained.history)}
    for size in (3, None):
        lists = rank(trained.strategy, trained.params, test, trained.target, support=size)
        popular = lists_of(
            lambda task: not_seen(most, np.asarray(task.known.items)), test, trained.target, support=size
        )
        name = "all" if size is None else size
        found[f"ndcg@100, {name} known"] = float(np.nanmean(list_metrics(lists)["ndcg@100"]))
        found[f"popularity, {name} known"] = float(np.nanmean(list_metrics(popular)["ndcg@100"]))
    return found


def not_seen(most: np.ndarray, seen: np.ndarray, depth: int = 100) -> np.ndarray:
    """The most popular items that each user has not seen, `[users, depth]`."""
    candidates = most[: depth + seen.shape[1]]
    return np.stack([candidates[~np.isin(candidates, row)][:depth] for row in seen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--strategy", default="ials")
    parser.add_argument("--folder", type=Path, default=None, help="for the files (default: a temporary one)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, *arguments = given.child
        found = prepared(*map(Path, arguments)) if what == "prepare" else trained(Path(arguments[0]), arguments[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return print(json.dumps(found | {"peak": peak}))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        generate(source, given.rows, given.users, given.items)
        for what in (["prepare", str(source), str(out)], ["train", str(out), given.strategy]):
            command = [sys.executable, __file__, "--child", *what]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"{name}: {value / 2**30:.2f} GiB" if name == "peak" else f"{name}: {value:,.4g}", flush=True)


if __name__ == "__main__":
    main()
