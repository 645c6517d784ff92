"""How fast batches are made beside how fast training takes them: ml-100k, the default strategy, 64 users a batch.

    python benchmarks/input_rate.py

Prints batches a second of `batches`, which `mr.train` reads, and of the Grain sampler, and training steps a second on
batches that are there already: medians of several rounds.
"""

import os
import time
from collections.abc import Callable
from itertools import islice

import jax
import numpy as np
import optax

import metarec_jax as mr
from metarec_jax.training.loop import default_optimizer

ROUNDS = 5


def per_second(work: Callable[[], int]) -> float:
    """Median over rounds of what `work` counts, a second; a first round is not counted."""
    work()
    rates = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        rates.append(work() / (time.perf_counter() - begun))
    return float(np.median(rates))


def main() -> None:
    data, protocol = mr.data.load("ml-100k"), mr.ColdUsers()
    split = protocol.split(data)
    target = mr.tasks.Target.fit(protocol, split.train)
    statistics = mr.tasks.ItemStatistics.fit(split.train, target)
    users = mr.tasks.Histories.of(statistics.extend(data), split.train.users)
    model = mr.models.linear(mr.models.fields_of(statistics.extend(data)))
    strategy = mr.alpaca(model, loss=optax.losses.sigmoid_binary_cross_entropy)
    buckets = mr.tasks.bucket_sizes(np.maximum(users.lengths - protocol.query, 1))
    rng, optimizer = np.random.default_rng(0), default_optimizer()
    options = {"buckets": buckets, "rng": rng, "statistics": statistics, "unknown": 0.05}

    made = per_second(lambda: sum(1 for _ in range(10) for _ in mr.tasks.batches(users, target, **options)))
    endless = iter(mr.tasks.sampler(users, target, statistics=statistics).to_iter_dataset())
    sampled = per_second(lambda: sum(1 for _ in islice(endless, 60)))
    tasks = [batch.task for batch in mr.tasks.batches(users, target, **options)]
    params = jax.jit(strategy.init)(jax.random.key(0))
    state, step = optimizer.init(params), jax.jit(mr.meta_step(strategy.loss, optimizer))

    def train() -> int:
        nonlocal params, state
        for task in tasks:
            params, state, _ = step(params, state, task, jax.random.key(0))
        jax.block_until_ready(params)
        return len(tasks)

    steps = per_second(train)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}\n")
    print("| what | a second | of what training takes |\n|---|---|---|")
    for name, rate in (("training steps", steps), ("batches", made), ("sampler (Grain)", sampled)):
        print(f"| {name} | {rate:,.1f} | {rate / steps:.1f} |")


if __name__ == "__main__":
    main()
