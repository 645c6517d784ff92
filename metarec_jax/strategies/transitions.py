"""Transitions: the next item as a mixture of item-to-item tables, with gates fitted to the training users."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp

from metarec_jax.collaborative.factorise import check_memory
from metarec_jax.collaborative.item_to_item import (
    Sequences,
    attribute_rows,
    padded,
    product,
    similar_rows,
    stochastic,
    top,
    vectors,
)
from metarec_jax.collaborative.item_to_item import transitions as counted
from metarec_jax.core.columns import add_to_columns
from metarec_jax.data.schema import ITEM, ITEM_ID
from metarec_jax.models.model import Model
from metarec_jax.strategies.ease import MEMORY
from metarec_jax.strategies.ials import need_design, only_ranks
from metarec_jax.strategies.observed import among
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.observed import Observed
from metarec_jax.types import Examples, Features, Params, PointwiseLoss

FAST, SLOW, BACK = 0.5, 6.0, 0.5  # decay per step within 5; time constant within 20; weight of preceding items
SHARPNESS = 4.0  # power of a cosine
FACTOR = 1 << 22  # entries of a table that is multiplied by another; 20 to 500 neighbours per row are kept
BLOCK = 2048  # users looked up at once
TOGETHER = 512  # users are padded to a multiple of this, so that folds of the training users share a compiled program
FLOOR = 1e-4  # added to a probability, so that targets no expert reaches do not shape the gates
EXPERTS = ("fast", "slow", "back", "two", "vector", "attribute", "attribute_first", "attribute_last")


def transitions(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    experts: tuple[str, ...] = EXPERTS,
    size: int = 200,
    rank: int = 256,
    lags: int = 20,
    steps: int = 150,
    memory: int = MEMORY,
) -> Strategy:
    """Mixture of item-to-item transition tables over the latest items of a history.

        p(j) = sum_{l <= lags, k} a_lk M_k[h_l, j] + a_0 popularity_j,   score(x_j) = log p(j)

    h_l is the l-th latest item. The weights a are one softmax over lags, experts and popularity. Their logits are
    linear in log l, in the log count of h_l and in the log length of the history: 4 parameters per expert. They are
    fitted to the likelihood of each training user's last item, with tables that exclude it, and then used with tables
    of all items. The M_k are row-stochastic, without a diagonal, and computed from the training sequences:

    - "fast", "slow": items that follow within 5 places, weighted .5^(d - 1), or within 20, weighted exp(-(d - 1) / 6);
      "back": items that precede, the transpose of "slow".
    - "two": two steps of "slow" in both directions.
    - "vector": cosines of item vectors (SVD), "attribute": of the items' integer fields, both to the fourth power.
    - "attribute_first", "attribute_last": a step from an item with similar attributes; a step to one.

    Everything is fitted in closed form or by `fit`; `Ranking` has nothing to train. An empty history gets popularity.

    Args:
      model: `design`; only the size of its catalogue is read.
      loss: not used: the strategy ranks.
      experts: which of the above; those of attributes are left out if items have no integer field.
      size: neighbours kept per row.
      rank: rank of the item vectors.
      lags: number of latest items that are read.
      steps: Adam steps on the gates.
      memory: bytes that the tables may take when all rows are full.

    Raises:
      ValueError: the model is another; an unknown expert; a number below 1.
      DataError: from `fit`, before anything is allocated: the tables may need more than `memory`.

    References:
      Jacobs et al., Adaptive Mixtures of Local Experts, Neural Computation 1991 (the gates).
    """
    need_design(model, "transitions")
    if unknown := set(experts) - set(EXPERTS):
        raise ValueError(f"experts: {sorted(unknown)[0]!r} is unknown; choose from {', '.join(EXPERTS)}")
    if min(size, rank, lags, steps) < 1 or not experts:
        raise ValueError(
            f"need numbers of 1 or more and at least one expert; got {size=}, {rank=}, {lags=}, {steps=}, {experts=}"
        )

    def tables(sequences: Sequences, chosen: list[str], attributes: sp.csr_matrix | None) -> list[sp.csr_matrix]:
        counts = sequences.counts()
        slow = counted(sequences, 20, lambda d: np.exp(-(d - 1) / SLOW), 0.5)
        step = stochastic(top(slow + BACK * slow.T, int(np.clip(FACTOR // sequences.rows, 20, 500))))

        def sharp(cosine: np.ndarray, column: np.ndarray) -> np.ndarray:
            return np.maximum(cosine, 0) ** SHARPNESS * np.sqrt(counts[column] + 1)

        def counts_of(expert: str) -> sp.csr_matrix:
            if expert == "fast":
                return counted(sequences, 5, lambda d: FAST ** (d - 1))
            if expert in ("slow", "back"):
                return slow if expert == "slow" else slow.T
            if expert == "two":
                return product(step, step, size)
            if expert == "vector":
                v = vectors(sequences, rank)
                return product(v, v.T, size, sharp)
            if expert == "attribute":
                return similar
            neighbours = stochastic(top(stochastic(similar), min(50, size)))
            return product(neighbours, step, size) if expert == "attribute_first" else product(step, neighbours, size)

        if attributes is not None:
            similar = similar_rows(attributes, size, sharp)
        return [stochastic(sp.csr_matrix(counts_of(e))) for e in chosen]

    def fit(observed: Observed) -> Params:
        task, option = f"transitions over {observed.items - 1:,} items", 'strategy_options={"size": 20}'
        needed = 8 * observed.items * min(size, observed.items) * len(experts)
        check_memory(task, needed, memory, f"keep fewer neighbours, {option}")
        kept = observed.positive
        starts = np.searchsorted(observed.user[kept], np.arange(observed.users + 1))
        sequences = Sequences(starts, observed.item[kept], observed.items)
        codes = [x for n, x in observed.features.items() if n.startswith(ITEM) and np.issubdtype(x.dtype, np.integer)]
        chosen = [e for e in experts if codes or not e.startswith("attribute")]
        attributes = attribute_rows(codes) if any(e.startswith("attribute") for e in chosen) else None
        before, target = sequences.without_last()
        gates = _start(len(chosen))
        if len(target):
            history, mask = before.latest(lags)
            gates = _fitted(gates, tables(before, chosen, attributes), before, history, mask, target, steps)
        pairs = [padded(table, size) for table in tables(sequences, chosen, attributes)]
        return {
            "columns": [columns for columns, _ in pairs],
            "values": [values for _, values in pairs],
            "counts": sequences.counts(),
            "popularity": _popularity(sequences),
            "gates": jax.device_get(gates),
        }

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        fitted = params["tables"]["fitted"]
        liked = (support.mask > 0) & (support.target > 0.5)
        position = jnp.where(liked, jnp.arange(liked.shape[1]), -1)
        latest = jnp.argsort(position, axis=1)[:, -lags:]  # padding first, the most recent last
        history, mask = (jnp.take_along_axis(x, latest, 1) for x in (support.features[ITEM_ID], liked))
        weight = jnp.take_along_axis(support.mask, latest, 1)
        scores = _scores(fitted, jnp.where(mask, history, 0), jnp.where(mask & (history > 0), weight, 0.0))
        return scores.at[:, 0].set(scores[:, 1:].min(1))  # row 0 is the unknown item

    def predict(params: Params, adapted: jax.Array, features: Features) -> jax.Array:
        return among(adapted, features)

    def items(params: Params, features: Features) -> jax.Array:
        return features[ITEM_ID]

    def score(params: Params, adapted: jax.Array, side: jax.Array) -> jax.Array:
        return adapted[:, side]

    return Strategy(
        lambda key: {}, adapt, predict, only_ranks("transitions"), items=items, score=score, fit=fit, ranks=True
    )


def _start(experts: int) -> dict[str, jax.Array]:
    """Return the initial parameters of `_gates`."""
    slopes = jnp.zeros((3, experts)).at[0].set(-1.0)  # in log lag, log count, log length
    return {"bias": jnp.zeros(experts), "slopes": slopes, "popularity": jnp.full(2, -1.0)}


def _gates(tables: Params, gates: Params, history: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gates `[users, lags, experts]` and that of popularity `[users]`; they sum to 1 for each user.

    The gates of an item are proportional to its `weight` `[users, lags]`, which is 0 for padding.
    """
    mask = weight > 0
    lag = jnp.maximum(jnp.cumsum(mask[:, ::-1], 1)[:, ::-1], 1)
    length = jnp.log(jnp.maximum(mask.sum(1), 1)) - 1.5
    count = jnp.log1p(tables["counts"][history]) - 2.0
    x = jnp.stack([jnp.log(lag), count, jnp.broadcast_to(length[:, None], lag.shape)], -1)
    available = jnp.stack([values[:, 0] > 0 for values in tables["values"]], -1)[history] & mask[..., None]
    log_weight = jnp.log(jnp.where(mask, weight, 1.0))[..., None]
    logits = jnp.where(available, gates["bias"] + x @ gates["slopes"] + log_weight, -jnp.inf)
    popular = gates["popularity"][0] + gates["popularity"][1] * length
    gate = jax.nn.softmax(jnp.concatenate([logits.reshape(len(logits), -1), popular[:, None]], 1), axis=1)
    return gate[:, :-1].reshape(logits.shape), gate[:, -1]


def _scores(tables: Params, history: jax.Array, weight: jax.Array) -> jax.Array:
    """Return log probabilities `[users, items]`, finite except for column 0."""
    weights, popular = _gates(tables, tables["gates"], history, weight)

    def add(total: jax.Array, lag: Any) -> tuple[jax.Array, None]:
        for k, (columns, values) in enumerate(zip(tables["columns"], tables["values"], strict=True)):
            rows = history[:, lag]
            total = add_to_columns(total, columns[rows], weights[:, lag, k, None] * values[rows])
        return total, None

    total, _ = jax.lax.scan(add, popular[:, None] * tables["popularity"], jnp.arange(history.shape[1]))
    return jnp.log(jnp.maximum(total, jnp.finfo(total.dtype).tiny))


def _popularity(sequences: Sequences) -> np.ndarray:
    """Return each item's share of the interactions, `[items]` float32, with 0.5 added to every count."""
    smoothed = np.append(0.0, sequences.counts()[1:] + 0.5)
    return (smoothed / smoothed.sum()).astype(np.float32)


def _evidence(
    tables: list[sp.csr_matrix], popularity: np.ndarray, history: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Look up everything that the likelihood needs of the tables, so that no step of the fit reads them.

    Returns:
      For each lag and expert, the probability of the target and of the items in the history, `[users, lags, experts]`
      each; the same two for popularity, `[users]`.
    """

    def looked_up(columns: np.ndarray) -> np.ndarray:
        """Return sums over `columns` `[users, n]`, as `[users, lags, experts]`."""
        parts = []
        for start in range(0, len(history), BLOCK):
            here = slice(start, start + BLOCK)
            rows, wide = np.broadcast_arrays(history[here, :, None], columns[here, None, :])
            each = [np.asarray(t[rows.ravel(), wide.ravel()]).reshape(rows.shape).sum(-1) for t in tables]
            parts.append(np.stack(each, -1).astype(np.float32))
        return np.concatenate(parts)

    for table in tables:
        table.sum_duplicates()  # sorts the columns, so that an entry is found by bisection
    return looked_up(target[:, None]), looked_up(history), popularity[target], popularity[history].sum(1)


def _fitted(
    gates: Params,
    tables: list[sp.csr_matrix],
    sequences: Sequences,
    history: np.ndarray,
    mask: np.ndarray,
    target: np.ndarray,
    steps: int,
) -> Params:
    """Fit the gates by `steps` of Adam on -log p(target), where items of the history cannot come next."""
    has_entries = [(np.diff(table.indptr) > 0).astype(np.float32)[:, None] for table in tables]
    evidence = _evidence(tables, _popularity(sequences), history, target)
    padding = -len(target) % TOGETHER
    users = jax.tree.map(
        lambda x: np.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))), (history, mask, evidence, np.ones(len(target)))
    )
    return _adam(gates, {"counts": sequences.counts(), "values": has_entries}, users, steps)


@partial(jax.jit, static_argnames="steps")
def _adam(gates: Params, tables: Params, users: tuple[Any, ...], steps: int) -> Params:
    """Run `steps` of Adam on `_likelihood`, whose last arguments are `users`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(state: Any, _: None) -> tuple[Any, None]:
        gates, optimizer_state = state
        updates, optimizer_state = optimizer.update(jax.grad(_likelihood)(gates, tables, *users), optimizer_state)
        return (optax.apply_updates(gates, updates), optimizer_state), None

    return jax.lax.scan(step, (gates, optimizer.init(gates)), None, length=steps)[0][0]


def _likelihood(
    gates: Params,
    tables: Params,
    history: jax.Array,
    mask: jax.Array,
    evidence: tuple[jax.Array, ...],
    real: jax.Array,
) -> jax.Array:
    """Return the mean -log(p(target) + floor) over real users, from `_evidence`."""
    weights, popular = _gates(tables, gates, history, mask)
    of_target, of_seen, popularity, popularity_seen = evidence
    p = (weights * of_target).sum((1, 2)) + popular * popularity
    seen = (weights * of_seen).sum((1, 2)) + popular * popularity_seen
    return -jnp.sum(real * jnp.log(p / jnp.maximum(1 - seen, 1e-3) + FLOOR)) / real.sum()
