"""SPMD: keep the engine's arrays where their users are, on explicit and automatic meshes and under `shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metarec_jax.types import Params


def varying(tree: Params, like: Params) -> Params:
    """Mark the arrays of `tree` as varying over the axes of `shard_map` over which the arrays of `like` vary.

    A derivative at an unvarying array is summed over devices. That is right for shared parameters, and wrong for zeros
    that stand for a quantity of each user.
    """
    axes: set[str] = set().union(*(_axes(x) for x in jax.tree.leaves(like)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def automatic(function: Callable[..., Any], *args: Any, like: jax.Array) -> Any:
    """Call a function whose results are `[users, ...]`, sharded over users as `like` is, on any mesh.

    On an explicit mesh, the compiler shards what is inside: a model's own operations, such as the look-up of rows in a
    table, would need a sharding each. Elsewhere it is a plain call.
    """
    sharding = getattr(jax.typeof(like), "sharding", None)
    if sharding is None or sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return function(*args)
    users = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    return jax.sharding.auto_axes(function, out_sharding=users)(*args)


def spec(x: Any, shape: tuple[int, ...]) -> Any:
    """Return what stands for an array of this shape, with dtype and varying axes of `x`, where code is traced."""
    like = jax.ShapeDtypeStruct(shape, jnp.result_type(x))
    return varying(jnp.zeros(like.shape, like.dtype), x) if _axes(x) else like


def _axes(x: Any) -> frozenset[str]:
    """Return the axes of `shard_map` over which an array varies, by the attribute of this version of jax."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return frozenset()
    kind: Any = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
