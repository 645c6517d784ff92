"""Columns: scatter into each user's row, without an index over users, so that sharded users stay on their devices."""

from typing import Any

import jax


def set_columns(x: jax.Array, columns: jax.Array, value: Any) -> jax.Array:
    """Set entries `columns` `[users, n]` of each row of `x` `[users, items]`; columns beyond the row are dropped."""
    return jax.vmap(lambda row, at: row.at[at].set(value, mode="drop"))(x, columns)


def add_to_columns(x: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """Add `values` `[users, n]` to entries `columns` `[users, n]` of each row of `x`; otherwise as `set_columns`."""
    return jax.vmap(lambda row, at, value: row.at[at].add(value, mode="drop"))(x, columns, values)
