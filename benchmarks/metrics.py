"""Metrics over a million users with a hundred candidates each: seconds, after compiling.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --users 100000

Random scores, targets and a mask with one candidate in ten missing. Prints a Markdown table: each metric alone, and the
whole click table, which shares the sorting among its metrics.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import numpy as np

import metarec_jax as mr

metrics = mr.metrics


def seconds(function: Any, arrays: tuple[Any, ...], repeats: int) -> tuple[float, float]:
    """Median seconds of a call after the first, and what that took. The pooled AUC sorts outside `jit` on a CPU."""
    compiled, taken = function if function in (metrics.auc, metrics.click_metrics) else jax.jit(function), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:])), taken[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rng, shape = np.random.default_rng(0), (given.users, given.candidates)
    scores = rng.random(shape, dtype=np.float32)
    target = (rng.random(shape, dtype=np.float32) < 0.3 * scores + 0.2).astype(np.float32)
    mask = (rng.random(shape, dtype=np.float32) < 0.9).astype(np.float32)
    arrays = tuple(jax.device_put(x) for x in (scores, target, mask))
    at_5 = {
        f"{n}@5": partial(getattr(metrics, f"{n}_at"), 5)
        for n in ("precision", "recall", "ndcg", "mrr", "map", "hit_rate")
    }
    jobs = {
        **{name: getattr(metrics, name) for name in ("log_loss", "accuracy", "f1", "calibration_error", "auc")},
        "within_user_auc": metrics.within_user_auc,
        **at_5,
        "click table": metrics.click_metrics,
    }
    print(f"{given.users:,} users x {given.candidates}, {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| metric | s | first call, s |\n|---|---|---|")
    for name, function in jobs.items():
        median, first = seconds(function, arrays, given.repeats)
        print(f"| {name} | {median:.2f} | {first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
