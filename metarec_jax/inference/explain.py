"""Explain: attribute a score to a user's interactions and to fields."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.schema import ORDER
from metarec_jax.inference.ranker import Ranker
from metarec_jax.models.profile import Blend
from metarec_jax.strategies import Strategy
from metarec_jax.strategies.catalogue import adapt, features, score
from metarec_jax.tasks.ranking import Known
from metarec_jax.types import Params

STEPS = 32  # of the integral in integrated gradients


class Cause(NamedTuple):
    """An interaction of the user and its effect on the score.

    Attributes:
      item, title, rating: the interaction.
      effect: the score minus the score after adapting without the interaction; exact.
      slope: first-order approximation of the effect, from the gradient with respect to the interaction's weight. It is
        0 where no gradient passes through the adaptation (fomaml, reptile, fine-tuning) or the network reads the
        history itself.
    """

    item: Any
    title: str | None
    rating: float
    effect: float
    slope: float


@dataclass(frozen=True)
class Explanation:
    """An explanation of an item's score for a user.

    Attributes:
      item, title: the explained item.
      score: a click probability or a rating, after adapting to the user.
      before: the score for a user with the same attributes and no history.
      causes: the user's interactions, largest effect first.
      fields: contribution of each field to the model's raw score (a logit, or a standardised rating), relative to an
        unknown item and user; largest first. The contributions sum to the difference of the two raw scores.
      agreement: Spearman rank correlation of the causes' effects and slopes; NaN with fewer than three causes.
    """

    item: Any
    title: str | None
    score: float
    before: float
    causes: list[Cause]
    fields: dict[str, float]
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers for JSON."""
        values = {name: getattr(self, name) for name in ("item", "title", "score", "before", "fields")}
        values["agreement"] = None if np.isnan(self.agreement) else self.agreement
        return values | {"causes": [cause._asdict() for cause in self.causes]}

    def __str__(self) -> str:
        name = self.title or self.item
        lines = [f"{name}: {self.score:.2f}; {self.before:.2f} for someone who has done nothing yet."]
        for cause in self.causes[:5]:
            lines.append(f"  {cause.effect:+.3f} because of {cause.rating:.3g} for {cause.title or cause.item}")
        if len(self.causes) > 5:
            rest = sum(cause.effect for cause in self.causes[5:])
            lines.append(f"  {rest:+.3f} because of {len(self.causes) - 5} more, each alone")
        parts = ", ".join(f"{field} {part:+.2f}" for field, part in self.fields.items())
        return "\n".join([*lines, f"  of the model's raw score: {parts}"])

    def plot(self, path: str | Path, most: int = 12) -> None:
        """Write bar charts of the effects and the fields to a PNG, SVG or PDF file.

        Args:
          path: output file.
          most: maximum number of interactions shown.

        Raises:
          ImportError: matplotlib is missing: pip install 'metarec-jax[plot]'.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the plot needs matplotlib: pip install 'metarec-jax[plot]'") from error

        causes = self.causes[:most]
        figure = Figure(figsize=(10, 1.5 + 0.3 * max(len(causes), len(self.fields))), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [f"{cause.title or cause.item} ({cause.rating:g})" for cause in causes]
        bars = [(left, names, [c.effect for c in causes], "effect on the score"),
                (right, list(self.fields), list(self.fields.values()), "part of the raw score")]  # fmt: skip
        for axes, labels, values, title in bars:
            axes.barh(range(len(values)), values, color=["#2a7" if v > 0 else "#c33" for v in values])
            axes.set_yticks(range(len(values)), labels)
            axes.invert_yaxis()
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(title)
        figure.suptitle(f"{self.title or self.item}: {self.score:.2f} (before: {self.before:.2f})")
        figure.savefig(path)


class Effects(NamedTuple):
    """Raw scores of one item for one user, and their attribution.

    Attributes:
      after, before: score with and without the user's interactions.
      without: `[interactions]` score without each interaction.
      slopes: `[interactions]` weight times the derivative of the score with respect to it.
      fields: contribution of each field.
    """

    after: float
    before: float
    without: np.ndarray
    slopes: np.ndarray
    fields: dict[str, float]


def effects(ranker: Ranker, known: Known, row: int) -> Effects:
    """Attribute the score of the item in `row`, for the first user of `known`."""
    n, width = int((known.weight[0] > 0).sum()), known.items.shape[1]
    copies = jax.tree.map(lambda x: np.repeat(x[:1], width + 2, axis=0), known)
    for i in range(width):
        copies.weight[i, i] = 0
    copies.weight[width + 1] = 0
    rows = np.full((width + 2, 1), row, np.int32)
    scores = np.asarray(ranker.scores(ranker.adapt(copies), copies, rows))[:, 0]
    one = jax.tree.map(lambda x: x[:1], known)
    slopes, parts = _slopes_and_parts(ranker.strategy, ranker.params, ranker.tables, one, rows[:1])
    fields = {name: float(part) for name, part in parts.items()}
    return Effects(float(scores[width]), float(scores[width + 1]), scores[:n], np.asarray(slopes)[:n], fields)


@partial(jax.jit, static_argnums=0)
def _slopes_and_parts(
    strategy: Strategy, params: Params, tables: dict[str, jax.Array], known: Known, rows: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return weight times slope `[examples]`, and integrated gradients of the fields.

    The integration path is the straight line from the unknown value of all fields to their actual values.

    References:
      Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017, section 3.
    """

    def of_weight(weight: jax.Array) -> jax.Array:
        reweighed = known._replace(weight=weight)
        return score(strategy, params, tables, adapt(strategy, params, tables, reweighed), known, rows)[0, 0]

    slopes = jax.grad(of_weight)(known.weight)[0] * known.weight[0]
    adapted = adapt(strategy, params, tables, known)
    last = (known.weight > 0).sum(1, keepdims=True).astype(jnp.int32)
    items = {name: table[rows] for name, table in tables.items()}
    whole = features(items, known.user, known.context, last)
    names = sorted(name for name in whole if name != ORDER)

    def of_shares(shares: jax.Array) -> jax.Array:
        blends = {
            name: Blend(whole[name], jnp.broadcast_to(s, rows.shape)) for name, s in zip(names, shares, strict=True)
        }
        return strategy.predict(params, adapted, whole | blends)[0, 0]

    middles = (jnp.arange(STEPS) + 0.5) / STEPS
    gradients = jax.lax.map(lambda at: jax.grad(of_shares)(jnp.full(len(names), at)), middles)
    return slopes, dict(zip(names, gradients.mean(0), strict=True))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Spearman's correlation; NaN with fewer than three numbers, or if one side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
