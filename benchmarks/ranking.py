"""Ranking the whole catalogue: our learners and the plain methods, on the same users of several splits.

    python benchmarks/ranking.py ml-100k --seeds 10 --fold-ins 5
    python benchmarks/ranking.py path/to/amazon-hin path/to/lastfm --seeds 3 --out ranking-runs
    python benchmarks/ranking.py path/to/amazon-beauty-5core --protocol next-item --strategies transitions

A data set is a name of `metarec_jax.data.load` or a folder with `interactions.parquet` (user_id, item_id; rating,
timestamp or position where there are any) and, optionally, `items.parquet` (item_id and attributes) or `tags.parquet`.
Everything is tuned on validation users. Prints Markdown: nDCG@100 by support size, recall, what the lists are like, and
the paired difference of each learner to the plain method that is best at that size, with a 95 % interval over users.
With `--out` each run is kept, and what is there is not run again.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

import metarec_jax as mr
from metarec_jax.collaborative.factorise import log_popularity
from metarec_jax.evaluation.ranking_baselines import ranking_baselines
from metarec_jax.metrics import lists as list_quality
from metarec_jax.metrics.ranking import SIZES, Lists, by_support, rank
from metarec_jax.tasks.observed import observe
from metarec_jax.tasks.splits import Split
from metarec_jax.tasks.target import Target
from metarec_jax.training import default_optimizer

COLUMNS = [f"ndcg@100, {n} known" for n in SIZES if n] + ["ndcg@100", "recall@20", "recall@50"]
NEXT = ["hit_rate@10", "ndcg@10", "mrr@10"]
TAGS = 10  # an artist's most frequent tags
Table = dict[str, np.ndarray]


def read(name: str) -> mr.data.Dataset:
    """A data set by name or folder."""
    folder = Path(name)
    if not (folder / "interactions.parquet").exists():
        return mr.data.load(name)
    table = pl.read_parquet(folder / "interactions.parquet")
    if "plays" in table.columns or "rating" not in table.columns:  # what was done, not how it was liked
        table = table.with_columns(rating=pl.lit(1.0))
    items = None
    if (folder / "items.parquet").exists():
        items = pl.read_parquet(folder / "items.parquet")
        items = items.drop([c for c in ("also_viewed",) if c in items.columns])
        for column in items.columns:
            if column != "item_id" and items[column].dtype.is_integer():
                items = items.with_columns(pl.col(column).cast(pl.String))
    elif (folder / "tags.parquet").exists():
        tags = pl.read_parquet(folder / "tags.parquet").group_by("item_id", "tag").len()
        tags = tags.sort("len", "item_id", "tag", descending=[True, False, False])
        items = tags.group_by("item_id", maintain_order=True).agg(pl.col("tag").head(TAGS).alias("tags"))
    elif "category" in table.columns:
        items = table.group_by("item_id", maintain_order=True).agg(pl.col("category").first().cast(pl.String))
    columns = {"timestamp": "position"} if "position" in table.columns else {}
    kept = ["user_id", "item_id", "rating", *(c for c in ("timestamp", "position") if c in table.columns)]
    return mr.data.from_tables(table.select(kept), items=items, columns=columns, name=folder.name)


def run(data: mr.data.Dataset, learner: str, protocol: Any, seed: int, options: dict[str, Any]) -> dict[str, Table]:
    """Per-user metrics, by learner; of "plain" those of all plain methods."""
    split: Split = protocol.split(data, seed)
    start = time.perf_counter()
    depths: dict[str, Lists] = {}
    if learner.startswith("plain"):
        target = Target.fit(protocol, split.train)
        graded = learner == "plain graded"
        if graded and target.levels is None:
            return {}
        methods = ("item-kNN", "EASE", "iALS") if graded else ("popularity", "item-kNN", "EASE", "iALS")
        found = ranking_baselines(split, target, methods=methods, graded=graded, query=protocol.query, depths=depths)
        if graded:
            found, depths = ({f"{name}, graded": x for name, x in d.items()} for d in (found, depths))
    else:
        recommender = mr.train(data, learner, seed=seed, protocol=protocol, progress=False, **arguments(options))
        target = recommender.target

        def own(size: int | None) -> Lists:
            return rank(
                recommender.strategy, recommender.params, split.test, target, query=protocol.query, support=size
            )

        seconds = time.perf_counter() - start
        found = {learner: by_support(own)}
        depths[learner], nothing = own(5), own(0)
        found[learner] |= {"without history": by_support(lambda _: nothing, (None,))["ndcg@100"]}
        found[learner] |= {"training s": np.array([seconds]), "epochs": np.array([float(len(recommender.history))])}
    popularity = np.exp(log_popularity(observe(split.train, target).positives()))
    for name, ranked in depths.items():
        top = ranked.rows[:, :10]
        found[name] |= {
            "likeness": np.array([float(list_quality.likeness(top))]),
            "coverage": np.array([float(list_quality.coverage(top, len(data.items)))]),
            "popularity rank": np.asarray(list_quality.popularity_rank(top, popularity)),
        }
    jax.clear_caches()
    return found


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `metarec_jax.train` from JSON: "objective" holds those of `metarec_jax.Ranking`, "optimizer" those
    of `metarec_jax.training.default_optimizer`."""
    makers = {"objective": mr.Ranking, "optimizer": default_optimizer}
    return {name: makers[name](**value) if name in makers else value for name, value in options.items()}


def kept_run(out: Path | None, data: mr.data.Dataset, learner: str, protocol: Any, seed: int, options: Any) -> Any:
    """`run`, from its file where there is one."""
    if out is None:
        return run(data, learner, protocol, seed, options)
    setting = mr.evaluation.describe(data, protocol, seeds=[seed], candidates="all")
    own = "" if not options else "-" + hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    path = out / f"{data.name}-{setting['hash']}-{learner.replace(' ', '_')}{own}-{seed}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return {name: {k: np.array(v, float) for k, v in table.items()} for name, table in kept.items()}
    found = run(data, learner, protocol, seed, options)
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: {k: np.asarray(v, float).tolist() for k, v in table.items()} for name, table in found.items()}
    path.write_text(json.dumps(plain))
    return found


def interval(difference: np.ndarray, users: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over users, each a mean over its fold-ins."""
    known = np.isfinite(difference)
    groups = np.unique(users[known], return_inverse=True)[1]
    mean = np.bincount(groups, difference[known]) / np.bincount(groups)
    return float(mean.mean()), float(1.96 * mean.std(ddof=1) / len(mean) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="names or folders")
    parser.add_argument("--protocol", choices=["strong-generalisation", "next-item"], default="strong-generalisation")
    parser.add_argument("--strategies", nargs="*", default=["stack", "ials"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fold-ins", type=int, default=1, help="random supports of each test user")
    parser.add_argument("--options", type=json.loads, default={}, help="see `arguments`")
    parser.add_argument("--out", type=Path, default=None, help="folder that keeps each run")
    args = parser.parse_args()
    following = args.protocol == "next-item"
    protocol = mr.NextItem() if following else mr.StrongGeneralisation(fold_ins=args.fold_ins)
    seeds = range(1 if following else args.seeds)
    for name in args.data:
        data = read(name)
        setting = mr.evaluation.describe(data, protocol, seeds=list(seeds), candidates="all")
        print(f"\n{data}\n{mr.evaluation.in_words(setting)}\n")
        runs: dict[str, list[Table]] = {}
        users = []
        for seed in seeds:
            test = protocol.split(data, seed).test
            users.append(test.users + seed * len(data.users))
            for learner in [*args.strategies, "plain", "plain graded"]:
                options = args.options if learner in args.strategies else {}
                for own, table in kept_run(args.out, data, learner, protocol, seed, options).items():
                    runs.setdefault(own, []).append(table)
        tables = {own: {k: np.concatenate([t[k] for t in each]) for k in each[0]} for own, each in runs.items()}
        show(tables, args.strategies, np.concatenate(users), NEXT if following else COLUMNS)


def show(tables: dict[str, Table], learners: list[str], users: np.ndarray, columns: list[str]) -> None:
    """Print the tables."""
    more = ["without history", "likeness", "coverage", "popularity rank", "training s", "epochs"]
    print("| learner | " + " | ".join([*columns, *more]) + " |\n" + "|---" * (1 + len(columns) + len(more)) + "|")
    for own, table in tables.items():
        cells = [f"{np.nanmean(table[c]):.4f}" for c in columns]
        digits = {"popularity rank": 0, "training s": 0, "epochs": 0}
        cells += [f"{np.nanmean(table[c]):.{digits.get(c, 4)}f}" if c in table else "" for c in more]
        print(f"| {own} | " + " | ".join(cells) + " |")
    print("\nMinus the best plain method of each column, paired over users:\n")
    print("| learner | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for own in learners:
        cells = []
        for column in columns:
            plain = {name: np.nanmean(t[column]) for name, t in tables.items() if name not in learners}
            best = max(plain, key=plain.__getitem__)
            mean, half = interval(tables[own][column] - tables[best][column], users)
            cells.append(f"{mean:+.4f} ± {half:.4f} ({best.removesuffix(' + popularity')})")
        print(f"| {own} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
