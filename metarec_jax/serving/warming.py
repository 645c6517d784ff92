"""Warming: run requests of every size and option once, so that all programs are compiled."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from metarec_jax.inference.ranker import BATCHES, HISTORIES
from metarec_jax.inference.recommendations import Choice
from metarec_jax.recommender import Recommender

SIZES, LENGTHS = BATCHES[:-1], HISTORIES  # compiled batch sizes and history lengths
COUNTS = (10, 100, 1000)  # values of k, one per compiled size
VARIED = 0.7  # diversity of the start items


def warm(recommender: Recommender) -> None:
    """Compile the programs of all requests with up to `SIZES[-1]` users and 1,000 recommendations.

    Compilation releases Python's lock, so that independent programs are compiled by one thread per core. The first
    request of each kind runs alone: others share the item side that it computes.
    """
    if not SIZES:
        return
    item, low = recommender.stock.decode([1]).tolist()[0], recommender.limits[0]
    unknown = "\0" if isinstance(item, str) else -1

    def rank(size: int, length: int, count: int) -> None:
        """Rank for `size` users with `length` interactions by every option."""
        people = [recommender.predictor.person([(unknown, low)] * length)] * size
        for choice in _choices(recommender, item, size):
            recommender.predictor.top(people, count, None, choice)

    def explain(length: int) -> None:
        recommender.explain([(unknown, low)] * (length - 1) + [(item, low)], item)

    rank(SIZES[0], LENGTHS[0], COUNTS[0])
    _ = recommender.predictor.reads_context  # traced once, kept by the predictor
    _in_threads([partial(rank, size, LENGTHS[0], COUNTS[0]) for size in SIZES[1:]])
    more = [partial(rank, size, LENGTHS[0], count) for size in SIZES for count in COUNTS[1:]]
    longer = [partial(rank, size, length, count) for size in SIZES for length in LENGTHS[1:] for count in COUNTS]
    _in_threads([*more, *longer, *(partial(explain, length) for length in LENGTHS)])
    for count in COUNTS:
        recommender.recommend([], count, diversity=VARIED)


def _choices(recommender: Recommender, item: Any, users: int) -> list[Choice]:
    """Return one choice per program that a request may need."""
    option_sets: list[dict[str, Any]] = [{}, {"only": [item], "where": [None] * users}]
    if recommender.strategy.deviation is not None:
        option_sets += [{"deviation": True, **options} for options in option_sets]
    if recommender.strategy.sample is not None:
        option_sets += [{"explore": "thompson", **options} for options in option_sets]
    rated = recommender.target.kind == "rating" or recommender.rater is not None
    choices = []
    for options in option_sets:
        orders: list[Any] = ["score"]
        if rated and not options.keys() & {"deviation", "explore"}:
            orders += [0.5, "rating"]
        choices += [Choice(by=by, **options) for by in orders]
    return choices


def _in_threads(jobs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for future in [threads.submit(job) for job in jobs]:
            future.result()
