"""Models that read what the user did before, in time order; the recurrent one. The others: `attention`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.models.mlp import EmbeddingMLP
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import PREFIX, need_item_fields, profile, slots, vectors
from metarec_jax.tasks import Features, History

Encode = Callable[[jax.Array, jax.Array], jax.Array]


class SequenceModel(EmbeddingMLP):
    """score = sum of field biases + head([MLP([field embeddings]), state, state * item]).

    An encoder turns the user's interactions, sorted by `features["order"]` (by their place where it is absent), into
    states: `states[t]` has read the first t of them. An interaction of the past is scored with the state before it,
    every other example with the last one. A token is the item's embedding bent by its target y:

        token = (W e) * (1 + a y + a_0) + b y + b_0

    Features that are no `History` are those of a user without a past.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        width: int,
        hidden: Sequence[int],
        encoder: Callable[[nnx.Rngs], Encode],
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(fields, width, hidden, rngs)
        items = {name: field for name, field in fields.items() if not name.startswith(PREFIX)}
        self.of_items = nnx.static({name: field.kind for name, field in items.items()})
        inputs, deep = width * slots(items), self.head.in_features
        self.token = nnx.Linear(inputs, width, rngs=rngs)
        self.token_target = nnx.Linear(1, 2 * width, rngs=rngs)
        self.encoder = encoder(rngs)
        self.item = nnx.Linear(inputs, width, rngs=rngs)
        self.head = nnx.Linear(deep + 2 * width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def embed(self, features: Features) -> jax.Array:
        """Input of the head `[..., width]`."""
        if not isinstance(features, History):
            deep = super().embed(features)
            start = self.encoder(jnp.zeros((0, self.token.out_features)), jnp.zeros(0, jnp.int32))[0]
            return self.joined(deep, jnp.broadcast_to(start, (*deep.shape[:-1], *start.shape)), features)
        if features.past.mask.ndim > 1:  # [users, examples]
            return jax.vmap(self.embed)(features)
        return self.joined(super().embed(features.now), self.states(features), features.now)

    def __call__(self, features: Features) -> jax.Array:
        """Scores `[...]` of features whose arrays are `[...]` or `[..., values]`."""
        now = features.now if isinstance(features, History) else features
        return (self.head(self.embed(features)) + self.bias(now))[..., 0]

    def joined(self, deep: jax.Array, state: jax.Array, now: Features) -> jax.Array:
        """What the head reads, `[..., deep + 2 width]`."""
        return jnp.concatenate([deep, state, state * self.item(self.items(now))], -1)

    def items(self, features: Features) -> jax.Array:
        """The embeddings of the item fields, one after the other."""
        return jnp.concatenate([*vectors(self.embedding, features, self.of_items).values()], -1)

    def states(self, features: History) -> jax.Array:
        """`[examples, width]` of one user: what the encoder knew before each example."""
        past, keep = features.past, features.past.mask > 0
        order = past.features.get("order", jnp.arange(len(keep), dtype=jnp.int32))
        by_time = jnp.lexsort((order, ~keep))  # padding last: what causality hides from the others needs no mask
        read = jnp.append(jnp.argsort(by_time), keep.sum())[features.own]  # -1, not in the past, reads all of it

        def arranged(x: jax.Array) -> jax.Array:
            return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)[by_time]

        target = self.token_target(arranged(past.target)[:, None])
        scale, shift = jnp.split(target, 2, -1)
        tokens = self.token(self.items(jax.tree.map(arranged, past.features))) * (1 + scale) + shift
        return self.encoder(tokens, arranged(order))[read]


class GRU(nnx.Module):
    """Gated recurrent units over the tokens, from a state of zeros."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs) -> None:
        self.cells = nnx.List([nnx.GRUCell(width, width, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array, order: jax.Array) -> jax.Array:
        """States `[examples + 1, width]` of tokens `[examples, width]`."""
        for cell in self.cells:
            _, x = jax.lax.scan(cell, jnp.zeros(x.shape[-1], x.dtype), x)
        return jnp.concatenate([jnp.zeros_like(x, shape=(1, x.shape[-1])), x])


def gru(fields: Mapping[str, Field], *, width: int = 16, hidden: Sequence[int] = (), layers: int = 1) -> Model:
    """Recurrent recommender (GRU4Rec) whose state before an interaction scores it; reads `History` features.

        h_t = GRU(h_{t-1}, token_t)

    Its weights act inside a loop over time, where no engine can keep them factored: `maml` and `melu` hold them for
    each user, at the price of memory, and say so in a `PlainFormWarning`.

    Args:
      fields: what a batch's features hold, by name.
      width: of each field's embedding and of the state.
      hidden: widths of the hidden layers over the fields' embeddings.
      layers: recurrent layers.

    References:
      Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016.
    """
    if layers < 1:
        raise ValueError(f"layers must be 1 or more, got {layers}")
    return sequence_model(fields, width, hidden, lambda rngs: GRU(width, layers, rngs))


def sequence_model(
    fields: Mapping[str, Field], width: int, hidden: Sequence[int], encoder: Callable[[nnx.Rngs], Encode]
) -> Model:
    """The `Model` of a `SequenceModel`, with this encoder of tokens `[examples, width]` and their order `[examples]`.

    Raises:
      ValueError: there is no field of the items, of which a history is made.
    """
    need_item_fields(fields)
    return from_nnx(
        lambda rngs: SequenceModel(fields, width, hidden, encoder, rngs), profile(fields, width), history=True
    )
