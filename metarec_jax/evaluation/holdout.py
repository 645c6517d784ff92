"""Holdout: evaluate a trained model and the baselines on the test users of its protocol."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import OptionError
from metarec_jax.evaluation.baselines import fit_baselines
from metarec_jax.evaluation.ranking_baselines import ranking_baselines
from metarec_jax.metrics.ranking import SIZES, Lists, by_support, rank
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise
from metarec_jax.metrics.table import Table
from metarec_jax.metrics.totals import summarise_blocks
from metarec_jax.tasks.batching import batches
from metarec_jax.tasks.candidates import Among, Candidates, judged_on, most_others
from metarec_jax.tasks.candidates import candidates as draw
from metarec_jax.tasks.splits import Histories, Split
from metarec_jax.training.trained import Trained

CELLS = 1 << 20  # users x items scored at once
Learners = Iterator[tuple[str, Iterator[Scores]]]  # of each learner, its name and the scores of blocks of users


def evaluate(
    trained: Trained,
    data: Dataset | None = None,
    *,
    support: int | None = None,
    candidates: Among = "query",
    baselines: bool = True,
) -> Table:
    """Evaluate a model and the baselines; see `metarec_jax.Recommender.evaluate`.

    With other candidates than the query the memory is that of one block of users, whatever their number.

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
    learners = _learners(trained, data, support, candidates, baselines)
    if candidates == "query":
        return Table({learner: summarise(_joined(blocks), trained.target.kind) for learner, blocks in learners})
    return Table({learner: summarise_blocks(blocks) for learner, blocks in learners})


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
    learners = _learners(trained, data, support, candidates, baselines)
    return {learner: _joined(blocks) for learner, blocks in learners}


def _learners(
    trained: Trained, data: Dataset | None, support: int | None, candidates: Among, baselines: bool
) -> Learners:
    """Yield the model and the baselines, each with the scores of all test users in blocks, computed one by one."""
    if trained.target.kind == "ranking":
        raise ValueError("this recommender ranks the catalogue: see rankings(), or train for clicks or ratings")
    split, query, target = _unseen(trained, data), trained.protocol.query, trained.target
    test = split.test
    others = most_others(test, target, candidates)
    size = min(len(test), max(1, CELLS // (query + others)))
    options: dict[str, Any] = {
        "query": query,
        "support": support,
        "batch_size": size,
        "buckets": (_width(test, query),),
    }

    def blocks(score: Callable[[Histories, Candidates], Scores]) -> Iterator[Scores]:
        for start in range(0, len(test), size):
            part = test.take(np.arange(start, min(start + size, len(test))))
            yield score(part, draw(part, target, candidates, query=query, width=others))

    def score_model(part: Histories, chosen: Candidates) -> Scores:
        tasks = (judged_on(batch, part, chosen) for batch in batches(part, target, **options))
        return score_tasks(trained.strategy, trained.params, tasks, target)

    yield trained.name or "strategy", blocks(score_model)
    if baselines:
        for name, score in fit_baselines(split.train, target, support):
            yield name, blocks(score)


def _joined(blocks: Iterator[Scores]) -> Scores:
    return Scores(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


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
