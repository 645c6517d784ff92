"""Categories: what people read of an item beside its title, such as genres, decoded from the fields of a stock."""

from typing import Any

import numpy as np

from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.inference.stock import Stock
from metarec_jax.tasks.statistics import NAME as STATISTICS

VALUES = 100  # of a field that are listed, most frequent first


class Categories:
    """The categorical and multi-valued fields of a stock by which items can be grouped.

    Hashed fields, whose values are unknown, and fields whose values are all different are left out.

    Args:
      stock: the items.
    """

    def __init__(self, stock: Stock) -> None:
        self._fields = []
        for field in stock.fields:
            vocabulary, table = field.vocabulary, stock.features.get(field.name)
            if field.name == STATISTICS or vocabulary is None or vocabulary.buckets is not None or table is None:
                continue
            codes = np.sort(table.reshape(len(table), -1), 1)
            first = np.diff(codes, axis=1, prepend=-1) > 0  # a value that an item has twice counts once
            counts = np.bincount(codes[first], minlength=field.size)
            counts[UNKNOWN] = 0
            if counts.max() > 1:
                self._fields.append((field, vocabulary, table.reshape(len(table), -1), counts))

    def of(self, row: int) -> dict[str, list[str]]:
        """Values of one item by field; fields without a value are left out."""
        found = {}
        for field, vocabulary, table, _ in self._fields:
            codes = [code for code in dict.fromkeys(table[row].tolist()) if code != UNKNOWN]
            if codes:
                found[field.name] = vocabulary.decode(np.array(codes)).tolist()
        return found

    def fields(self) -> list[dict[str, Any]]:
        """Fields with their values and the number of items of each, most frequent first; `distinct` counts all."""
        found = []
        for field, vocabulary, _, counts in self._fields:
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            names = vocabulary.decode(order[:VALUES]).tolist()
            values = [{"value": name, "items": int(counts[code])} for name, code in zip(names, order, strict=False)]
            found.append({"name": field.name, "kind": field.kind, "distinct": len(order), "values": values})
        return found
