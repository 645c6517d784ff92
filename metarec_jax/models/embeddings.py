"""Pretrained embeddings: start a model from given arrays, trainable or frozen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.models.model import Model
from metarec_jax.types import Params


def pretrained(model: Model, arrays: Mapping[str, Any], *, freeze: bool = False) -> Model:
    """Initialise parameters of `model` from arrays, such as item vectors learned from texts or images.

        pretrained(mlp(fields, width=64), {"embedding/item_id/embedding": vectors})

    Row r of a table belongs to code r of its field; the codes of items are `data.items.encode(raw ids)`. Row 0 is the
    unknown item; zeros are a good choice. To use vectors next to a learned item embedding, make them a dense item field
    instead.

    Args:
      model: any model.
      arrays: initial values by parameter path, with keys joined by "/".
      freeze: make the arrays constants instead of parameters: they are not trained, adapted or saved.

    Raises:
      ValueError: the model has no such parameter, or its shape differs.

    Example:
      >>> data = mr.data.synthetic(users=30, items=40)
      >>> vectors = np.ones((41, 4))  # a row for each code, the first for an unknown item
      >>> model = mr.models.pretrained(
      ...     mr.models.linear(mr.models.fields_of(data), width=4), {"embedding/item_id/embedding": vectors})
      >>> jax.jit(model.init)(jax.random.key(0))["embedding"]["item_id"]["embedding"][1]
      Array([1., 1., 1., 1.], dtype=float32)
    """
    known = {_name(path): leaf for path, leaf in _leaves(jax.eval_shape(model.init, jax.random.key(0)))}
    values = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}; choose from {', '.join(known)}")
        if value.shape != known[name].shape:
            raise ValueError(f"{name} is {known[name].shape}, the given array {value.shape}; set `width` to fit")

    def with_values(params: Params) -> Params:
        return _map(lambda name, leaf: values.get(name, leaf), params)

    def without_values(params: Params) -> Params:
        return _map(lambda name, leaf: None if name in values else leaf, params)

    if not freeze:
        return model._replace(init=lambda key: with_values(model.init(key)))

    def frozen(function: Any) -> Any:
        return function and (lambda params, *rest: function(with_values(params), *rest))

    return model._replace(
        init=lambda key: without_values(model.init(key)),
        apply=frozen(model.apply),
        embed=frozen(model.embed),
        states=frozen(model.states),
        vectors=frozen(model.vectors),
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(params: Params) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(params)


def _map(change: Any, params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(_name(path), leaf), params, is_leaf=lambda leaf: leaf is None
    )
