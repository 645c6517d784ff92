"""Sequence models with attention over the user's past interactions: causal Transformer and HSTU."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.data.fields import Field
from metarec_jax.models.model import Model
from metarec_jax.models.sequence import Encode, sequence_model

LENGTH = 200  # number of position embeddings; later positions share the last one
DISTANCES = 40  # buckets of relative distances: one for each of 0 to 6, then logarithmically wider


class Attention(nnx.Module):
    """Blocks of causal attention over the tokens, after a start token for the user without a past.

    Positions are absolute, counted from the start of the history, unless `relative`: then blocks use distances only. A
    state then does not depend on how many older interactions were cut off.
    """

    def __init__(
        self, width: int, block: Callable[[], nnx.Module], layers: int, rngs: nnx.Rngs, relative: bool = False
    ) -> None:
        self.start = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width,)))
        self.relative = relative
        if not relative:
            self.place = nnx.Embed(LENGTH, width, embedding_init=nnx.initializers.zeros, rngs=rngs)
        self.blocks = nnx.List([block() for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array, order: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute states `[examples + 1, width]` of tokens `[examples, width]` with `order` `[examples]`."""
        x = jnp.concatenate([self.start[None], x])
        if not self.relative:
            x = x + self.place(jnp.minimum(jnp.arange(len(x)), LENGTH - 1))
        order = jnp.pad(order, (1, 0))
        for block in self.blocks:
            x = block(x, order, rngs)
        return self.norm(x)


class TransformerBlock(nnx.Module):
    """Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)).

    If `relative`, attention logits have a learned bias by distance.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning (T5), JMLR 2020, section 2.1 (the bias).
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, relative: bool = False, dropout: float = 0.0) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, decode=False, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.relative = relative
        if relative:
            self.distance = nnx.Embed(DISTANCES, heads, embedding_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, order: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        normed = self.norms[0](x)
        read = self.read(normed) if self.relative else self.attention(normed, is_causal=True)
        x = x + self.dropout(read, deterministic=rngs is None, rngs=rngs)
        wide = self.narrow(nnx.relu(self.wide(self.norms[1](x))))
        return x + self.dropout(wide, deterministic=rngs is None, rngs=rngs)

    def read(self, x: jax.Array) -> jax.Array:
        """Compute attention with the bias by distance."""
        query, key, value = (layer(x) for layer in (self.attention.query, self.attention.key, self.attention.value))
        back = jnp.arange(len(x))[:, None] - jnp.arange(len(x))
        step = (4 * jnp.log2(1.0 + jnp.maximum(back, 0))).astype(jnp.int32)
        scores = jnp.einsum("ihd,jhd->ijh", query, key) / query.shape[-1] ** 0.5
        scores += self.distance(jnp.minimum(step, DISTANCES - 1))
        share = jax.nn.softmax(scores, axis=1, where=(back >= 0)[..., None])
        return self.attention.out(jnp.einsum("ijh,jhd->ihd", share, value))


class HSTUBlock(nnx.Module):
    """HSTU block: gated pointwise aggregated attention.

    U, V, Q, K = silu(W_1 norm(x));   x + W_2 (norm(silu(Q K^T + p_{i-j} + t_{o_i-o_j}) V) * U)
    """

    BUCKETS = 16  # buckets of gaps in `order`, each twice as wide as the last

    def __init__(
        self, width: int, heads: int, rngs: nnx.Rngs, relative: bool = False, dropout: float = 0.0
    ) -> None:  # `relative` is ignored: positions are always relative
        self.heads = heads
        self.dropout = nnx.Dropout(dropout)
        self.norm, self.inner_norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.project = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.distance = nnx.Embed(LENGTH, heads, embedding_init=zeros, rngs=rngs)
        self.gap = nnx.Embed(self.BUCKETS, heads, embedding_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, order: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        split = [a.reshape(len(x), self.heads, -1) for a in jnp.split(nnx.silu(self.project(self.norm(x))), 4, -1)]
        gate, value, query, key = split
        places = jnp.arange(len(x))
        distance = jnp.clip(places[:, None] - places, 0, LENGTH - 1)
        gap = jnp.log2(1.0 + jnp.maximum(order[:, None] - order, 0)).astype(jnp.int32)
        scores = jnp.einsum("ihd,jhd->ijh", query, key) / query.shape[-1] ** 0.5
        scores = nnx.silu(scores + self.distance(distance) + self.gap(jnp.minimum(gap, self.BUCKETS - 1)))
        seen = jnp.where((places[:, None] >= places)[..., None], scores, 0.0)
        read = jnp.einsum("ijh,jhd->ihd", seen, value).reshape(x.shape)
        gated = self.out(self.inner_norm(read) * gate.reshape(x.shape))
        return x + self.dropout(gated, deterministic=rngs is None, rngs=rngs)


def transformer(
    fields: Mapping[str, Field],
    *,
    width: int = 16,
    hidden: Sequence[int] = (),
    layers: int = 1,
    heads: int = 2,
    tied: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Build a causal Transformer over the user's interactions: SASRec with targets in the tokens.

    The model reads `History` features. Feed-forward layers are four times as wide as the state. If `tied`, a relative
    position bias replaces the position embeddings, so the state does not depend on how many older interactions were cut
    off.

    Args:
      fields, width, hidden, tied, dropout: as in `gru`.
      layers: number of Transformer blocks.
      heads: number of attention heads; must divide `width`.

    Raises:
      ValueError: `layers` or `heads` is less than 1, or `width` is not a multiple of `heads`; see also
        `sequence_model`.

    Example:
      >>> model = mr.models.transformer(mr.models.fields_of(mr.data.synthetic(users=30, items=40)), width=4, tied=True)
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> features = {"item_id": jnp.zeros((2, 5), int), "item/genre": jnp.zeros((2, 5), int)}
      >>> past = mr.Examples(features, jnp.ones((2, 5)), jnp.ones((2, 5)))
      >>> jax.eval_shape(lambda params: model.states(params, past, None), params).shape  # the last column is 1
      (2, 6, 5)

    References:
      Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, section III.
    """
    return attending(TransformerBlock, fields, width, hidden, layers, heads, tied, dropout)


def hstu(
    fields: Mapping[str, Field],
    *,
    width: int = 16,
    hidden: Sequence[int] = (),
    layers: int = 1,
    heads: int = 2,
    tied: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Build a model of hierarchical sequential transduction units (HSTU) over the user's interactions.

    The model reads `History` features. Attention has no softmax, so it keeps the intensity of a user's activity. It has
    a bias by distance and by gap in time. A gate replaces the feed-forward layer.

    Differences to the paper: an interaction and its target are one token instead of two; time is `order`, the only time
    that batches have; there is no division by the length, since a layer norm follows.

    Args:
      fields, width, hidden, tied, dropout: as in `gru`.
      layers: number of blocks.
      heads: number of attention heads; must divide `width`.

    Raises:
      ValueError: `layers` or `heads` is less than 1, or `width` is not a multiple of `heads`; see also
        `sequence_model`.

    Example:
      >>> model = mr.models.hstu(mr.models.fields_of(mr.data.synthetic(users=30, items=40)), width=4, layers=2)
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> len(params["encoder"]["blocks"])
      2

    References:
      Zhai et al., Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
      Recommendations, ICML 2024, section 3, equations 1 to 3.
    """
    return attending(HSTUBlock, fields, width, hidden, layers, heads, tied, dropout)


def attending(
    block: Callable[..., nnx.Module],
    fields: Mapping[str, Field],
    width: int,
    hidden: Sequence[int],
    layers: int,
    heads: int,
    tied: bool,
    dropout: float,
) -> Model:
    """Build the sequence model whose encoder is `layers` of `block`; other arguments as in `transformer`."""
    if layers < 1 or heads < 1 or width % heads:
        raise ValueError(
            f"need layers >= 1, heads >= 1 and width a multiple of heads; got {layers=}, {heads=}, {width=}"
        )

    def encoder(rngs: nnx.Rngs) -> Encode:
        return Attention(width, lambda: block(width, heads, rngs, tied, dropout), layers, rngs, tied)

    return sequence_model(fields, width, hidden, encoder, tied, dropout)
