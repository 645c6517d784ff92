"""Holdout: what a trained model reaches on the test users of its protocol, beside the plain methods."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.evaluation.baselines import score_baselines
from metarec_jax.evaluation.ranking_baselines import ranking_baselines
from metarec_jax.metrics.ranking import SIZES, Lists, by_support, rank
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.candidates import Among, judged_on
from metarec_jax.tasks.candidates import candidates as draw
from metarec_jax.training.trained import Trained

CELLS = 1 << 20  # users x items scored at once


def evaluate(
    trained: Trained,
    data: Dataset | None = None,
    *,
    support: int | None = None,
    candidates: Among = "query",
    baselines: bool = True,
) -> dict[str, dict[str, float]]:
    """`{learner: {metric: value}}`; see `metarec_jax.Recommender.evaluate`."""
    if trained.target.kind == "ranking":
        sizes = SIZES if support is None else (support,)
        rankings = evaluate_rankings(trained, data, sizes=sizes, baselines=baselines)
        return {
            learner: {name: float(np.nanmean(values)) for name, values in table.items()}
            for learner, table in rankings.items()
        }
    scores = evaluate_scores(trained, data, support=support, candidates=candidates, baselines=baselines)
    return {learner: summarise(own, trained.target.kind) for learner, own in scores.items()}


def evaluate_rankings(
    trained: Trained,
    data: Dataset | None = None,
    *,
    sizes: Sequence[int | None] = SIZES,
    baselines: bool = True,
) -> dict[str, dict[str, np.ndarray]]:
    """`[users]` of each metric, by learner; see `metarec_jax.Recommender.rankings`."""
    if trained.target.kind != "ranking":
        raise ValueError('this recommender predicts clicks or ratings: train with objective="ranking"')
    split, query = trained.split(data, "evaluate(data)"), trained.protocol.query

    def ours(size: int | None) -> Lists:
        return rank(trained.strategy, trained.params, split.test, trained.target, query=query, support=size)

    tables = {trained.name or "strategy": by_support(ours, sizes)}
    if baselines:
        tables |= ranking_baselines(split, trained.target, sizes=sizes, query=query)
    return tables


def evaluate_scores(
    trained: Trained,
    data: Dataset | None = None,
    *,
    support: int | None = None,
    candidates: Among = "query",
    baselines: bool = True,
) -> dict[str, Scores]:
    """Every test user's scores of clicks or ratings, by learner; arguments as of `evaluate`."""
    if trained.target.kind == "ranking":
        raise ValueError("this recommender ranks the catalogue: see rankings(), or train for clicks or ratings")
    split, query = trained.split(data, "evaluate(data)"), trained.protocol.query
    test = split.test
    judged = draw(test, trained.target, candidates, query=query)
    size = min(len(test), max(1, CELLS // judged.item.shape[1]))
    options: dict[str, Any] = {
        "query": query,
        "support": support,
        "batch_size": size,
        "buckets": (_width(test, query),),
    }
    tasks = (judged_on(batch, test, judged) for batch in batches(test, trained.target, **options))
    name = trained.name or "strategy"
    scores = {name: score_tasks(trained.strategy, trained.params, tasks, trained.target)}
    if baselines:
        scores |= score_baselines(split.train, test, trained.target, query=query, support=support, among=candidates)
    return scores


def adaptation_cost(
    trained: Trained, data: Dataset | None = None, *, users: int = 256, repeats: int = 5
) -> tuple[float, int]:
    """Milliseconds a user of adapting, and bytes of one adapted user.

    The time is the median of `repeats` runs of the compiled `adapt` on a batch of `users` support sets, which are
    those of the test users.
    """
    test = trained.split(data, "adaptation_cost(data)").test
    if trained.target.kind == "ranking":
        raise ValueError("the cost of adapting is measured on clicks and ratings; benchmarks/serving.py has rankings")
    query = trained.protocol.query
    options: dict[str, Any] = {"query": query, "batch_size": len(test), "buckets": (_width(test, query),)}
    (batch,) = batches(test, trained.target, **options)
    support = jax.tree.map(lambda x: jnp.asarray(np.resize(x, (users, *x.shape[1:]))), batch.task.support)
    adapt, key = jax.jit(trained.strategy.adapt), jax.random.key(0)
    adapted = jax.block_until_ready(adapt(trained.params, support, key))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(adapt(trained.params, support, key))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) / users * 1e3, sum(x.nbytes for x in jax.tree.leaves(adapted)) // users


def _width(test: Any, query: int) -> int:
    """Support width of the test users: splits and support sizes share their shapes, hence what is compiled."""
    return -(-int(np.maximum(test.lengths - query, 1).max()) // 32) * 32
