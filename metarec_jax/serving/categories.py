"""Categories: decode the categorical fields of a stock, such as genres, for display and filters."""

from typing import Any

import numpy as np

from metarec_jax.data.schema import STATISTICS
from metarec_jax.data.vocabulary import UNKNOWN
from metarec_jax.inference.stock import Stock

VALUES = 100  # maximum number of listed values per field, most frequent first


class Categories:
    """The categorical and multi-valued fields of a stock by which items can be grouped.

    Hashed fields, whose values are unknown, and fields without a shared value are left out.

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
            first = np.diff(codes, axis=1, prepend=-1) > 0  # count repeated values of an item once
            counts = np.bincount(codes[first], minlength=field.size)
            counts[UNKNOWN] = 0
            if counts.max() > 1:
                self._fields.append((field, vocabulary, table.reshape(len(table), -1), counts))

    def of(self, row: int) -> dict[str, list[str]]:
        """Return the values of one item by field; fields without a value are left out."""
        values = {}
        for field, vocabulary, table, _ in self._fields:
            codes = [code for code in dict.fromkeys(table[row].tolist()) if code != UNKNOWN]
            if codes:
                values[field.name] = vocabulary.decode(np.array(codes)).tolist()
        return values

    def fields(self) -> list[dict[str, Any]]:
        """Return the fields with their values and item counts, most frequent first.

        At most `VALUES` values are listed; `distinct` counts all.
        """
        listed = []
        for field, vocabulary, _, counts in self._fields:
            order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
            names = vocabulary.decode(order[:VALUES]).tolist()
            values = [{"value": name, "items": int(counts[code])} for name, code in zip(names, order, strict=False)]
            listed.append({"name": field.name, "kind": field.kind, "distinct": len(order), "values": values})
        return listed
