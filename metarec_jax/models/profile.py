"""Profile: a task's own attributes as one vector, and the look-up of a field that all networks share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import NUMBERS, Field
from metarec_jax.models.model import Encoder
from metarec_jax.types import Examples, History, Params

ByField = Mapping[str, Any]  # features as `metarec_jax.tasks.features` makes them
PREFIX = "user/"  # of the fields that belong to the task, not to one of its examples


class Blend(NamedTuple):
    """A field's values of which models see a share only, between nothing (unknown, 0) and all (1); see `explain`.

    Attributes:
      value: as without a blend.
      share: `[...]`, one number an example.
    """

    value: jax.Array
    share: jax.Array


class Profile(nnx.Module):
    """The user fields' embeddings, one after the other."""

    def __init__(self, fields: Mapping[str, Field], width: int, rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        self.tables = nnx.Dict({name: table(field, width, rngs) for name, field in fields.items()})

    def __call__(self, features: ByField) -> jax.Array:
        return jnp.concatenate([*vectors(self.tables, features, self.fields).values()], -1)


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
        width=width * slots(own),
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
    """The layer that embeds one field in `width` numbers; of a multimodal field, one more is the gate's."""
    if field.kind == "multimodal":  # without a bias: a missing vector is all zeros, one that is there ends in a 1
        kernel = nnx.initializers.normal(scale)
        return nnx.Linear(field.width, width + 1, use_bias=False, kernel_init=kernel, rngs=rngs)
    if field.kind == "dense":
        return nnx.Linear(field.width, width, kernel_init=nnx.initializers.normal(scale), rngs=rngs)
    return nnx.Embed(field.size, width, embedding_init=nnx.initializers.normal(scale), rngs=rngs)


def bias(field: Field, rngs: nnx.Rngs) -> nnx.Module:
    """The layer that gives one field's bias, 0 at first; of a multimodal field, its gate too."""
    if field.kind in NUMBERS:
        size = 1 + (field.kind == "multimodal")
        return nnx.Linear(field.width, size, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)
    return nnx.Embed(field.size, 1, embedding_init=nnx.initializers.zeros, rngs=rngs)


def look_up(layer: Callable[[jax.Array], jax.Array], x: jax.Array | Blend, kind: str) -> jax.Array:
    """`[..., width]` of one field; several values give the mean of their rows, none gives zeros."""
    if isinstance(x, Blend):
        nothing, everything = (look_up(layer, value, kind) for value in (jnp.zeros_like(x.value), x.value))
        return nothing + x.share[..., None] * (everything - nothing)
    if kind != "multi":
        return layer(x)
    present = (x > 0)[..., None]
    return jnp.where(present, layer(x), 0.0).sum(-2) / jnp.maximum(present.sum(-2), 1)


def vectors(layers: Mapping[str, Any], features: ByField, kinds: Mapping[str, str]) -> dict[str, jax.Array]:
    """`[..., width]` of each field, which `layers` look up; the multimodal fields of one side are one vector.

        v = sum_m g_m P_m x_m,  g = softmax over the modalities m that are there of a_m . x_m

    x_m ends in a 1 (see `Field`), so that a_m . x_m holds a bias: how far a modality is to be trusted whatever it says.
    With all of them missing v is 0.

    References:
      Arevalo et al., Gated Multimodal Units for Information Fusion, ICLR 2017 workshop, section 3; the softmax over
      those present is ours.
    """
    members: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        members.setdefault(_slot(name, kind), []).append(name)
    found = {}
    for slot, names in members.items():
        values = [look_up(layers[name], features[name], kinds[name]) for name in names]
        mix = kinds[names[0]] == "multimodal"
        found[slot] = _mixed(values, [_present(features[name]) for name in names]) if mix else values[0]
    return found


def slots(fields: Mapping[str, Field]) -> int:
    """How many vectors `vectors` makes of these fields."""
    return len({_slot(name, field.kind) for name, field in fields.items()})


def _slot(name: str, kind: str) -> str:
    return f"{name.partition('/')[0]}/*" if kind == "multimodal" else name


def _present(x: jax.Array | Blend) -> jax.Array:
    return (x.value if isinstance(x, Blend) else x)[..., -1] > 0


def _mixed(projected: list[jax.Array], present: list[jax.Array]) -> jax.Array:
    values, there = jnp.stack(projected, -2), jnp.stack(present, -1)
    gate = jax.nn.softmax(jnp.where(there, values[..., -1], -1e9), -1)
    return (jnp.where(there, gate, 0.0)[..., None] * values[..., :-1]).sum(-2)


def sum_of_biases(layers: Mapping[str, Any], features: ByField, kinds: Mapping[str, str]) -> jax.Array:
    """`[..., 1]` sum of the fields' biases, which `layers` look up."""
    return sum(vectors(layers, features, kinds).values(), start=jnp.zeros(()))


def need_item_fields(fields: Mapping[str, Field]) -> None:
    """Raises a ValueError where nothing is known of the items."""
    if all(name.startswith(PREFIX) for name in fields):
        raise ValueError(
            f"need a field of the items, one that is not the user's (as item_id; names of the user's start with "
            f"{PREFIX!r}); got {[*fields]}"
        )
