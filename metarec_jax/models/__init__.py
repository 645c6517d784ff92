"""Networks as pure functions, made from a dataset's fields with flax NNX."""

from collections.abc import Callable

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.models.attention import hstu, transformer
from metarec_jax.models.design import design
from metarec_jax.models.factorisation import deepfm, fm
from metarec_jax.models.mlp import linear, mlp
from metarec_jax.models.model import Encoder, Model, from_nnx
from metarec_jax.models.pretrained import pretrained
from metarec_jax.models.sequence import gru
from metarec_jax.models.two_tower import two_tower

MODELS: dict[str, Callable[..., Model]] = {
    "linear": linear,
    "mlp": mlp,
    "fm": fm,
    "deepfm": deepfm,
    "two_tower": two_tower,
    "gru": gru,
    "transformer": transformer,
    "hstu": hstu,
    "design": design,
}

__all__ = [
    "MODELS",
    "Encoder",
    "Model",
    "deepfm",
    "design",
    "fields_of",
    "fm",
    "from_nnx",
    "gru",
    "hstu",
    "linear",
    "mlp",
    "pretrained",
    "transformer",
    "two_tower",
]


def fields_of(data: Dataset) -> dict[str, Field]:
    """The fields of a dataset's task batches, by the names that `metarec_jax.data.features` gives them."""
    item_id = Field("item_id", "categorical", len(data.items), 1, data.items)
    items = {f"item/{f.name}": f for f in data.item_fields}
    users = {f"user/{f.name}": f for f in data.user_fields}
    contexts = {f"context/{f.name}": f for f in data.context_fields}
    return {"item_id": item_id} | items | users | contexts
