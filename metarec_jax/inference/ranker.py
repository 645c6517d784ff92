"""Ranker: exact top-k of the whole stock for each user, in bounded memory, with the item side computed once."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core.staged import Staged, staged
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import ITEM, ITEM_ID, prefixed
from metarec_jax.errors import OptionError
from metarec_jax.inference.stock import Stock
from metarec_jax.strategies import Strategy
from metarec_jax.strategies.catalogue import adapt, features, last, score, score_one
from metarec_jax.tasks.ranking import LONGEST, Known
from metarec_jax.types import Params

USERS = 256  # maximum number of users ranked at once
BATCHES = (1, 8, 64, USERS)  # compiled batch sizes
HISTORIES = (32, 128, LONGEST)  # compiled history lengths
BYTES = 1 << 26  # limit of the largest array when a tile of items is scored for `USERS` users
STEP = 256  # tile lengths are multiples of this
GROUP = 64  # items per group in `top_k`
Explore = Literal["ucb", "thompson"]


class Ranked(NamedTuple):
    """The best items of each user, best first.

    Attributes:
      rows: `[users, k]` rows of the stock.
      scores: `[users, k]`; -inf where fewer than k items are left.
      deviations: `[users, k]` standard deviations of the scores, or None.
    """

    rows: np.ndarray
    scores: np.ndarray
    deviations: np.ndarray | None


class Ranker:
    """Adapts to users and ranks a stock for them; caches what the network computes of the items alone.

    A strategy may define this item side itself (`Strategy.items`). Otherwise it is read from the jaxpr of `predict`
    (`metarec_jax.core.staged`): for a factorisation everything but one product per user, for an MLP over joined fields
    only the look-ups. Compiled programs depend on the strategy and on shapes, so rankers of the same strategy share
    them. Tables have spare capacity, so that new items change no shape until it is used up.
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
        self.params: Params = jax.device_put(params)  # else numpy arrays of a loaded model are copied in each call
        tables = {ITEM_ID: stock.code} | prefixed(ITEM, stock.features)
        room = capacity(len(stock)) - len(stock)
        self.tables: dict[str, jax.Array] = jax.device_put(
            {name: np.pad(table, [(0, room)] + [(0, 0)] * (table.ndim - 1)) for name, table in tables.items()}
        )
        self._sides: dict[Any, _ItemSide] = {}

    def adapt(self, known: Known) -> Any:
        """Adapt to each user; return a pytree of arrays `[users, ...]`."""
        return _adapt(self.strategy, self.params, self.tables, known)

    def scores(self, adapted: Any, known: Known, rows: np.ndarray) -> jax.Array:
        """Score the items in `rows` `[users, n]`; return `[users, n]`."""
        return _score(self.strategy, self.params, self.tables, adapted, known, rows, False)[0]

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
        seeds: np.ndarray | None = None,
        approximate: bool = False,
    ) -> Ranked:
        """Find the `k` best items of each user.

        Args:
          known: the users.
          k: number of items, at most the size of the stock.
          seen: `[users, n]` rows to exclude; -1 is padding.
          allowed: `[groups, rows]` masks of items that may be recommended.
          group: `[users]` index of each user's mask (default: the first).
          deviation: return the standard deviations too.
          explore: "ucb" ranks by score + strength * deviation, "thompson" by scores of adapted values drawn from each
            user's posterior (`Strategy.sample`).
          strength: exploration strength.
          seeds: `[users]` uint32 seeds of the draws (default: zeros).
          approximate: use `jax.lax.approx_max_k`, which on an accelerator may miss one item in twenty.

        Raises:
          OptionError: the strategy has no deviation, or no posterior to draw from.
        """
        if (deviation or explore == "ucb") and self.strategy.deviation is None:
            raise OptionError("this strategy does not know the deviation of its scores; use one that does, as `alpaca`")
        users, adapted = len(known.items), self.adapt(known)
        if explore == "thompson":
            if self.strategy.sample is None:
                raise OptionError("this strategy has no posterior to draw from; use one that has, as `alpaca`")
            seeds = np.zeros(users, np.uint32) if seeds is None else seeds
            drawn = _sample(self.strategy, self.params, adapted, seeds, float(strength))
            ranked = self._top(drawn, known, k, False, 0.0, seen, allowed, group, approximate)
            scores, deviations = _score(self.strategy, self.params, self.tables, adapted, known, ranked.rows, deviation)
            scores = np.where(np.isfinite(ranked.scores), scores, -np.inf)
            return Ranked(ranked.rows, scores, None if deviations is None else np.asarray(deviations))
        spread = float(strength) if explore == "ucb" else 0.0
        return self._top(adapted, known, k, deviation or explore == "ucb", spread, seen, allowed, group, approximate)

    def _top(
        self,
        adapted: Any,
        known: Known,
        k: int,
        deviation: bool,
        spread: float,
        seen: np.ndarray | None,
        allowed: np.ndarray | None,
        group: np.ndarray | None,
        approximate: bool,
    ) -> Ranked:
        """Find the best items by score + spread * deviation."""
        users, user = len(known.items), (adapted, known.user, known.context, last(known))
        side = self._side(adapted, known, deviation)
        seen = np.full((users, 1), -1, np.int32) if seen is None else seen
        if allowed is not None:
            allowed = np.pad(allowed, ((0, 0), (0, side.rows - allowed.shape[1])))
        group = np.zeros(users, np.int32) if group is None else group
        rows, scores, deviations = side.programs.top(
            min(k, side.rows), approximate, side.fixed, side.tiles, len(self.stock), user, seen, allowed,
            group, spread,
        )  # fmt: skip
        return Ranked(np.asarray(rows), np.asarray(scores), None if deviations is None else np.asarray(deviations))

    def vectors(self) -> np.ndarray:
        """Return item vectors `[rows, width]`: all values that scoring reads and that depend on the item alone."""
        known = Known.blank(1, HISTORIES[0], *self.fields)
        return self._side(self.adapt(known), known, False).by_row(len(self.stock))

    def extended(self, stock: Stock) -> "Ranker":
        """Return the ranker of a stock with more items; only tiles with new items are recomputed."""
        other = Ranker(self.strategy, self.params, stock, *self.fields)
        if len(other.tables[ITEM_ID]) == len(self.tables[ITEM_ID]):  # else shapes changed
            first = len(self.stock)
            other._sides = {key: side.updated(self.params, other.tables, first) for key, side in self._sides.items()}
        return other

    def _side(self, adapted: Any, known: Known, deviation: bool) -> "_ItemSide":
        user = _spec(jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)),
                                  (adapted, known.user, known.context)))  # fmt: skip
        if (user, deviation) not in self._sides:
            programs = _programs(self.strategy, deviation, _spec(self.params), _spec(self.tables), user)
            self._sides[user, deviation] = _ItemSide.of(programs, self.params, self.tables)
        return self._sides[user, deviation]


def capacity(rows: int) -> int:
    """Return the number of table rows allocated for `rows` items: at least `STEP`, at most an eighth more."""
    step = max(STEP, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // step) * step


@partial(jax.jit, static_argnums=0)
def _adapt(strategy: Strategy, params: Params, tables: dict[str, jax.Array], known: Known) -> Any:
    return adapt(strategy, params, tables, known)


@partial(jax.jit, static_argnums=0)
def _sample(strategy: Strategy, params: Params, adapted: Any, seeds: jax.Array, strength: jax.Array) -> Any:
    assert strategy.sample is not None
    return strategy.sample(params, adapted, jax.vmap(jax.random.key)(seeds), strength)


@partial(jax.jit, static_argnums=(0, 6))
def _score(
    strategy: Strategy,
    params: Params,
    tables: dict[str, jax.Array],
    adapted: Any,
    known: Known,
    rows: jax.Array,
    deviation: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Return scores `[users, n]` of the items in `rows`, and their deviations."""
    scores = score(strategy, params, tables, adapted, known, rows)
    if not deviation or strategy.deviation is None:
        return scores, None
    items = {name: table[rows] for name, table in tables.items()}
    read = features(items, known.user, known.context, last(known)[:, None])
    return scores, strategy.deviation(params, adapted, read)


class _Spec(NamedTuple):
    """Structure and shapes of a pytree, as a hashable key."""

    structure: Any
    leaves: tuple[Any, ...]

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, [jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])


def _spec(tree: Any) -> _Spec:
    leaves, structure = jax.tree.flatten(tree)
    return _Spec(structure, tuple((tuple(jnp.shape(x)), jnp.result_type(x)) for x in leaves))


class _Programs(NamedTuple):
    """Compiled functions of a strategy and shapes.

    Attributes:
      length: items in a tile.
      total: number of tiles.
      fixed: `fixed(params, tables)`, values that do not depend on items.
      tile: `tile(params, tables, number)`, values of one tile of items.
      top: see `_top`.
    """

    length: int
    total: int
    fixed: Callable[..., list[jax.Array]]
    tile: Callable[..., list[jax.Array]]
    top: Callable[..., Any]


@lru_cache(maxsize=64)
def _programs(strategy: Strategy, deviation: bool, params: _Spec, tables: _Spec, user: _Spec) -> _Programs:
    like: dict[str, Any] = tables.tree
    rows = like[ITEM_ID].shape[0]
    user_specs = (*user.tree, jax.ShapeDtypeStruct((), jnp.int32))  # with the user's position in time

    def stage_of(length: int) -> Staged:
        items = {name: jax.ShapeDtypeStruct((length, *t.shape[1:]), t.dtype) for name, t in like.items()}
        if strategy.items is not None and not deviation:
            return _explicit(strategy, params.tree, items)
        return staged(partial(score_one, strategy, deviation), params.tree, items, user_specs)

    widest = -(-stage_of(STEP).widest // STEP)  # elements per item and user
    longest = max(BYTES // (4 * USERS * widest) // STEP * STEP, STEP)
    length = min(longest, -(-rows // STEP) * STEP)
    stage = stage_of(length)

    def items_of(tables: dict[str, jax.Array], number: Any) -> dict[str, jax.Array]:
        at = number * length + jnp.arange(length)
        return {name: table.at[at].get(mode="clip") for name, table in tables.items()}

    def fixed(params: Params, tables: dict[str, jax.Array]) -> list[jax.Array]:
        return stage.first(params, items_of(tables, 0))[0]

    def tile(params: Params, tables: dict[str, jax.Array], number: Any) -> list[jax.Array]:
        return stage.first(params, items_of(tables, number))[1]

    explicit = strategy.items is not None and not deviation
    return _Programs(
        length,
        -(-rows // length),
        (lambda params, tables: jax.tree.leaves(params)) if explicit else jax.jit(fixed),
        jax.jit(tile),
        jax.jit(partial(_top, stage, length), static_argnums=(0, 1)),
    )


class _ItemSide(NamedTuple):
    """Values computed of the items alone: `fixed`, and `tiles`, each `[tiles, ...]`."""

    programs: _Programs
    fixed: list[jax.Array]
    tiles: list[jax.Array]

    @classmethod
    def of(cls, programs: _Programs, params: Params, tables: dict[str, jax.Array]) -> "_ItemSide":
        tiles = [programs.tile(params, tables, number) for number in range(programs.total)]
        return cls(programs, programs.fixed(params, tables), [jnp.stack(values) for values in zip(*tiles, strict=True)])

    @property
    def rows(self) -> int:
        return self.programs.length * self.programs.total

    def updated(self, params: Params, tables: dict[str, jax.Array], row: int) -> "_ItemSide":
        """Return the item side after the tables changed from `row` on."""
        start = row // self.programs.length
        tiles = [self.programs.tile(params, tables, number) for number in range(start, self.programs.total)]
        new = [jnp.stack(values) for values in zip(*tiles, strict=True)]
        if start:
            new = [jnp.concatenate([old[:start], values]) for old, values in zip(self.tiles, new, strict=True)]
        return self._replace(tiles=new)

    def by_row(self, rows: int) -> np.ndarray:
        """Concatenate the values that have an items axis as `[rows, width]`."""
        columns, length = [], self.programs.length
        for value in map(np.asarray, self.tiles):
            axes = [a for a in (1, 2) if value.ndim > a and value.shape[a] == length]
            if axes and np.issubdtype(value.dtype, np.floating):
                moved = np.moveaxis(value, axes[0], 1)
                columns.append(moved.reshape(moved.shape[0] * length, -1)[:rows])
        return np.concatenate(columns, -1)


def _explicit(strategy: Strategy, params: Params, items: Any) -> Staged:
    """Build the two stages of a strategy that defines its own item side."""
    make, score_side = strategy.items, strategy.score
    assert make is not None
    assert score_side is not None
    of_params = jax.tree.structure(params)
    of_items = jax.tree.structure(jax.eval_shape(make, params, items))

    def first(params: Params, items: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        return jax.tree.leaves(params), jax.tree.leaves(make(params, items))

    def second(fixed: list[jax.Array], values: list[jax.Array], user: Any) -> Any:
        adapted = jax.tree.map(lambda x: x[None], user[0])
        side = jax.tree.unflatten(of_items, values)
        return score_side(jax.tree.unflatten(of_params, fixed), adapted, side)[0], None

    return Staged(first, second, items[ITEM_ID].shape[0])


def top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Compute `jax.lax.top_k` of `[users, n]`, several times faster on a CPU for large n.

    The k largest values lie in the k groups of `GROUP` values with the largest maxima.
    """
    users, n = values.shape
    groups = n // GROUP
    if n % GROUP or groups < 4 * k:
        return jax.lax.top_k(values, k)
    grouped = values.reshape(users, groups, GROUP)
    _, best_groups = jax.lax.top_k(grouped.max(-1), k)
    best_groups = jnp.sort(best_groups, 1)  # ties keep their order
    value, position = jax.lax.top_k(
        jnp.take_along_axis(grouped, best_groups[..., None], 1).reshape(users, k * GROUP), k
    )
    return value, jnp.take_along_axis(best_groups, position // GROUP, 1) * GROUP + position % GROUP


def _top(
    stage: Staged,
    length: int,
    k: int,
    approximate: bool,
    fixed: list[jax.Array],
    tiles: list[jax.Array],
    rows: jax.Array,
    user: Any,
    seen: jax.Array,
    allowed: jax.Array | None,
    group: jax.Array,
    spread: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the top `k` rows `[users, k]`, their scores (-inf for excluded items) and deviations."""
    users, count = len(seen), tiles[0].shape[0]
    best = partial(jax.lax.approx_max_k, recall_target=0.95) if approximate else top_k

    def tile(number: Any) -> list[jax.Array]:
        """Return the best of one tile: ranking value, row, score and deviation, each `[users, k]`."""
        values, first = [t[number] for t in tiles], number * length
        scores, deviations = jax.vmap(lambda u: stage.second(fixed, values, u))(user)
        row = first + jnp.arange(length, dtype=jnp.int32)
        value = scores if deviations is None else scores + spread * deviations
        value = jnp.where((row > 0) & (row < rows) & jnp.isfinite(value), value, -jnp.inf)  # row 0 is the unknown item
        seen_in_tile = jnp.where((seen >= first) & (seen < first + length), seen - first, length)
        value = value.at[jnp.arange(users)[:, None], seen_in_tile].set(-jnp.inf, mode="drop")
        if allowed is not None:
            mask = jax.lax.dynamic_slice_in_dim(allowed, first, length, 1)
            value = jnp.where(mask[group], value, -jnp.inf)
        value, position = best(value, min(k, length))
        others = [scores] if deviations is None else [scores, deviations]
        return [value, first + position, *(jnp.take_along_axis(x, position, 1) for x in others)]

    def merge(number: jax.Array, before: list[jax.Array]) -> list[jax.Array]:
        both = [jnp.concatenate(pair, 1) for pair in zip(before, tile(number), strict=True)]
        value, position = jax.lax.top_k(both[0], k)
        return [value, *(jnp.take_along_axis(x, position, 1) for x in both[1:])]

    result = tile(0)
    if count > 1:
        missing = k - result[0].shape[1]
        start = [
            jnp.pad(x, ((0, 0), (0, missing)), constant_values=v)
            for x, v in zip(result, (-jnp.inf, 0, 0, 0), strict=False)
        ]
        result = jax.lax.fori_loop(1, count, merge, start)
    value, row, score, *deviation = result
    return row, jnp.where(jnp.isfinite(value), score, -jnp.inf), deviation[0] if deviation else None
