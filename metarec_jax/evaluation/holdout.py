"""Holdout: evaluate a trained model and the baselines on the test users of its protocol."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import OptionError
from metarec_jax.evaluation.baselines import score_baselines
from metarec_jax.evaluation.ranking_baselines import ranking_baselines
from metarec_jax.metrics.ranking import SIZES, Lists, by_support, rank
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise
from metarec_jax.metrics.table import Table
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.candidates import Among, judged_on
from metarec_jax.tasks.candidates import candidates as draw
from metarec_jax.tasks.splits import Split
from metarec_jax.training.trained import Trained

CELLS = 1 << 20  # users x items scored at once


def evaluate(
    trained: Trained,
    data: Dataset | None = None,
    *,
    support: int | None = None,
    candidates: Among = "query",
    baselines: bool = True,
) -> Table:
    """Evaluate a model and the baselines; see `metarec_jax.Recommender.evaluate`.

    Returns:
      `{learner: {metric: value}}`.
    """
    if support is not None and (isinstance(support, bool) or not isinstance(support, int) or support < 0):
        raise OptionError(f"support: expected a number of interactions of 0 or more, or None for all, got {support!r}")
    if trained.target.kind == "ranking":
        sizes = SIZES if support is None else (support,)
        rankings = evaluate_rankings(trained, data, sizes=sizes, baselines=baselines)
        means = {
            learner: {name: float(np.nanmean(values)) for name, values in metrics.items()}
            for learner, metrics in rankings.items()
        }
        return Table(means)
    scores = evaluate_scores(trained, data, support=support, candidates=candidates, baselines=baselines)
    return Table({learner: summarise(scored, trained.target.kind) for learner, scored in scores.items()})


def evaluate_rankings(
    trained: Trained,
    data: Dataset | None = None,
    *,
    sizes: Sequence[int | None] = SIZES,
    baselines: bool = True,
) -> dict[str, dict[str, np.ndarray]]:
    """Compute per-user ranking metrics of a model and the baselines; see `metarec_jax.Recommender.rankings`.

    Returns:
      `{learner: {metric: [users]}}`.

    Raises:
      ValueError: the model does not rank.
    """
    if trained.target.kind != "ranking":
        raise ValueError('this recommender predicts clicks or ratings; rankings need training with objective="ranking"')
    split, query = _unseen(trained, data), trained.protocol.query

    def lists_of_model(size: int | None) -> Lists:
        return rank(trained.strategy, trained.params, split.test, trained.target, query=query, support=size)

    tables = {trained.name or "strategy": by_support(lists_of_model, sizes)}
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
    """Score clicks or ratings of all test users; arguments as in `evaluate`.

    Returns:
      `{learner: Scores}`.

    Raises:
      ValueError: the model ranks.
    """
    if trained.target.kind == "ranking":
        raise ValueError("this recommender ranks the catalogue: see rankings(), or train for clicks or ratings")
    split, query = _unseen(trained, data), trained.protocol.query
    test = split.test
    chosen = draw(test, trained.target, candidates, query=query)
    size = min(len(test), max(1, CELLS // chosen.item.shape[1]))
    options: dict[str, Any] = {
        "query": query,
        "support": support,
        "batch_size": size,
        "buckets": (_width(test, query),),
    }
    tasks = (judged_on(batch, test, chosen) for batch in batches(test, trained.target, **options))
    name = trained.name or "strategy"
    scores = {name: score_tasks(trained.strategy, trained.params, tasks, trained.target)}
    if baselines:
        scores |= score_baselines(split.train, test, trained.target, query=query, support=support, among=candidates)
    return scores


def adaptation_cost(
    trained: Trained, data: Dataset | None = None, *, users: int = 256, repeats: int = 5
) -> tuple[float, int]:
    """Measure adaptation: milliseconds a user, and bytes of a user's adapted values.

    The time is the median over `repeats` runs of the compiled `adapt` on a batch of `users` support sets of test users.

    Raises:
      ValueError: the model ranks.
    """
    test = trained.split(data, "adaptation_cost(data)").test
    if trained.target.kind == "ranking":
        raise ValueError("adaptation cost is measured on clicks and ratings; for rankings see benchmarks/serving.py")
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


def _unseen(trained: Trained, data: Dataset | None) -> Split:
    """Return the split of a model; raise `OptionError` if the model was trained on its test users."""
    if trained.refitted:
        raise OptionError(
            "this recommender was refitted on its test users too, so that they tell nothing about new users; evaluate "
            "the recommender before refit"
        )
    return trained.split(data, "evaluate(data)")


def _width(test: Any, query: int) -> int:
    """Return the padded support width of the test users.

    A multiple of 32: splits and support sizes share shapes, and so compiled programs.
    """
    return -(-int(np.maximum(test.lengths - query, 1).max()) // 32) * 32
