"""Output: tables and lists as the terminal shows them."""

from typing import Any

import click
import numpy as np


def print_evaluation(recommender: Any, data: Any, support: int | None, candidates: Any = "query") -> None:
    """The table of clicks or ratings."""
    from rich.console import Console

    from metarec_jax import ColdUsers
    from metarec_jax._progress import results_table

    results = recommender.evaluate(data, support=support, candidates=candidates)
    if recommender.target.kind == "click":
        shown = ("auc", "within_user_auc", "precision@5", "ndcg@5", "mrr@5", "log_loss")
        results = {learner: {m: values[m] for m in shown} for learner, values in results.items()}
    new = "Users never seen in training" if isinstance(recommender.protocol, ColdUsers) else "Test tasks"
    title = f"{new}, judged on ratings kept from the learner"
    Console(width=110).print(results_table(results, title))


def print_ranking(recommender: Any, data: Any = None, support: int | None = None) -> None:
    """The table of a ranking, and how far the learner is ahead of the best plain method."""
    from rich.console import Console

    from metarec_jax._progress import results_table
    from metarec_jax.metrics.ranking import SIZES

    sizes = SIZES if support is None else (support,)
    columns = {f"ndcg@100, {size} known": f"{size} known" for size in sizes if size is not None}
    if support is None:
        columns |= {"ndcg@100": "all known", "recall@20": "recall@20, all"}
    found = recommender.rankings(data, sizes=sizes)
    results = {
        learner: {shown: float(np.nanmean(values[name])) for name, shown in columns.items()}
        for learner, values in found.items()
    }
    title = f"nDCG@100 of test users among all {len(recommender.stock) - 1:,} items, by how many positives are known"
    Console(width=110).print(results_table(results, title))
    judged = "ndcg@100, 5 known" if 5 in sizes else next(iter(columns))
    ours, *plain = found
    best = max(plain, key=lambda learner: results[learner][columns[judged]])
    difference = found[ours][judged] - found[best][judged]
    mean, half, users = _paired(difference, getattr(recommender.protocol, "fold_ins", 1))
    lead = f"{abs(mean):.3f} {'behind' if mean < 0 else 'ahead of'} {best}, the best plain method"
    interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}, {users} users"
    click.echo(f"With {columns[judged]}, {ours} is {lead} ({interval})")


def _paired(differences: np.ndarray, fold_ins: int) -> tuple[float, float, int]:
    """Mean of paired differences, half the width of its 95 % interval, normal over users, and the number of users.

    Args:
      differences: `[users * fold_ins]`, the draws of a user one after the other; NaN where there is no query.
      fold_ins: draws of query and support for each user.
    """
    per_user = differences.reshape(-1, fold_ins).mean(1)
    per_user = per_user[np.isfinite(per_user)]
    return float(per_user.mean()), float(1.96 * per_user.std(ddof=1) / len(per_user) ** 0.5), len(per_user)


def print_recommendations(recommender: Any, recommendations: Any) -> None:
    """The list; scores of a ranking as odds of being chosen next relative to the first, exp(score - first score)."""
    ranks = recommender.target.kind == "ranking"
    scores = np.array([score for _, score, _ in recommendations])
    if ranks:
        scores = np.exp(scores - scores.max(initial=-np.inf))
    click.echo("\nRecommended (how likely to be chosen next, relative to the first):" if ranks else "\nRecommended:")
    for rank, ((item, _, title), score) in enumerate(zip(recommendations, scores, strict=True), 1):
        click.echo(f"{rank:4}. {score:6.3f}  {described(recommender, item, title)}")


def described(recommender: Any, item: Any, title: str | None) -> str:
    """Title, id and, where items have such a field, genres."""
    stock, name = recommender.stock, f"{title}  [{item}]" if title else str(item)
    field = next((f for f in stock.fields if f.name in ("genres", "genre")), None)
    if field is None or field.kind not in ("categorical", "multi") or field.vocabulary.buckets is not None:
        return name
    codes = np.atleast_1d(stock.features[field.name][stock.encode([item])[0]])
    genres = field.vocabulary.decode(codes[codes > 0]).tolist()
    return f"{name}  {', '.join(map(str, genres))}" if genres else name
