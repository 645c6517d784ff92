"""Stores: open a store by path or address."""

from pathlib import Path

from metarec_jax.state.events import Store
from metarec_jax.state.redis_store import RedisStore
from metarec_jax.state.sqlite_store import SqliteStore


def open_store(where: "str | Path | Store") -> Store:
    """Open the store at a file path or `redis://` address; return a `Store` unchanged."""
    if isinstance(where, str) and where.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(where)
    return SqliteStore(where) if isinstance(where, str | Path) else where
