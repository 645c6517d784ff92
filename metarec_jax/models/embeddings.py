"""Pretrained vectors: a model that starts from arrays of the caller's, or keeps them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metarec_jax.models.model import Model
from metarec_jax.types import Params


def pretrained(model: Model, arrays: Mapping[str, Any], *, freeze: bool = False) -> Model:
    """`model` with some of its parameters given, for instance item vectors learned from texts or images.

        pretrained(mlp(fields, width=64), {"embedding/item_id/embedding": vectors})

    Row r of a table belongs to code r of its field: of the items, `data.items.encode(raw ids)`; row 0 is the unknown
    item's, and zeros are a good choice for it. Vectors that should enter beside an embedding of the item's own are a
    dense item field instead.

    Args:
      model: any model.
      arrays: by the parameter's path, its keys joined by "/".
      freeze: the arrays are constants, not parameters: nothing trains, adapts or saves them.

    Raises:
      ValueError: the model has no such parameter, or one of another shape.
    """
    known = {_name(path): leaf for path, leaf in _leaves(jax.eval_shape(model.init, jax.random.key(0)))}
    values = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}; choose from {', '.join(known)}")
        if value.shape != known[name].shape:
            raise ValueError(f"{name} is {known[name].shape}, the given array {value.shape}; set `width` to fit")

    def put(params: Params) -> Params:
        return _map(lambda name, leaf: values.get(name, leaf), params)

    def taken_out(params: Params) -> Params:
        return _map(lambda name, leaf: None if name in values else leaf, params)

    if not freeze:
        return model._replace(init=lambda key: put(model.init(key)))
    embed = model.embed
    return model._replace(
        init=lambda key: taken_out(model.init(key)),
        apply=lambda params, features: model.apply(put(params), features),
        embed=None if embed is None else lambda params, features: embed(put(params), features),
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(params: Params) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(params)


def _map(change: Any, params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(_name(path), leaf), params, is_leaf=lambda leaf: leaf is None
    )
