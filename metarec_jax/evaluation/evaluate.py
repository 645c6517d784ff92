"""Evaluate: scores of a learner or a plain baseline on a split's tasks, and what the metrics say of them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax.data.batches import Batch
from metarec_jax.data.candidates import Among, candidates
from metarec_jax.data.splits import Histories
from metarec_jax.data.target import Target
from metarec_jax.evaluation import metrics
from metarec_jax.evaluation.baselines import BASELINES, OF_RATINGS, Interactions
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks import Params, Task


class Scores(NamedTuple):
    """Scores of the query interactions of some users, in the users' order.

    Attributes:
      scores: `[users, query]` click probabilities or ratings.
      target: `[users, query]` 0 / 1 clicks or ratings.
      mask: `[users, query]`.
    """

    scores: np.ndarray
    target: np.ndarray
    mask: np.ndarray


@partial(jax.jit, static_argnums=0)
def score(strategy: Strategy, params: Params, task: Task, key: jax.Array) -> jax.Array:
    """Raw scores `[users, query]`: adapt to the support set, score the query. Compiled once a shape."""
    return strategy.predict(params, strategy.adapt(params, task.support, key), task.query.features)


def score_tasks(strategy: Strategy, params: Params, tasks: Iterator[Batch], target: Target) -> Scores:
    """Scores of every task of an iterator over `batches`."""
    parts: list[Any] = []
    positions = []
    for batch in tasks:
        n, query = len(batch.positions), batch.task.query
        raw = np.asarray(score(strategy, params, batch.task, jax.random.key(0)))[:n]
        wanted, mask = np.asarray(query.target[:n]), np.asarray(query.mask[:n])
        truth = wanted if target.kind == "click" else target.decode(wanted)
        parts.append((target.decode(raw), truth, mask))
        positions.append(batch.positions)
    order = np.argsort(np.concatenate(positions))
    return Scores(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))


def score_baselines(
    train: Histories,
    test: Histories,
    target: Target,
    *,
    query: int = 10,
    support: int | None = None,
    among: Among = "query",
) -> dict[str, Scores]:
    """The plain baselines on the same tasks: same training users, same support sets, same candidates."""
    data = train.data

    known, graded = data.rating[train.index], target.levels is not None
    judged = candidates(test, target, among, query=query)
    queries, real = (judged.interaction >= 0).sum(1), judged.mask > 0
    results = {}
    for name, make in BASELINES.items():
        of_ratings = name.endswith(OF_RATINGS)
        if of_ratings and not graded:
            continue
        encode = (lambda rating: rating) if of_ratings else target.encode
        values = encode(known).astype(float)
        predict = make(Interactions(data.user[train.index], data.item[train.index], values, len(data.items)))
        # the clicks that a liking stands for, by least squares
        line = np.polyfit(values, target.encode(known), 1) if of_ratings else (1.0, 0.0)
        scores = np.zeros_like(judged.target)
        for u in range(len(test)):
            seen = test.index[test.starts[u] : test.starts[u + 1]][queries[u] :][:support]
            found = predict(data.item[seen], encode(test.data.rating[seen]).astype(float), judged.item[u, real[u]])
            scores[u, real[u]] = np.polyval(line, found)
        if target.kind == "click":  # least squares on 0 / 1 estimates the probability, but may leave [0, 1]
            results[name] = Scores(np.clip(scores, 0, 1), judged.target, judged.mask)
        else:
            results[name] = Scores(target.decode(scores), target.decode(judged.target), judged.mask)
    return results


def summarise(scores: Scores, kind: str) -> dict[str, float]:
    """The click or the rating table of some scores, as plain floats."""
    table: Callable[..., dict[str, Any]] = metrics.click_metrics if kind == "click" else metrics.rating_metrics
    return {name: float(value) for name, value in table(*scores).items()}
