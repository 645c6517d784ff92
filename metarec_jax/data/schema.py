"""Schema: the names of the features that models read.

A feature is `ITEM_ID`, `ORDER`, or a field's name after the prefix of the side that it describes.
"""

from collections.abc import Mapping
from typing import Any

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field

ITEM_ID = "item_id"  # row in the catalogue
ORDER = "order"  # number of the user's earlier interactions
ITEM, USER, CONTEXT = "item/", "user/", "context/"  # prefixes of the fields
STATISTICS = "training statistics"  # the item field of `metarec_jax.tasks.ItemStatistics`


def prefixed(prefix: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays by field name as features: each name after `prefix`."""
    return {prefix + name: table for name, table in tables.items()}


def fields_of(data: Dataset) -> dict[str, Field]:
    """Return the fields of a dataset's task batches, by the names of `metarec_jax.tasks.features`.

    Example:
      >>> fields = mr.models.fields_of(mr.data.synthetic(users=30, items=40))
      >>> {name: (field.kind, field.size) for name, field in fields.items()}  # 4 genres and an unknown one
      {'item_id': ('categorical', 41), 'item/genre': ('categorical', 5)}
    """
    item_id = Field(ITEM_ID, "categorical", len(data.items), 1, data.items)
    items = {ITEM + f.name: f for f in data.item_fields}
    users = {USER + f.name: f for f in data.user_fields}
    contexts = {CONTEXT + f.name: f for f in data.context_fields}
    return {ITEM_ID: item_id} | items | users | contexts
