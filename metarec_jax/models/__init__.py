"""Networks as pure functions, made from a dataset's fields with flax NNX."""

from collections.abc import Callable

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.models.mlp import linear, mlp
from metarec_jax.models.model import Encoder, Model, from_nnx

MODELS: dict[str, Callable[..., Model]] = {"linear": linear, "mlp": mlp}

__all__ = ["MODELS", "Encoder", "Model", "fields_of", "from_nnx", "linear", "mlp"]


def fields_of(data: Dataset) -> dict[str, Field]:
    """The fields of a dataset's task batches, by the names that `metarec_jax.data.features` gives them."""
    item_id = Field("item_id", "categorical", len(data.items), 1)
    items = {f"item/{f.name}": f for f in data.item_fields}
    users = {f"user/{f.name}": f for f in data.user_fields}
    return {"item_id": item_id} | items | users
