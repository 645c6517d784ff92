"""`Model`: a network as the pure functions that strategies need, and its construction from flax NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from metarec_jax.types import Examples, Features, Params


class Model(NamedTuple):
    """A network as pure functions. `Model(init, apply)` is enough for most strategies.

    Attributes:
      init: `init(key) -> params`.
      apply: `apply(params, features) -> scores`; features `[..., ...]` and scores share their leading axes.
      embed: `embed(params, features) -> [..., width]`, the input of the last linear layer. `ridge` needs it.
      groups: `groups(params)`, a pytree like params of "embedding", "decision" or "head". `anil` and `melu` use it to
        choose which parameters adapt.
      width: last axis of `embed`; needed by strategies that stack their own network on `embed`.
      profile: encoder of the task's own fields (a user's attributes), for strategies that start from these.
      history: whether `apply` and `embed` read `History` features; `with_history` makes a strategy pass them.
      items: number of catalogue rows; needed by strategies with per-item parameters.
      states: `states(params, past, key) -> [users, examples + 1, width]`: entry t has read the first t examples of
        `past`, in time order. Dropout is active with a key (training) and off with None. Set together with `vectors`
        by networks whose score is the product `states . vectors`.
      vectors: `vectors(params, features) -> [..., width]`, item vectors from item features alone.

    Example:
      A model of your own, the linear score x . w of two features:

      >>> model = mr.Model(init=lambda key: jnp.zeros(2), apply=lambda w, x: x @ w)
      >>> model.apply(jnp.array([1.0, -1.0]), jnp.array([[3.0, 1.0], [0.0, 2.0]]))
      Array([ 2., -2.], dtype=float32)
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, Features], jax.Array]
    embed: Callable[[Params, Features], jax.Array] | None = None
    groups: Callable[[Params], Params] | None = None
    width: int | None = None
    profile: Encoder | None = None
    history: bool = False
    items: int | None = None
    states: Callable[[Params, Examples, jax.Array | None], jax.Array] | None = None
    vectors: Callable[[Params, Features], jax.Array] | None = None


class Encoder(NamedTuple):
    """A network from features to vectors.

    Attributes:
      init: `init(key) -> params`.
      apply: `apply(params, features) -> [..., width]`.
      width: width of the vectors.

    Example:
      >>> age = mr.models.Encoder(init=lambda key: {}, apply=lambda params, x: x["user/age"][..., None] / 100, width=1)
      >>> age.apply({}, {"user/age": jnp.array([[25.0]])})
      Array([[[0.25]]], dtype=float32)
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, Features], jax.Array]
    width: int


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module], profile: Encoder | None = None, history: bool = False) -> Model:
    """Build a `Model` from a flax NNX module.

    The module has `__call__(features)` and, optionally, `embed(features)`, the input of its `nnx.Linear` named `head`.
    Methods `states(past, key)` and `vectors(features)` are used if `vectors` exists.

    Parameters become a plain dict of arrays. The group of a parameter is "head" if the first name of its path is
    `head`, "embedding" if that starts with `embedding`, else "decision".

    Args:
      build: builds the module from `nnx.Rngs`; traced abstractly once, run on a device only by `init`.
      profile, history: see `Model`.

    Example:
      >>> from flax import nnx
      >>> class Linear(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.head = nnx.Linear(3, 1, rngs=rngs)
      ...     def __call__(self, features):
      ...         return self.head(features)[..., 0]
      >>> model = mr.models.from_nnx(lambda rngs: Linear(rngs))
      >>> jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), jnp.ones((2, 5, 3))).shape
      (2, 5)
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, _ = nnx.split(abstract)
    product = hasattr(abstract, "vectors")

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def merged(params: Params) -> Any:
        return nnx.merge(graph, nnx.State(params))

    def groups(params: Params) -> Params:
        def group(path: tuple[Any, ...], _: jax.Array) -> str:
            top = str(getattr(path[0], "key", path[0]))
            return top if top == "head" else "embedding" if top.startswith("embedding") else "decision"

        return jax.tree_util.tree_map_with_path(group, params)

    return Model(
        init=init,
        apply=lambda params, features: merged(params)(features),
        embed=lambda params, features: merged(params).embed(features),
        groups=groups,
        width=getattr(getattr(abstract, "head", None), "in_features", None),
        profile=profile,
        history=history,
        states=(lambda params, past, key: merged(params).states(past, key)) if product else None,
        vectors=(lambda params, features: merged(params).vectors(features)) if product else None,
    )
