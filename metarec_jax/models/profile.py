"""Profile: a task's own attributes as one vector, and the look-up of a field that all networks share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.models.model import Encoder
from metarec_jax.tasks import Examples, History, Params

ByField = Mapping[str, jax.Array]  # features as `metarec_jax.data.features` makes them
PREFIX = "user/"  # of the fields that belong to the task, not to one of its examples


class Profile(nnx.Module):
    """The user fields' embeddings, one after the other."""

    def __init__(self, fields: Mapping[str, Field], width: int, rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        self.tables = nnx.Dict({name: table(field, width, rngs) for name, field in fields.items()})

    def __call__(self, features: ByField) -> jax.Array:
        parts = [look_up(self.tables[name], features[name], kind) for name, kind in self.fields.items()]
        return jnp.concatenate(parts, -1)


def profile(fields: Mapping[str, Field], width: int) -> Encoder | None:
    """Reads the fields of `fields` that are the user's; None where there are none.

    Args:
      fields: what a batch's features hold, by name.
      width: of each field's embedding.
    """
    own = {name: field for name, field in fields.items() if name.startswith(PREFIX)}
    if not own:
        return None
    graph, _ = nnx.split(nnx.eval_shape(lambda: Profile(own, width, nnx.Rngs(0))))
    return Encoder(
        init=lambda key: nnx.to_pure_dict(nnx.state(Profile(own, width, nnx.Rngs(key)))),
        apply=lambda params, features: nnx.merge(graph, nnx.State(params))(features),
        width=width * len(own),
    )


def constant() -> Encoder:
    """The profile of tasks about which nothing is known: the number 1."""
    return Encoder(lambda key: {}, lambda params, features: jnp.ones((*jax.tree.leaves(features)[0].shape[:2], 1)), 1)


def profile_of(encoder: Encoder, params: Params, support: Examples) -> jax.Array:
    """`[users, width]` profile of each user, read from the support's features, where it is the same in every example.

    The mean over real examples; of a user without any, what the first place holds (batches fill in a user's own
    attributes there too).
    """
    features = support.features.now if isinstance(support.features, History) else support.features
    values = encoder.apply(params, features)
    first = jnp.arange(support.mask.shape[1]) == 0
    kept = jnp.where(jnp.any(support.mask > 0, axis=1, keepdims=True), support.mask > 0, first)[..., None]
    return jnp.where(kept, values, 0.0).sum(1) / kept.sum(1)


def table(field: Field, width: int, rngs: nnx.Rngs, scale: float = 0.1) -> nnx.Module:
    """The layer that embeds one field in `width` numbers."""
    if field.kind == "dense":
        return nnx.Linear(field.width, width, kernel_init=nnx.initializers.normal(scale), rngs=rngs)
    return nnx.Embed(field.size, width, embedding_init=nnx.initializers.normal(scale), rngs=rngs)


def bias(field: Field, rngs: nnx.Rngs) -> nnx.Module:
    """The layer that gives one field's bias, 0 at first."""
    if field.kind == "dense":
        return nnx.Linear(field.width, 1, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)
    return nnx.Embed(field.size, 1, embedding_init=nnx.initializers.zeros, rngs=rngs)


def look_up(layer: Callable[[jax.Array], jax.Array], x: jax.Array, kind: str) -> jax.Array:
    """`[..., width]` of one field; several values give the mean of their rows, none gives zeros."""
    if kind != "multi":
        return layer(x)
    present = (x > 0)[..., None]
    return jnp.where(present, layer(x), 0.0).sum(-2) / jnp.maximum(present.sum(-2), 1)


def sum_of_biases(layers: Mapping[str, Any], features: ByField, kinds: Mapping[str, str]) -> jax.Array:
    """`[..., 1]` sum of the fields' biases, which `layers` look up."""
    return sum((look_up(layers[f], features[f], kind) for f, kind in kinds.items()), start=jnp.zeros(()))


def need_item_fields(fields: Mapping[str, Field]) -> None:
    """Raises a ValueError where nothing is known of the items."""
    if all(name.startswith(PREFIX) for name in fields):
        raise ValueError(
            f"need a field of the items, one that is not the user's (as item_id; names of the user's start with "
            f"{PREFIX!r}); got {[*fields]}"
        )
