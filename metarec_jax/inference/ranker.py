"""Ranking: the best items of the whole stock for each user, exactly, in bounded memory, the item side computed once."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.staged import Staged, staged
from metarec_jax.data.fields import Field
from metarec_jax.inference.stock import Stock
from metarec_jax.strategies import Strategy
from metarec_jax.strategies.catalogue import adapt, last, score, score_one
from metarec_jax.tasks.ranking import Known
from metarec_jax.types import Params

USERS = 256  # ranked at once, at most
BYTES = 1 << 26  # of the largest array that scoring a tile of items for so many users makes
STEP = 256  # tiles are multiples of this long
GROUP = 64  # items whose largest score is found first
Explore = Literal["ucb", "thompson"]


class Ranked(NamedTuple):
    """`[users, k]` rows of the stock, best first; their scores, -inf where fewer than k are left; and the standard
    deviations of the scores, where they were asked for."""

    rows: np.ndarray
    scores: np.ndarray
    deviations: np.ndarray | None


class Ranker:
    """Adapts to users and ranks a stock for them; keeps what the network computes of the items alone.

    A strategy may say what that is (`Strategy.items`). Of the others it is read from `predict`
    (`metarec_jax.core.staged`), so that every network gains what its form allows: of a factorisation all but one
    product a user, of an MLP over joined fields the look-ups only.
    """

    def __init__(
        self,
        strategy: Strategy,
        params: Params,
        stock: Stock,
        user: Sequence[Field] = (),
        context: Sequence[Field] = (),
    ) -> None:
        self.strategy, self.stock, self.fields = strategy, stock, (tuple(user), tuple(context))
        self.params: Params = jax.device_put(params)  # those of a loaded model would be copied in each call
        tables = {"item_id": stock.code} | {f"item/{name}": table for name, table in stock.features.items()}
        self.tables: dict[str, jax.Array] = jax.device_put(tables)
        self._adapt, self._score = jax.jit(partial(adapt, strategy)), jax.jit(partial(score, strategy))
        self._sides: dict[Any, _ItemSide] = {}

    def adapt(self, known: Known) -> Any:
        """Each user's adapted values, a pytree of arrays `[users, ...]`."""
        return self._adapt(self.params, self.tables, known)

    def scores(self, adapted: Any, known: Known, rows: np.ndarray) -> jax.Array:
        """`[users, n]` scores of the items in `rows` `[users, n]`."""
        return self._score(self.params, self.tables, adapted, known, rows)

    def top(
        self,
        known: Known,
        k: int,
        *,
        seen: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        group: np.ndarray | None = None,
        deviation: bool = False,
        explore: Explore | None = None,
        strength: float = 1.0,
        key: jax.Array | None = None,
        approximate: bool = False,
    ) -> Ranked:
        """The `k` best items of each user.

        Args:
          known: the users.
          k: how many, at most as many as there are items.
          seen: `[users, n]` rows that are left out; -1 is none.
          allowed: `[groups, rows]` which items may be recommended.
          group: `[users]` which of the groups each user belongs to (default: the first).
          deviation: find the standard deviations too.
          explore: "ucb" ranks by score + strength * deviation, "thompson" by a draw from N(score, (strength *
            deviation)^2), each item by itself.
          strength: of the exploration.
          key: of the draws.
          approximate: find the best by `jax.lax.approx_max_k`, which on an accelerator may miss one in twenty.

        Raises:
          ValueError: the strategy knows no deviation.
        """
        deviation = deviation or explore is not None
        if deviation and self.strategy.deviation is None:
            raise ValueError("this strategy does not know the deviation of its scores; `alpaca` does")
        users = len(known.items)
        adapted = self.adapt(known)
        side = self._side(adapted, known, deviation)
        left_out = np.full((users, 1), -1, np.int32) if seen is None else seen
        masks = None if allowed is None else side.tiled(allowed)
        groups = np.zeros(users, np.int32) if group is None else group
        found = side.top(
            min(k, len(self.stock)), explore, approximate, side.fixed, side.tiles, len(self.stock), adapted, known,
            left_out, masks, groups, strength, jax.random.key(0) if key is None else key,
        )  # fmt: skip
        rows, scores, deviations = found
        return Ranked(np.asarray(rows), np.asarray(scores), None if deviations is None else np.asarray(deviations))

    def vectors(self) -> np.ndarray:
        """`[rows, width]` all that the network computes of each item alone and reads when it scores it."""
        known = Known.blank(1, 8, *self.fields)
        side = self._side(self.adapt(known), known, False)
        return side.by_row(len(self.stock))

    def extended(self, stock: Stock) -> "Ranker":
        """The ranker of a stock with more items; what was computed of the others stays."""
        other = Ranker(self.strategy, self.params, stock, *self.fields)
        other._sides = {
            key: side.extended(self.params, other.tables, len(self.stock)) for key, side in self._sides.items()
        }
        return other

    def _side(self, adapted: Any, known: Known, deviation: bool) -> "_ItemSide":
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), (adapted, known.user, known.context)
        )
        leaves, structure = jax.tree.flatten(one)
        key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), deviation)
        if key not in self._sides:
            user = (*one, jax.ShapeDtypeStruct((), jnp.int32))
            self._sides[key] = _ItemSide.of(self.strategy, deviation, self.params, self.tables, user)
        return self._sides[key]


class _ItemSide(NamedTuple):
    """What is computed of the items alone, in tiles.

    Attributes:
      stage: of scoring one tile.
      length: items in a tile.
      fixed: values that no item enters.
      tiles: values of the items, each `[tiles, ...]`.
      first: `(params, tables, from) -> tiles` from the given tile on.
      top: see `_top`.
    """

    stage: Staged
    length: int
    fixed: list[jax.Array]
    tiles: list[jax.Array]
    first: Any
    top: Any

    @classmethod
    def of(
        cls, strategy: Strategy, deviation: bool, params: Params, tables: dict[str, jax.Array], user: Any
    ) -> "_ItemSide":
        rows = len(tables["item_id"])

        def stage_of(length: int) -> Staged:
            items = {n: jax.ShapeDtypeStruct((length, *t.shape[1:]), t.dtype) for n, t in tables.items()}
            if strategy.items is not None and not deviation:
                return _explicit(strategy, params, items, user)
            return staged(partial(score_one, strategy, deviation), params, items, user)

        widest = -(-stage_of(STEP).widest // STEP)  # values an item and user
        longest = max(BYTES // (4 * USERS * widest) // STEP * STEP, STEP)
        length = min(longest, -(-rows // STEP) * STEP)
        stage = stage_of(length)

        @partial(jax.jit, static_argnums=(2,))
        def first(params: Params, tables: dict[str, jax.Array], start: int) -> tuple[list[jax.Array], list[jax.Array]]:
            pieces = {n: _in_tiles(t[start * length :], length) for n, t in tables.items()}
            fixed, _ = stage.first(params, {n: t[0] for n, t in pieces.items()})
            return fixed, jax.lax.map(lambda tile: stage.first(params, tile)[1], pieces)

        fixed, tiles = first(params, tables, 0)
        top = jax.jit(partial(_top, stage, length), static_argnums=(0, 1, 2))
        return cls(stage, length, fixed, tiles, first, top)

    def tiled(self, allowed: np.ndarray) -> jax.Array:
        """Masks `[groups, rows]` as `[tiles, groups, length]`."""
        return jnp.swapaxes(_in_tiles(jnp.asarray(allowed).T, self.length), 1, 2)

    def extended(self, params: Params, tables: dict[str, jax.Array], rows: int) -> "_ItemSide":
        start = rows // self.length
        _, new = self.first(params, tables, start)
        return self._replace(tiles=[jnp.concatenate([old[:start], x]) for old, x in zip(self.tiles, new, strict=True)])

    def by_row(self, rows: int) -> np.ndarray:
        """`[rows, width]` of the values that have an axis of items, one after the other."""
        found = []
        for value in map(np.asarray, self.tiles):
            axes = [a for a in (1, 2) if value.ndim > a and value.shape[a] == self.length]
            if axes and np.issubdtype(value.dtype, np.floating):
                moved = np.moveaxis(value, axes[0], 1)
                found.append(moved.reshape(moved.shape[0] * self.length, -1)[:rows])
        return np.concatenate(found, -1)


def _explicit(strategy: Strategy, params: Params, items: Any, user: Any) -> Staged:
    """The two stages of a strategy that says itself what it computes of the items alone."""
    make, score_side = strategy.items, strategy.score
    assert make is not None
    assert score_side is not None
    own = jax.tree.structure(params)
    side = jax.eval_shape(make, params, items)
    of_items = jax.tree.structure(side)

    def first(params: Params, items: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        return jax.tree.leaves(params), jax.tree.leaves(make(params, items))

    def second(fixed: list[jax.Array], values: list[jax.Array], user: Any) -> Any:
        adapted = jax.tree.map(lambda x: x[None], user[0])
        return score_side(jax.tree.unflatten(own, fixed), adapted, jax.tree.unflatten(of_items, values))[0], None

    length = items["item_id"].shape[0]
    return Staged(first, second, length)


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """As `jax.lax.top_k` of `[users, n]`, and on a CPU several times as fast where n is large: the k largest lie in the
    k groups of 64 with the largest maxima."""
    users, n = values.shape
    groups = n // GROUP
    if n % GROUP or groups < 4 * k:
        return jax.lax.top_k(values, k)
    grouped = values.reshape(users, groups, GROUP)
    _, which = jax.lax.top_k(grouped.max(-1), k)
    which = jnp.sort(which, 1)  # of equal values the first comes first
    value, place = jax.lax.top_k(jnp.take_along_axis(grouped, which[..., None], 1).reshape(users, k * GROUP), k)
    return value, jnp.take_along_axis(which, place // GROUP, 1) * GROUP + place % GROUP


def diversify(rows: np.ndarray, scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """Maximal marginal relevance: positions in `rows` of up to `k` items, one after the other that with the largest

        (1 - diversity) * score - diversity * (the largest cosine with an item picked before)

    Args:
      rows: `[n]` candidates, best first.
      scores: `[n]` of them; here from 0 (the worst of them) to 1.
      vectors: `[stock, width]` of length 1.
      k: how many.
      diversity: from 0 to 1.
    """
    spread = np.ptp(scores) if len(scores) else 0.0
    relevance = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    alike, likeness = np.full(len(rows), -np.inf), vectors[rows]
    picked: list[int] = []
    for _ in range(min(k, len(rows))):
        worth = (1 - diversity) * relevance - (diversity * alike if picked else 0.0)
        worth[picked] = -np.inf
        picked.append(int(worth.argmax()))
        alike = np.maximum(alike, likeness @ likeness[picked[-1]])
    return np.array(picked, int)


def _in_tiles(table: jax.Array, length: int) -> jax.Array:
    """`[rows, ...]` as `[tiles, length, ...]`, zeros at the end."""
    count = -(-table.shape[0] // length)
    filled = jnp.pad(table, [(0, count * length - table.shape[0])] + [(0, 0)] * (table.ndim - 1))
    return filled.reshape(count, length, *table.shape[1:])


def _top(
    stage: Staged,
    length: int,
    k: int,
    explore: Explore | None,
    approximate: bool,
    fixed: list[jax.Array],
    tiles: list[jax.Array],
    rows: jax.Array,
    adapted: Any,
    known: Known,
    seen: jax.Array,
    masks: jax.Array | None,
    group: jax.Array,
    strength: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The top `k` rows `[users, k]`, their scores and deviations; what must not be recommended has score -inf."""
    users, count = len(seen), tiles[0].shape[0]
    user = (adapted, known.user, known.context, last(known))
    best = partial(jax.lax.approx_max_k, recall_target=0.95) if approximate else top_k

    def tile(number: Any) -> list[jax.Array]:
        """The best of one tile: value to rank by, row, score and deviation, each `[users, k]`."""
        values, first = [t[number] for t in tiles], number * length
        scores, deviations = jax.vmap(lambda u: stage.second(fixed, values, u))(user)
        row = first + jnp.arange(length, dtype=jnp.int32)
        value = scores
        if explore is not None:
            noise = 1.0 if explore == "ucb" else jax.random.normal(jax.random.fold_in(key, number), scores.shape)
            value = scores + strength * deviations * noise
        value = jnp.where((row > 0) & (row < rows) & jnp.isfinite(value), value, -jnp.inf)  # row 0 is no item
        here = jnp.where((seen >= first) & (seen < first + length), seen - first, length)
        value = value.at[jnp.arange(users)[:, None], here].set(-jnp.inf, mode="drop")
        if masks is not None:
            value = jnp.where(masks[number][group], value, -jnp.inf)
        value, place = best(value, min(k, length))
        others = [scores] if deviations is None else [scores, deviations]
        return [value, first + place, *(jnp.take_along_axis(x, place, 1) for x in others)]

    def merge(number: jax.Array, before: list[jax.Array]) -> list[jax.Array]:
        both = [jnp.concatenate(pair, 1) for pair in zip(before, tile(number), strict=True)]
        value, place = jax.lax.top_k(both[0], k)
        return [value, *(jnp.take_along_axis(x, place, 1) for x in both[1:])]

    found = tile(0)
    if count > 1:
        missing = k - found[0].shape[1]
        start = [
            jnp.pad(x, ((0, 0), (0, missing)), constant_values=v)
            for x, v in zip(found, (-jnp.inf, 0, 0, 0), strict=False)
        ]
        found = jax.lax.fori_loop(1, count, merge, start)
    value, row, score, *deviation = found
    return row, jnp.where(jnp.isfinite(value), score, -jnp.inf), deviation[0] if deviation else None
