"""Stack: a weighted sum of several rankers, with weights that depend on how much is known of a user."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax.models.model import Model
from metarec_jax.strategies.content import content
from metarec_jax.strategies.ease import ease
from metarec_jax.strategies.ials import ials, only_ranks
from metarec_jax.strategies.item_knn import item_knn
from metarec_jax.strategies.observed import popularity
from metarec_jax.strategies.smooth import at, positives, smooth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.strategies.transitions import EXPERTS, transitions
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

MEMBERS: dict[str, Callable[..., Strategy]] = {
    "ials": ials, "ease": ease, "content": content, "transitions": transitions, "item_knn": item_knn,
}  # fmt: skip
OF_SPARSE = ("transitions", "item_knn")  # default members only in catalogues of more than `SMALL` rows
SMALL = 2_000
DENSE = 6_000  # largest catalogue for which "ease" has an items x items matrix
RANK = 256  # components of "ease" in larger catalogues
FULL = 20_000  # largest catalogue for which "transitions" compares the vectors of all pairs of items
NOVELTY = 0.15  # default exponent of the popularity that lists are discounted by
ENTRIES = 1 << 27  # upper bound on the entries of a member's neighbour tables


def stack(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    members: Sequence[str | Strategy] | None = None,
    options: Sequence[dict[str, Any]] | None = None,
    novelty: float = NOVELTY,
) -> Strategy:
    """Weighted sum of the members' scores; the weights are smooth functions of the number n of positives.

        score(x) = sum_m g_m(n) score_m(x) - novelty log p(x),   g_m = exp(delta_m(n)) / members

    p is the popularity of an item. The loss is that of the sum alone, so that the discount makes lists less alike and
    changes nothing in training.

    Members and weights are trained together by the loss of `Ranking`. In training, what a member learns in closed form
    (its `fit`) comes from the other folds of the training users, so that no weight is learned on scores of a member
    that has seen the user. `deviation` is the weighted sum over the members that have one.

    Args:
      model: used by the members given by name.
      loss: not used: the strategy ranks.
      members: names ("ials", "ease", "content", "transitions", "item_knn") or strategies that rank. Default: all of
        these, without the last two up to 2,000 items: in a catalogue that small most pairs of items are in many
        histories, and they did not improve MovieLens-100K. A member that is trained already is
        `metarec_jax.given(strategy, params)`; its weight is learned on users that it has seen.
      options: keyword arguments of the members given by name, one dict per member (default: `default_options`).
      novelty: exponent of the popularity that a user's probabilities of items are divided by; 0 or more.

    Raises:
      ValueError: an unknown name, a member that does not rank, or a number of options other than that of members.

    Example:
      The weights of two members start at 1 / 2. For a user who knows item 1, item 2 scores above item 3:

      >>> data = mr.data.from_tables({"user_id": [1, 1, 2, 2, 3, 3], "item_id": [1, 2, 1, 2, 3, 4]})
      >>> train = mr.tasks.Histories.of(data, np.arange(1, 4))
      >>> strategy = mr.stack(mr.models.design(mr.models.fields_of(data)), members=["ease", "item_knn"])
      >>> observed = mr.tasks.observed.observe(train, mr.tasks.Target("ranking", threshold=1.0))
      >>> params = strategy.init(jax.random.key(0)) | {"tables": mr.strategies.observed.tables(strategy, observed)}
      >>> support = mr.Examples({"item_id": jnp.array([[1]])}, jnp.ones((1, 1)), jnp.ones((1, 1)))
      >>> members, weights = jax.jit(strategy.adapt)(params, support, jax.random.key(1))
      >>> weights, jax.jit(strategy.predict)(params, (members, weights), {"item_id": jnp.array([[2, 3]])}).argmax(1)
      (Array([[0.5, 0.5]], dtype=float32), Array([0], dtype=int32))

    References:
      Wolpert, Stacked Generalization, Neural Networks 1992 (weights from held-out scores).
      Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021, section 4.1 (novelty).
    """
    if not novelty >= 0:
        raise ValueError(f"novelty is an exponent of 0 or more, got {novelty!r}")
    arguments = of_catalogue(model.items or 0, members, options)
    members, member_options = arguments["members"], arguments["options"]
    if len(member_options) != len(members) or not members:
        raise ValueError(
            f"need a member and a dict of options for each, got {len(members)} members and {len(member_options)} dicts"
        )
    if unknown := [m for m in members if isinstance(m, str) and m not in MEMBERS]:
        raise ValueError(f"member {unknown[0]!r} is unknown; choose from {', '.join(MEMBERS)}, or give a strategy")
    rankers = [
        MEMBERS[m](model, **o) if isinstance(m, str) else m for m, o in zip(members, member_options, strict=True)
    ]
    if not all(m.ranks for m in rankers):
        raise ValueError("every member of a stack must rank; wrap others in `ranked`")

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(rankers))
        return {
            "members": [m.init(k) for m, k in zip(rankers, keys, strict=True)],
            "weights": [smooth() for _ in rankers],
        }

    def of_members(params: Params) -> list[Params]:
        """Return each member's parameters, with its own `fitted` among the tables."""
        tables = params["tables"]
        fitted = tables.get("fitted", [{}] * len(rankers))
        return [{**p, "tables": {**tables, "fitted": f}} for p, f in zip(params["members"], fitted, strict=True)]

    def fit(observed: Observed) -> list[Params]:
        return [m.fit(observed) if m.fit else {} for m in rankers]

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        count, keys = positives(support), jax.random.split(key, len(rankers))
        weights = jnp.stack([jnp.exp(at(w, count)) / len(rankers) for w in params["weights"]], 1)
        return [m.adapt(p, support, k) for m, p, k in zip(rankers, of_members(params), keys, strict=True)], weights

    def weighted_sum(scores: list[jax.Array], weights: jax.Array) -> jax.Array:
        return jnp.einsum("mun,um->un", jnp.stack(scores), weights)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        each = zip(rankers, of_members(params), adapted[0], strict=True)
        total = weighted_sum([m.predict(p, a, features) for m, p, a in each], adapted[1])
        return total - novelty * popularity(params, features)

    def items(params: Params, features: Features) -> tuple[list[Any], jax.Array]:
        each = zip(rankers, of_members(params), strict=True)
        return [m.items(p, features) for m, p in each if m.items], popularity(params, features)

    def score(params: Params, adapted: Adapted, side: tuple[list[Any], jax.Array]) -> jax.Array:
        each = zip(rankers, of_members(params), adapted[0], side[0], strict=True)
        return weighted_sum([m.score(p, a, s) for m, p, a, s in each if m.score], adapted[1]) - novelty * side[1]

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        each = zip(rankers, of_members(params), adapted[0], adapted[1].T, strict=True)
        return sum(g[:, None] * m.deviation(p, a, features) for m, p, a, g in each if m.deviation)  # type: ignore[return-value]

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        each = enumerate(zip(rankers, of_members(params), adapted[0], strict=True))
        fold = jax.vmap(jax.random.fold_in, (0, None))
        return [m.sample(p, a, fold(keys, i), strength) if m.sample else a for i, (m, p, a) in each], adapted[1]

    explicit = all(m.items is not None for m in rankers)
    return Strategy(
        init,
        adapt,
        predict,
        only_ranks("stack"),
        deviation if any(m.deviation for m in rankers) else None,
        labelled=any(m.labelled for m in rankers),
        items=items if explicit else None,
        score=score if explicit else None,
        fit=fit,
        ranks=True,
        novelty=novelty,
        sample=sample if any(m.sample for m in rankers) else None,
    )


def of_catalogue(
    items: int,
    members: Sequence[str | Strategy] | None = None,
    options: Sequence[dict[str, Any]] | None = None,
    novelty: float = NOVELTY,
) -> dict[str, Any]:
    """Return arguments of `stack`, with defaults filled in for a catalogue of `items` rows.

    A saved model stores them, so that it can be loaded after the defaults have changed.
    """
    if members is None:
        members = [name for name in MEMBERS if name not in OF_SPARSE or items > SMALL]
    return {
        "members": list(members),
        "options": [default_options(m, items) for m in members] if options is None else list(options),
        "novelty": novelty,
    }


def default_options(member: str | Strategy, items: int) -> dict[str, Any]:
    """Return a member's default keyword arguments for a catalogue of `items` rows.

    "ease" has 256 components beyond 6,000 items; "transitions" has no expert of item vectors beyond 20,000. An item has
    200 neighbours, down to 20 in large catalogues.
    """
    if member == "ease":
        return {"rank": RANK} if items > DENSE else {}
    if member == "transitions":
        chosen = EXPERTS if items <= FULL else tuple(e for e in EXPERTS if e != "vector")
        return {"experts": chosen, "size": int(np.clip(ENTRIES // (len(chosen) * max(items, 1)), 20, 200))}
    return {"neighbours": int(np.clip(ENTRIES // max(items, 1), 20, 200))} if member == "item_knn" else {}
