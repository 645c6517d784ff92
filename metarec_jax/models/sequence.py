"""Sequence models that read the user's past interactions in time order, and GRU. See also `attention`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.data.schema import CONTEXT, ORDER, USER
from metarec_jax.models.dense import EmbeddingMLP
from metarec_jax.models.model import Model, from_nnx
from metarec_jax.models.profile import bias, need_item_fields, profile, slots, sum_of_biases, table, vectors
from metarec_jax.types import Examples, Features, History, current

Encode = Callable[..., jax.Array]  # (tokens `[examples, width]`, order, `nnx.Rngs`) -> states `[examples + 1, width]`


class SequenceModel(EmbeddingMLP):
    """Sequence model: score = sum of field biases + head([MLP([field embeddings]), state, state * item]).

    An encoder maps the user's interactions, sorted by `features["order"]` (default: their position), to states:
    `states[t]` has read the first t. A past interaction is scored with the state before it, any other example with the
    last state. A token is the item embedding e, scaled and shifted by its target y:

        token = (W e) * (1 + a y + a_0) + b y + b_0

    Features that are not a `History` belong to a user without a past.
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
        items = {name: field for name, field in fields.items() if not name.startswith(USER)}
        self.of_items = nnx.static({name: field.kind for name, field in items.items()})
        inputs, deep = width * slots(items), self.head.in_features
        self.token = nnx.Linear(inputs, width, rngs=rngs)
        self.token_target = nnx.Linear(1, 2 * width, rngs=rngs)
        self.encoder = encoder(rngs)
        self.item = nnx.Linear(inputs, width, rngs=rngs)
        self.head = nnx.Linear(deep + 2 * width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def embed(self, features: Features) -> jax.Array:
        """Compute the input of the head, `[..., width]`."""
        if not isinstance(features, History):
            deep = super().embed(features)
            start = self.encoder(jnp.zeros((0, self.token.out_features)), jnp.zeros(0, jnp.int32))[0]
            return self.joined(deep, jnp.broadcast_to(start, (*deep.shape[:-1], *start.shape)), features)
        if features.past.mask.ndim > 1:  # [users, examples]
            return jax.vmap(self.embed)(features)
        return self.joined(super().embed(features.now), self.states(features), features.now)

    def __call__(self, features: Features) -> jax.Array:
        """Compute scores `[...]` from features `[...]` or `[..., values]`."""
        return (self.head(self.embed(features)) + self.bias(current(features)))[..., 0]

    def joined(self, deep: jax.Array, state: jax.Array, now: Features) -> jax.Array:
        """Join the MLP's output and the state to the head's input, `[..., deep + 2 width]`."""
        return jnp.concatenate([deep, state, state * self.item(self.items(now))], -1)

    def items(self, features: Features) -> jax.Array:
        """Concatenate the embeddings of the item fields."""
        return jnp.concatenate([*vectors(self.embedding, features, self.of_items).values()], -1)

    def states(self, features: History) -> jax.Array:
        """Compute one user's state before each example, `[examples, width]`."""
        past, places = in_time(features.past)
        scale, shift = jnp.split(self.token_target(past.target[:, None]), 2, -1)
        tokens = self.token(self.items(past.features)) * (1 + scale) + shift
        return self.encoder(tokens, past.features[ORDER])[places[features.own]]


class TiedSequenceModel(nnx.Module):
    """Sequence model with tied weights: score = sum_k h_k state_k e_k(x) + b(x), with e also the input embedding.

    e and b are sums over the item fields. User and context fields are left out: they would add the same number to all
    items. A token is scaled and shifted by its target y. Initially a, a_0, b and b_0 are 0 and h is 1:

        token = sqrt(width) e * (1 + a y + a_0) + b y + b_0
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        width: int,
        encoder: Callable[[nnx.Rngs], Encode],
        dropout: float,
        rngs: nnx.Rngs,
    ) -> None:
        items = {name: field for name, field in fields.items() if not name.startswith((USER, CONTEXT))}
        self.fields = nnx.static({name: field.kind for name, field in items.items()})
        self.embedding = nnx.Dict({name: table(field, width, rngs) for name, field in items.items()})
        self.embedding_bias = nnx.Dict({name: bias(field, rngs) for name, field in items.items()})
        self.token_target = nnx.Linear(1, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.encoder = encoder(rngs)
        self.head = nnx.Linear(width, 1, use_bias=False, kernel_init=nnx.initializers.ones, rngs=rngs)

    def embed(self, features: Features) -> jax.Array:
        """Compute the input of the head, `[..., width]`."""
        if not isinstance(features, History):
            return self.encoder(jnp.zeros((0, self.head.in_features)), jnp.zeros(0, jnp.int32))[0] * self.item(features)
        if features.past.mask.ndim > 1:  # [users, examples]
            return jax.vmap(self.embed)(features)
        past, places = in_time(features.past)
        return self.read(past, None)[places[features.own]] * self.item(features.now)

    def __call__(self, features: Features) -> jax.Array:
        """Compute scores `[...]` from features `[...]` or `[..., values]`."""
        biases = sum_of_biases(self.embedding_bias, current(features), self.fields)
        return (self.head(self.embed(features)) + biases)[..., 0]

    def states(self, past: Examples, key: jax.Array | None) -> jax.Array:
        """Compute states `[users, examples + 1, width + 1]`: entry t has read the first t examples.

        The last column is 1, to multiply the item bias.
        """

        def one(past: Examples, key: jax.Array | None) -> jax.Array:
            states = self.read(in_time(past)[0], None if key is None else nnx.Rngs(dropout=key))
            return jnp.concatenate([states, jnp.ones_like(states[:, :1])], -1)

        if key is None:
            return jax.vmap(lambda past: one(past, None))(past)
        return jax.vmap(one)(past, jax.random.split(key, len(past.mask)))

    def vectors(self, features: Features) -> jax.Array:
        """Compute item vectors `[..., width + 1]`; the last column is the item bias."""
        scaled = self.item(features) * self.head.kernel[:, 0]
        return jnp.concatenate([scaled, sum_of_biases(self.embedding_bias, features, self.fields)], -1)

    def item(self, features: Features) -> jax.Array:
        """Sum the embeddings of the item fields, `[..., width]`."""
        return sum(vectors(self.embedding, features, self.fields).values(), start=jnp.zeros(()))

    def read(self, past: Examples, rngs: nnx.Rngs | None) -> jax.Array:
        """Encode one user's interactions, sorted by time, to states `[examples + 1, width]`."""
        scale, shift = jnp.split(self.token_target(past.target[:, None]), 2, -1)
        item = self.item(past.features)
        tokens = item.shape[-1] ** 0.5 * item * (1 + scale) + shift
        return self.encoder(self.dropout(tokens, deterministic=rngs is None, rngs=rngs), past.features[ORDER], rngs)


def in_time(past: Examples) -> tuple[Examples, jax.Array]:
    """Sort one user's interactions by time.

    Returns:
      The interactions, earliest first. Padding is last and set to 0; it needs no mask because encoders are causal.
      The new position of each interaction, `[examples + 1]`. The last entry is the number of interactions, so that
      index -1 (an example not in the past) selects the state that has read them all.
    """
    keep = past.mask > 0
    order = past.features.get(ORDER, jnp.arange(len(keep), dtype=jnp.int32))
    by_time = jnp.lexsort((order, ~keep))
    places = jnp.append(jnp.argsort(by_time), keep.sum())

    def arranged(x: jax.Array) -> jax.Array:
        return jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)[by_time]

    return jax.tree.map(arranged, past._replace(features={**past.features, ORDER: order})), places


class GRU(nnx.Module):
    """Gated recurrent units over the tokens, with initial state 0."""

    def __init__(self, width: int, layers: int, rngs: nnx.Rngs) -> None:
        self.cells = nnx.List([nnx.GRUCell(width, width, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array, order: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute states `[examples + 1, width]` of tokens `[examples, width]`."""
        for cell in self.cells:
            _, x = jax.lax.scan(cell, jnp.zeros(x.shape[-1], x.dtype), x)
        return jnp.concatenate([jnp.zeros_like(x, shape=(1, x.shape[-1])), x])


def gru(
    fields: Mapping[str, Field],
    *,
    width: int = 16,
    hidden: Sequence[int] = (),
    layers: int = 1,
    tied: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Build a recurrent recommender (GRU4Rec): the state before an interaction scores it.

        h_t = GRU(h_{t-1}, token_t)

    The model reads `History` features. Its weights act inside a loop over time and cannot stay factored: `maml` and
    `melu` hold them per user, which costs memory, and emit a `PlainFormWarning`.

    Args:
      fields: feature fields by name, from `metarec_jax.models.fields_of(data)`.
      width: width of each field's embedding and of the state.
      hidden: widths of the hidden layers over the fields' embeddings.
      layers: number of recurrent layers.
      tied: score items by the product of the state and the input item embeddings, as SASRec does. This form ranks a
        catalogue and learns from all positions of a history at once (`Model.states`). It takes no hidden layers.
      dropout: dropout rate of a tied network while it learns from all positions; applied to tokens and to the output
        of each attention block.

    Raises:
      ValueError: `layers` is less than 1; see also `sequence_model`.

    Example:
      >>> model = mr.models.gru(mr.models.fields_of(mr.data.synthetic(users=30, items=40)), width=4)
      >>> model.history  # it reads the user's past interactions
      True
      >>> model.width  # item and genre embeddings, the state, and the state times the item
      16

    References:
      Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016.
    """
    if layers < 1:
        raise ValueError(f"layers must be 1 or more, got {layers}")
    return sequence_model(fields, width, hidden, lambda rngs: GRU(width, layers, rngs), tied, dropout)


def sequence_model(
    fields: Mapping[str, Field],
    width: int,
    hidden: Sequence[int],
    encoder: Callable[[nnx.Rngs], Encode],
    tied: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Build the `Model` of a `SequenceModel` or a `TiedSequenceModel` with the given encoder.

    Args:
      fields, width, hidden, tied, dropout: as in `gru`.
      encoder: builds the encoder of tokens from `nnx.Rngs`.

    Raises:
      ValueError: there is no item field, `tied` is combined with hidden layers, or `dropout` is used without `tied`
        or is not in [0, 1).
    """
    need_item_fields(fields)
    if (tied and hidden) or (dropout and not tied) or not 0 <= dropout < 1:
        raise ValueError(
            f"tied networks take no hidden layers, and only they take dropout, 0 or more and below 1; "
            f"got {tied=}, {hidden=}, {dropout=}"
        )

    def build(rngs: nnx.Rngs) -> nnx.Module:
        if tied:
            return TiedSequenceModel(fields, width, encoder, dropout, rngs)
        return SequenceModel(fields, width, hidden, encoder, rngs)

    return from_nnx(build, profile(fields, width), history=True)
