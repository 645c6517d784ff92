"""SqliteStore: users in a file; acknowledged events survive a crash, and deleted users leave no data."""

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarec_jax.errors import StoreError
from metarec_jax.state.events import VERSION, Event, Stored, StoredUser, UserId

APPLICATION = 0x6D726A78  # "mrjx", in the file's header


class SqliteStore:
    """A store in a SQLite file in write-ahead mode; transactions are on disk (fsync) when a call returns.

    Args:
      path: path of the file, created if missing; ":memory:" for a store that ends with the process.

    Raises:
      StoreError: a file that is not a store, is damaged, or was written by a newer version.

    Example:
      >>> store = mr.SqliteStore()  # in memory; give a path to keep the users
      >>> event = mr.Event("ann", "tea", value=5.0, time=10.0, id="a")
      >>> store.append([event, mr.Event("ann", "rye", kind="click", time=20.0)], [event])  # the id "a" counts once
      [2, 0]
      >>> (ann,) = store.read(["ann"], longest=1)
      >>> ann.events
      [Stored(item='rye', kind='click', value=None, time=20.0, context=None)]
      >>> store.forget("ann")
      2
    """

    def __init__(self, path: str | Path = ":memory:") -> None:
        self.path = str(path)
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._prepare()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: cannot be opened as a store of users ({error})") from error

    def _prepare(self) -> None:
        with self._transaction() as db:
            (version,), (application,) = (
                db.execute(f"PRAGMA {p}").fetchone() for p in ("user_version", "application_id")
            )
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and application != APPLICATION:
                raise StoreError(f"{self.path}: a database, but none of metarec_jax; choose another file")
            if version > VERSION:
                raise StoreError(
                    f"{self.path}: written by a newer metarec_jax (store version {version}, this one reads {VERSION}); "
                    "update the package, or use another file"
                )
            if not tables:
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute(
                    "CREATE TABLE user (key INTEGER PRIMARY KEY, id UNIQUE NOT NULL, attributes TEXT, "
                    "last REAL NOT NULL, changes INTEGER NOT NULL)"
                )
                db.execute(
                    "CREATE TABLE event (user INTEGER NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL, "
                    "item NOT NULL, kind TEXT NOT NULL, value REAL, time REAL NOT NULL, context TEXT, "
                    "PRIMARY KEY (user, id)) "
                    "WITHOUT ROWID"
                )
                db.execute("CREATE INDEX idle ON user (last)")
            elif version < 2:
                db.execute("ALTER TABLE event ADD COLUMN context TEXT")
                db.execute(f"PRAGMA user_version = {VERSION}")

    def append(self, *groups: Iterable[Event]) -> list[int]:
        now, counts = time.time(), []
        with self._transaction() as db:
            for events in groups:
                new = 0
                for event in events:
                    at = now if event.time is None else event.time
                    key, number = self._key(db, event.user, at)
                    context = json.dumps(dict(event.context)) if event.context else None
                    row = (key, event.id or uuid.uuid4().hex, number, event.item, event.kind, event.value, at, context)
                    new += db.execute("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row).rowcount
                counts.append(new)
        return counts

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        with self._transaction() as db:
            key, _ = self._key(db, user, time.time())
            db.execute("UPDATE user SET attributes = ? WHERE key = ?", (json.dumps(dict(attributes)), key))

    def read(self, users: Sequence[UserId], longest: int) -> list[StoredUser]:
        stored_users = []
        with self._reading() as db:
            for user in users:
                row = db.execute("SELECT key, attributes FROM user WHERE id = ?", (user,)).fetchone()
                if row is None:
                    stored_users.append(StoredUser({}, []))
                    continue
                events = db.execute(
                    "SELECT item, kind, value, time, context FROM event WHERE user = ? "
                    "ORDER BY time DESC, number DESC LIMIT ?",
                    (row[0], longest),
                ).fetchall()
                stored_users.append(StoredUser(json.loads(row[1] or "{}"), [_stored(*e) for e in reversed(events)]))
        return stored_users

    def forget(self, user: UserId) -> int:
        with self._transaction() as db:
            row = db.execute("SELECT key FROM user WHERE id = ?", (user,)).fetchone()
            removed = 0 if row is None else self._remove(db, row[0])
        self._wipe()
        return removed

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        with self._transaction() as db:
            evicted = (
                db.execute("SELECT key FROM user WHERE last < ?", (before,)).fetchall() if before is not None else []
            )
            for (key,) in evicted:
                self._remove(db, key)
            if users is not None:
                idle = db.execute("SELECT key FROM user ORDER BY last DESC LIMIT -1 OFFSET ?", (users,)).fetchall()
                for (key,) in idle:
                    self._remove(db, key)
                evicted += idle
        if evicted:
            self._wipe()
        return len(evicted)

    def size(self) -> dict[str, float]:
        with self._reading() as db:
            (users,) = db.execute("SELECT count(*) FROM user").fetchone()
            (events,) = db.execute("SELECT count(*) FROM event").fetchone()
            pages, length = (db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_count", "page_size"))
        return {
            "users": users,
            "events": events,
            "bytes": pages * length,
            "bytes_per_user": pages * length / max(users, 1),
        }

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __del__(self) -> None:
        if hasattr(self, "_db"):
            self._db.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Lock the connection; convert errors of SQLite to `StoreError`."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: cannot be read ({error})") from error

    def _key(self, db: sqlite3.Connection, user: UserId, at: float) -> tuple[int, int]:
        """Return the user's key and number of changes, including this one."""
        return db.execute(
            "INSERT INTO user (id, last, changes) VALUES (?, ?, 1) ON CONFLICT (id) DO UPDATE SET "
            "last = max(last, excluded.last), changes = changes + 1 RETURNING key, changes",
            (user, at),
        ).fetchone()

    def _remove(self, db: sqlite3.Connection, key: int) -> int:
        removed = db.execute("DELETE FROM event WHERE user = ?", (key,)).rowcount
        db.execute("DELETE FROM user WHERE key = ?", (key,))
        return removed

    def _wipe(self) -> None:
        """Write the log back and empty it.

        `secure_delete` overwrites deleted rows with zeros in the file, but not in the log.
        """
        with self._reading() as db:
            busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(
                f"{self.path}: the user is deleted, but another process reads the file, so the log still holds "
                "the deleted data; delete again when that process is done"
            )


def _stored(item: UserId, kind: str, value: float | None, at: float, context: str | None) -> Stored:
    return Stored(item, kind, value, at, None if context is None else json.loads(context))


class _Transaction:
    """An atomic transaction, on disk at the end; errors of SQLite become `StoreError`."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store

    def __enter__(self) -> sqlite3.Connection:
        self.store._lock.acquire()
        try:
            self.store._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            self.store._lock.release()
            raise StoreError(f"{self.store.path}: cannot be written ({error})") from error
        return self.store._db

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        db = self.store._db
        try:
            db.execute("ROLLBACK" if kind else "COMMIT")
        except sqlite3.Error as failed:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise StoreError(f"{self.store.path}: nothing of this call was kept ({failed})") from failed
        finally:
            self.store._lock.release()
        if isinstance(error, sqlite3.Error):
            raise StoreError(f"{self.store.path}: nothing of this call was kept ({error})") from error
