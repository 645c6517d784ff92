"""Schema: the names of the features that models read."""

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field


def fields_of(data: Dataset) -> dict[str, Field]:
    """Return the fields of a dataset's task batches, by the names of `metarec_jax.tasks.features`."""
    item_id = Field("item_id", "categorical", len(data.items), 1, data.items)
    items = {f"item/{f.name}": f for f in data.item_fields}
    users = {f"user/{f.name}": f for f in data.user_fields}
    contexts = {f"context/{f.name}": f for f in data.context_fields}
    return {"item_id": item_id} | items | users | contexts
