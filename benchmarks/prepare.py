"""Preparing interactions that do not fit into memory: rows a second and peak memory, beside the same job in polars.

    python benchmarks/prepare.py                      # 100 million rows; about 10 GB of disk
    python benchmarks/prepare.py --rows 5000000

Writes synthetic interactions as Parquet files once (users and items by a power law, 1 % of the pairs twice), then runs,
each in a fresh process: `mr.data.prepare`, and the same job written directly in polars, as one query: the later of
duplicates, sorted by user and time, ids as rows, written in shards. Prints a Markdown table. Also the time from the
ml-100k files to the end of the first training step, in a fresh process.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def generate(folder: Path, rows: int, per_file: int = 10_000_000) -> None:
    """Parquet files of `rows` interactions."""
    import polars as pl

    rng = np.random.default_rng(0)
    users, items = max(rows // 100, 10), max(rows // 1000, 10)
    for i, begin in enumerate(range(0, rows, per_file)):
        n = min(per_file, rows - begin)
        columns = {
            "user_id": (rng.random(n) ** 2 * users).astype(np.int64) * 7919,
            "item_id": (rng.random(n) ** 3 * items).astype(np.int64) * 104_729,
            "rating": rng.integers(1, 6, n).astype(np.float32),
            "timestamp": rng.integers(1_500_000_000, 1_700_000_000, n),
        }
        again = rng.integers(0, n, n // 100)
        for name in ("user_id", "item_id"):
            columns[name][: len(again)] = columns[name][again]
        pl.DataFrame(columns).write_parquet(folder / f"part-{i:04}.parquet")


def with_prepare(source: Path, out: Path) -> int:
    import metarec_jax as mr

    done = mr.data.prepare(sorted(source.glob("*.parquet")), out, progress=False)
    return done.report["rows"] - done.report["duplicates"]


def with_polars(source: Path, out: Path, shards: int = 64) -> int:
    import polars as pl

    table = (
        pl.scan_parquet(source / "*.parquet")
        .with_row_index("row")
        .sort("user_id", "timestamp", "row")
        .unique(["user_id", "item_id"], keep="last", maintain_order=True)
        .with_columns(
            (pl.col("item_id").rank("dense")).cast(pl.Int32).alias("item"),
            (pl.col("user_id").hash() % shards).alias("shard"),
        )
        .collect()
    )
    out.mkdir()
    for (number,), part in table.partition_by("shard", as_dict=True, maintain_order=True).items():
        part.select("user_id", "item", "rating", "timestamp").write_ipc(out / f"{number}.arrow")
    return table.height


def first_step() -> None:
    """From the files of ml-100k to the end of the first step; imports before, and what they took."""
    began = time.perf_counter()
    import jax
    import optax

    import metarec_jax as mr
    from metarec_jax.training.loop import default_optimizer

    imported = time.perf_counter()
    data, protocol = mr.data.load("ml-100k"), mr.ColdUsers()
    split = protocol.split(data)
    target = mr.tasks.Target.fit(protocol, split.train)
    statistics = mr.tasks.ItemStatistics.fit(split.train, target)
    strategy = mr.alpaca(
        mr.models.linear(mr.models.fields_of(statistics.extend(data))), loss=optax.losses.sigmoid_binary_cross_entropy
    )
    extended = mr.tasks.Histories.of(statistics.extend(data), split.train.users)
    rng = np.random.default_rng(0)
    batch = next(mr.tasks.batches(extended, target, buckets=(40, 90), rng=rng, statistics=statistics))
    read = time.perf_counter()
    params, optimizer = jax.jit(strategy.init)(jax.random.key(0)), default_optimizer()
    step = jax.jit(mr.meta_step(strategy.loss, optimizer))
    jax.block_until_ready(step(params, optimizer.init(params), batch.task, jax.random.key(0)))
    done = time.perf_counter()
    print(json.dumps({"import": imported - began, "data": read - imported, "step": done - read}))


def time_first_step() -> None:
    """With an empty compilation cache, and with what that run has left in it."""
    print()
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "warm"):
            first = child("first_step", cache=Path(cache))
            print(
                f"ml-100k, files to the end of the first training step, {state} compilation cache: "
                f"{first['data'] + first['step']:.1f} s (data {first['data']:.1f}, compiling and the step "
                f"{first['step']:.1f}), after {first['import']:.1f} s of imports"
            )


def child(what: str, *paths: Path, cache: Path | None = None) -> dict[str, float]:
    """Run one of the jobs in a fresh process, with JAX's compilation cache in `cache`: what it prints."""
    command = [sys.executable, __file__, "--child", what, *map(str, paths)]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    where = os.environ | (kept if cache else {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=where)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--first-step", action="store_true", help="time nothing but the first training step")
    parser.add_argument("--folder", type=Path, default=None, help="for the files (default: a temporary one)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, *paths = given.child
        if what == "first_step":
            return first_step()
        began = time.perf_counter()
        rows = {"prepare": with_prepare, "polars": with_polars}[what](*map(Path, paths))
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return print(json.dumps({"rows": rows, "seconds": seconds, "peak": peak}))
    if given.first_step:
        return time_first_step()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        generate(source, given.rows)
        found = {}
        for what in ("prepare", "polars"):
            found[what] = child(what, source, Path(folder) / what)
            shutil.rmtree(Path(folder) / what)
    print("| job | rows | s | rows/s | peak memory, GB | time / polars |\n|---|---|---|---|---|---|")
    for what, f in found.items():
        speed, ratio = given.rows / f["seconds"], f["seconds"] / found["polars"]["seconds"]
        shown = f"{f['seconds']:.1f} | {speed:,.0f} | {f['peak'] / 1e9:.2f} | {ratio:.2f}"
        print(f"| {what} | {given.rows:,} | {shown} |")
    if found["prepare"]["rows"] != found["polars"]["rows"]:
        raise SystemExit(f"the two jobs kept different rows: {found}")
    time_first_step()


if __name__ == "__main__":
    main()
