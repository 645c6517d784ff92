"""Stock: the items that can be recommended, from training and added later, as rows of arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import STATISTICS
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary, as_ids, is_missing
from metarec_jax.errors import DataError


@dataclass(frozen=True, eq=False)
class Stock:
    """Items as rows: row 0 is the unknown item, then the items of the training, then added items in order.

    Attributes:
      trained: ids of the training items.
      added: ids of added items, in order of addition.
      code: `[rows]` int32 item code in the model; 0 (unknown) for added items, which are known by their attributes.
      features: encoded attributes, each `[rows, ...]`.
      titles: `[rows]`, or None.
      fields: encoders of the attributes.
    """

    trained: Vocabulary
    added: np.ndarray
    code: np.ndarray
    features: dict[str, np.ndarray]
    titles: np.ndarray | None
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, data: Dataset) -> "Stock":
        """Build the stock of a dataset's items."""
        code = np.arange(len(data.items), dtype=np.int32)
        return cls(data.items, data.items.ids[:0], code, data.item_features, data.titles, data.item_fields)

    def __len__(self) -> int:
        """Number of rows, including the unknown row."""
        return len(self.code)

    def encode(self, values: Any) -> np.ndarray:
        """Return rows `[n]` int32 of raw ids, 0 where unknown; raise `DataError` for ids of another type."""
        rows = self.trained.encode(values)
        if not len(self.added) or (rows != UNKNOWN).all():
            return rows
        order = np.argsort(self.added)
        ids = as_ids(values, self.trained.name)
        position = np.minimum(np.searchsorted(self.added, ids, sorter=order), len(order) - 1)
        is_added = self.added[order[position]] == ids
        return np.where((rows == UNKNOWN) & is_added, len(self.trained) + order[position], rows).astype(np.int32)

    def decode(self, rows: ArrayLike) -> np.ndarray:
        """Return raw ids of `rows`, none of which may be 0."""
        rows = np.asarray(rows)
        if not len(self.added):
            return self.trained.decode(rows)
        if np.any(rows == UNKNOWN):
            raise DataError(f"{self.trained.name}: row 0 stands for unknown and has no id")
        return np.concatenate([self.trained.ids, self.added])[rows - 1]

    def add(self, items: Mapping[str, Sequence[Any]]) -> "Stock":
        """Return a stock with additional items.

        Args:
          items: columns: `item_id`, and any of the item fields and `title`. Values of omitted fields are unknown.

        Raises:
          DataError: no `item_id`; an existing or repeated id; an unknown column; columns of different lengths; a value
            that its field does not accept.
        """
        columns = {name: list(values) for name, values in items.items()}
        if "item_id" not in columns:
            raise DataError(f"new items need a column 'item_id'; got {', '.join(columns) or 'none'}")
        known = {f.name: f for f in self.fields if f.name != STATISTICS}
        if unknown := columns.keys() - known.keys() - {"item_id", "title"}:
            raise DataError(
                f"column {sorted(unknown)[0]!r} is no item field of the model; it knows: {', '.join(known) or 'none'}"
            )
        ids = as_ids(columns["item_id"], "item_id")
        for name, values in columns.items():
            if len(values) != len(ids):
                raise DataError(f"column {name!r} has {len(values)} values, item_id {len(ids)}")
        if not len(ids):
            return self
        if (exists := self.encode(ids) != UNKNOWN).any():
            raise DataError(
                f"item_id: row {int(exists.argmax())} holds {ids[exists.argmax()].item()!r}, which is there already"
            )
        if len(np.unique(ids)) < len(ids):
            row = next(i for i, x in enumerate(ids.tolist()) if x in ids[:i].tolist())
            raise DataError(
                f"item_id: row {row} holds {ids[row].item()!r} for the second time; keep one row of each item"
            )
        features = {
            name: known[name].encode(columns[name]) if name in columns else np.repeat(table[:1], len(ids), axis=0)
            for name, table in self.features.items()
        }
        titles = [None if is_missing(t) else str(t) for t in columns["title"]] if "title" in columns else None
        return self.with_rows(ids, features, titles)

    def with_rows(
        self, ids: np.ndarray, features: Mapping[str, np.ndarray], titles: Sequence[str | None] | None
    ) -> "Stock":
        """Return a stock with additional items whose attributes are already encoded."""
        if self.titles is None and titles is None:
            all_titles = None
        else:
            old_titles = np.full(len(self), None, object) if self.titles is None else self.titles
            all_titles = np.append(old_titles, np.full(len(ids), None, object))
            all_titles[len(self) :] = [None] * len(ids) if titles is None else titles
        return replace(
            self,
            added=np.concatenate([self.added, ids]),
            code=np.append(self.code, np.zeros(len(ids), np.int32)),
            features={name: np.concatenate([table, features[name]]) for name, table in self.features.items()},
            titles=all_titles,
        )

    def allowed(self, where: Mapping[str, Any] | None = None, only: Sequence[Any] | None = None) -> np.ndarray | None:
        """Return a mask `[rows]` of the items that may be recommended; None if all may.

        Args:
          where: by item field. For categories: a value or a collection of values, of which the item must have one. For
            numbers: `(lowest, highest)`, either of which may be None; a missing number counts as the mean, as it does
            for the model.
          only: ids of the available items.

        Raises:
          DataError: an unknown field or category; bounds for categories, or values for numbers.
        """
        if not where and only is None:
            return None
        keep = np.ones(len(self), bool)
        if only is not None:
            keep[:] = False
            keep[self.encode(list(only))] = True
        fields = {f.name: f for f in self.fields if f.name != STATISTICS}
        for name, wanted in (where or {}).items():
            if name not in fields:
                raise DataError(f"where: {name!r} is no item field; the model knows: {', '.join(fields) or 'none'}")
            keep &= _matches(fields[name], self.features[name], wanted)
        keep[UNKNOWN] = False
        return keep


def _matches(field: Field, table: np.ndarray, condition: Any) -> np.ndarray:
    if field.vocabulary is None:
        if field.width != 1 or not isinstance(condition, tuple) or len(condition) != 2:
            raise DataError(f"where: {field.name!r} holds numbers; give bounds (lowest, highest) of a single number")
        low, high = (None if bound is None else field.encode([bound])[0, 0] for bound in condition)
        keep = np.ones(len(table), bool)
        if low is not None:
            keep &= table[:, 0] >= low - 1e-6 * abs(low)
        if high is not None:
            keep &= table[:, 0] <= high + 1e-6 * abs(high)
        return keep
    if isinstance(condition, tuple):
        raise DataError(f"where: {field.name!r} holds categories, not numbers; give a value or a list of values")
    values = list(condition) if isinstance(condition, list | set | frozenset | np.ndarray) else [condition]
    codes = field.vocabulary.encode([str(value) for value in values])
    if (codes == UNKNOWN).any():
        raise DataError(f"where: no item has {field.name} {values[int((codes == UNKNOWN).argmax())]!r}")
    return np.asarray(np.isin(table.reshape(len(table), -1), codes).any(1))
