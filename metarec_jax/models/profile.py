"""User profiles (a task's attributes as one vector), and the field look-up shared by all networks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import NUMBERS, Field
from metarec_jax.data.schema import USER
from metarec_jax.models.model import Encoder
from metarec_jax.types import Examples, Params, current

ByField = Mapping[str, Any]  # features by field name, as built by `metarec_jax.tasks.features`


class Blend(NamedTuple):
    """A partially visible field: its look-up is interpolated between unknown (0) and `value`; see `explain`.

    Attributes:
      value: the field's values.
      share: `[...]` interpolation weight of each example, 0 (unknown) to 1 (`value`).
    """

    value: jax.Array
    share: jax.Array


class Profile(nnx.Module):
    """Concatenated embeddings of the user fields."""

    def __init__(self, fields: Mapping[str, Field], width: int, rngs: nnx.Rngs) -> None:
        self.fields = nnx.static({name: field.kind for name, field in fields.items()})
        self.tables = nnx.Dict({name: table(field, width, rngs) for name, field in fields.items()})

    def __call__(self, features: ByField) -> jax.Array:
        return jnp.concatenate([*vectors(self.tables, features, self.fields).values()], -1)


def profile(fields: Mapping[str, Field], width: int) -> Encoder | None:
    """Build an encoder of the user fields; None if there are none.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of each field's embedding.
    """
    user_fields = {name: field for name, field in fields.items() if name.startswith(USER)}
    if not user_fields:
        return None
    graph, _ = nnx.split(nnx.eval_shape(lambda: Profile(user_fields, width, nnx.Rngs(0))))
    return Encoder(
        init=lambda key: nnx.to_pure_dict(nnx.state(Profile(user_fields, width, nnx.Rngs(key)))),
        apply=lambda params, features: nnx.merge(graph, nnx.State(params))(features),
        width=width * slots(user_fields),
    )


def constant() -> Encoder:
    """Build the encoder of tasks without attributes: the constant 1."""
    return Encoder(lambda key: {}, lambda params, features: jnp.ones((*jax.tree.leaves(features)[0].shape[:2], 1)), 1)


def profile_of(encoder: Encoder, params: Params, support: Examples) -> jax.Array:
    """Compute each user's profile `[users, width]` from the support features.

    User fields are the same in all of a user's examples, so the profile is the mean over unmasked examples. For a user
    without support it is read from the first, padded example: batches fill in the user's attributes there too.
    """
    features = current(support.features)
    values = encoder.apply(params, features)
    first = jnp.arange(support.mask.shape[1]) == 0
    kept = jnp.where(jnp.any(support.mask > 0, axis=1, keepdims=True), support.mask > 0, first)[..., None]
    return jnp.where(kept, values, 0.0).sum(1) / kept.sum(1)


def table(field: Field, width: int, rngs: nnx.Rngs, scale: float = 0.1) -> nnx.Module:
    """Build the layer that embeds one field in `width` numbers, plus a gate logit for a multimodal field."""
    if field.kind == "multimodal":  # no bias: a missing vector is all zeros, a present one ends in a 1
        kernel = nnx.initializers.normal(scale)
        return nnx.Linear(field.width, width + 1, use_bias=False, kernel_init=kernel, rngs=rngs)
    if field.kind == "dense":
        return nnx.Linear(field.width, width, kernel_init=nnx.initializers.normal(scale), rngs=rngs)
    return nnx.Embed(field.size, width, embedding_init=nnx.initializers.normal(scale), rngs=rngs)


def bias(field: Field, rngs: nnx.Rngs) -> nnx.Module:
    """Build the layer of one field's bias, initialised to 0, plus a gate logit for a multimodal field."""
    if field.kind in NUMBERS:
        size = 1 + (field.kind == "multimodal")
        return nnx.Linear(field.width, size, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)
    return nnx.Embed(field.size, 1, embedding_init=nnx.initializers.zeros, rngs=rngs)


def look_up(layer: Callable[[jax.Array], jax.Array], x: jax.Array | Blend, kind: str) -> jax.Array:
    """Look up one field, `[..., width]`: a multi-valued field is the mean of its rows, or zeros without values."""
    if isinstance(x, Blend):
        unknown, known = (look_up(layer, value, kind) for value in (jnp.zeros_like(x.value), x.value))
        return unknown + x.share[..., None] * (known - unknown)
    if kind != "multi":
        return layer(x)
    present = (x > 0)[..., None]
    return jnp.where(present, layer(x), 0.0).sum(-2) / jnp.maximum(present.sum(-2), 1)


def vectors(layers: Mapping[str, Any], features: ByField, kinds: Mapping[str, str]) -> dict[str, jax.Array]:
    """Look up each field with its layer, `[..., width]`; all multimodal fields of a side are fused to one vector.

        v = sum_m g_m P_m x_m,  g = softmax over the present modalities m of a_m . x_m

    x_m ends in a 1 (see `Field`), so a_m . x_m includes a bias: the prior trust in a modality. If all modalities are
    missing, v is 0.

    References:
      Arevalo et al., Gated Multimodal Units for Information Fusion, ICLR 2017 workshop, section 3; the softmax over
      those present is ours.
    """
    members: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        members.setdefault(_slot(name, kind), []).append(name)
    by_slot = {}
    for slot, names in members.items():
        values = [look_up(layers[name], features[name], kinds[name]) for name in names]
        mix = kinds[names[0]] == "multimodal"
        by_slot[slot] = _mixed(values, [_present(features[name]) for name in names]) if mix else values[0]
    return by_slot


def slots(fields: Mapping[str, Field]) -> int:
    """Return how many vectors `vectors` returns for these fields."""
    return len({_slot(name, field.kind) for name, field in fields.items()})


def _slot(name: str, kind: str) -> str:
    return f"{name.partition('/')[0]}/*" if kind == "multimodal" else name


def _present(x: jax.Array | Blend) -> jax.Array:
    return (x.value if isinstance(x, Blend) else x)[..., -1] > 0


def _mixed(projected: list[jax.Array], present: list[jax.Array]) -> jax.Array:
    """Fuse modalities by a softmax over their gate logits, the last column of `projected`."""
    values, mask = jnp.stack(projected, -2), jnp.stack(present, -1)
    gate = jax.nn.softmax(jnp.where(mask, values[..., -1], -1e9), -1)
    return (jnp.where(mask, gate, 0.0)[..., None] * values[..., :-1]).sum(-2)


def sum_of_biases(layers: Mapping[str, Any], features: ByField, kinds: Mapping[str, str]) -> jax.Array:
    """Look up the fields' biases with `layers` and sum them, `[..., 1]`."""
    return sum(vectors(layers, features, kinds).values(), start=jnp.zeros(()))


def need_item_fields(fields: Mapping[str, Field]) -> None:
    """Raise a ValueError if no field describes the items."""
    if all(name.startswith(USER) for name in fields):
        raise ValueError(
            f"need a field of the items that is not the user's, such as item_id (user fields start with {USER!r}); "
            f"got {[*fields]}"
        )
