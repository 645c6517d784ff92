"""Networks as pure functions, built from the fields of a dataset with flax NNX."""

from collections.abc import Callable

from metarec_jax.data.schema import fields_of
from metarec_jax.models.attention import hstu, transformer
from metarec_jax.models.dense import linear, mlp
from metarec_jax.models.design_matrix import design
from metarec_jax.models.embeddings import pretrained
from metarec_jax.models.factorisation import deepfm, fm
from metarec_jax.models.model import Encoder, Model, from_nnx
from metarec_jax.models.sequence import gru
from metarec_jax.models.towers import two_tower

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
