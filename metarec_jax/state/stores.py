"""Stores: where users are kept, by a path or an address."""

from pathlib import Path

from metarec_jax.state.events import Store
from metarec_jax.state.redis_store import RedisStore
from metarec_jax.state.sqlite_store import SqliteStore


def open_store(where: "str | Path | Store") -> Store:
    """The store at a file's path or a `redis://` address; a store is itself."""
    if isinstance(where, str) and where.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(where)
    return SqliteStore(where) if isinstance(where, str | Path) else where
