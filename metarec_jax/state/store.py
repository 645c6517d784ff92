"""Stores: what each user did, kept so that an acknowledged event survives a crash and a deleted user leaves nothing."""

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from metarec_jax.errors import StoreError

VERSION = 1
APPLICATION = 0x6D726A78  # "mrjx", in the file's header
UserId = int | str


class Event(NamedTuple):
    """What a user did with an item.

    Attributes:
      user, item: raw ids, integers of up to 64 bits or strings.
      kind: "rating", "click", "purchase", "dismiss" (not interested) or "remove" (forget what was before).
      value: of a rating.
      time: seconds since 1970 (default: now).
      id: an event of a user that comes again with the same id counts once (default: a new one).
    """

    user: UserId
    item: UserId
    kind: str = "rating"
    value: float | None = None
    time: float | None = None
    id: str | None = None


class Stored(NamedTuple):
    """One event of a user as a store gives it back."""

    item: UserId
    kind: str
    value: float | None
    time: float


class Person(NamedTuple):
    """What a store knows of a user: attributes as they were given, and events in the order of time."""

    attributes: dict[str, Any]
    events: list[Stored]


class Store(Protocol):
    """What `Recommender` needs of a store; every method is atomic and may be called from several threads."""

    def append(self, *groups: Iterable[Event]) -> list[int]:
        """Keeps all events for good before it returns; returns how many of each group were new."""

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        """Keeps a user's attributes, in place of those before."""

    def read(self, users: Sequence[UserId], longest: int) -> list[Person]:
        """What is known of each user, the latest `longest` events at most; nothing of one never seen."""

    def forget(self, user: UserId) -> int:
        """Removes every trace of a user; returns how many events there were."""

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        """Forgets users whose last event is before a time, and the longest idle ones beyond so many; returns how
        many."""

    def size(self) -> dict[str, float]:
        """`users`, `events`, `bytes` and `bytes_per_user`."""

    def close(self) -> None:
        """Frees the file or connection."""


class SqliteStore:
    """A file of SQLite in write-ahead mode: a transaction is on the disk (fsync) when a call returns.

    Args:
      path: of the file, made when there is none; ":memory:" for a store that ends with the process.

    Raises:
      StoreError: a file that is no store, is damaged, or was written by a newer version.
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
                    "item NOT NULL, kind TEXT NOT NULL, value REAL, time REAL NOT NULL, PRIMARY KEY (user, id)) "
                    "WITHOUT ROWID"
                )
                db.execute("CREATE INDEX idle ON user (last)")

    def append(self, *groups: Iterable[Event]) -> list[int]:
        now, counts = time.time(), []
        with self._transaction() as db:
            for events in groups:
                new = 0
                for event in events:
                    at = now if event.time is None else event.time
                    key, number = self._key(db, event.user, at)
                    row = (key, event.id or uuid.uuid4().hex, number, event.item, event.kind, event.value, at)
                    new += db.execute("INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount
                counts.append(new)
        return counts

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        with self._transaction() as db:
            key, _ = self._key(db, user, time.time())
            db.execute("UPDATE user SET attributes = ? WHERE key = ?", (json.dumps(dict(attributes)), key))

    def read(self, users: Sequence[UserId], longest: int) -> list[Person]:
        found = []
        with self._reading() as db:
            for user in users:
                row = db.execute("SELECT key, attributes FROM user WHERE id = ?", (user,)).fetchone()
                if row is None:
                    found.append(Person({}, []))
                    continue
                events = db.execute(
                    "SELECT item, kind, value, time FROM event WHERE user = ? ORDER BY time DESC, number DESC LIMIT ?",
                    (row[0], longest),
                ).fetchall()
                found.append(Person(json.loads(row[1] or "{}"), [Stored(*e) for e in reversed(events)]))
        return found

    def forget(self, user: UserId) -> int:
        with self._transaction() as db:
            row = db.execute("SELECT key FROM user WHERE id = ?", (user,)).fetchone()
            removed = 0 if row is None else self._remove(db, row[0])
        self._wipe()
        return removed

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        with self._transaction() as db:
            gone = db.execute("SELECT key FROM user WHERE last < ?", (before,)).fetchall() if before is not None else []
            for (key,) in gone:
                self._remove(db, key)
            if users is not None:
                more = db.execute("SELECT key FROM user ORDER BY last DESC LIMIT -1 OFFSET ?", (users,)).fetchall()
                for (key,) in more:
                    self._remove(db, key)
                gone += more
        if gone:
            self._wipe()
        return len(gone)

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
        """The connection, alone; errors of SQLite become `StoreError`."""
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: cannot be read ({error})") from error

    def _key(self, db: sqlite3.Connection, user: UserId, at: float) -> tuple[int, int]:
        """The user's key, and how many changes there were of that user, this one included."""
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
        """Writes the log back and empties it: deleted rows are zeros in the file (`secure_delete`), not in the log."""
        with self._reading() as db:
            busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(
                f"{self.path}: the user is deleted, but another process reads the file, so that its log still holds "
                "what was written before; delete again when that process is done"
            )


class _Transaction:
    """All or nothing, on the disk at the end; errors of SQLite become `StoreError`."""

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


class RedisStore:
    """The same over a Redis server, for several processes that serve the same users.

    What an acknowledged event survives is the server's to say: with `appendonly yes` and `appendfsync always` a crash,
    with Redis' defaults not.

    Args:
      url: `redis://host:port/database`.
      prefix: of the keys.

    Raises:
      StoreError: the package `redis` is missing, no server answers, or the keys are of a newer version.
    """

    def __init__(self, url: str, prefix: str = "metarec") -> None:
        try:
            import redis
        except ImportError as error:
            raise StoreError("RedisStore needs the package redis: pip install 'metarec-jax[redis]'") from error
        self._errors, self.prefix, self.path = redis.RedisError, prefix, url
        try:
            self._db = redis.Redis.from_url(url, decode_responses=True)
            self._db.setnx(f"{prefix}:version", VERSION)
            version = int(self._db.get(f"{prefix}:version"))  # type: ignore[arg-type]
        except (redis.RedisError, ValueError) as error:
            raise StoreError(f"{url}: no Redis server answers there ({error})") from error
        if version > VERSION:
            raise StoreError(f"{url}: keys of version {version}, this package reads {VERSION}; update the package")
        self._append = self._db.register_script(_APPEND)

    def append(self, *groups: Iterable[Event]) -> list[int]:
        now, packed = time.time(), []
        for place, events in enumerate(groups):
            for e in events:
                at = now if e.time is None else e.time
                event = json.dumps([e.item, e.kind, e.value, at])
                packed.append(json.dumps([self._name(e.user), e.id or uuid.uuid4().hex, f"{at:.6f}", event, place + 1]))
        return self._call(lambda: self._append(keys=[self.prefix], args=[len(groups), *packed]))

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        name = self._name(user)

        def write() -> None:
            with self._db.pipeline(transaction=True) as pipe:
                pipe.set(f"{self.prefix}:attributes:{name}", json.dumps(dict(attributes)))
                pipe.zadd(f"{self.prefix}:last", {name: time.time()}, gt=True)
                pipe.execute()

        self._call(write)

    def read(self, users: Sequence[UserId], longest: int) -> list[Person]:
        def fetch() -> list[Any]:
            with self._db.pipeline(transaction=False) as pipe:
                for user in users:
                    pipe.get(f"{self.prefix}:attributes:{self._name(user)}")
                    pipe.hgetall(f"{self.prefix}:events:{self._name(user)}")
                return pipe.execute()

        answers = self._call(fetch)
        found = []
        for attributes, events in zip(answers[::2], answers[1::2], strict=True):
            numbered = [(Stored(*event), number) for event, number in map(json.loads, events.values())]
            numbered.sort(key=lambda pair: (pair[0].time, pair[1]))
            found.append(Person(json.loads(attributes or "{}"), [event for event, _ in numbered[-longest:]]))
        return found

    def forget(self, user: UserId) -> int:
        name = self._name(user)

        def remove() -> int:
            with self._db.pipeline(transaction=True) as pipe:
                pipe.hlen(f"{self.prefix}:events:{name}")
                pipe.delete(f"{self.prefix}:events:{name}", f"{self.prefix}:attributes:{name}")
                pipe.zrem(f"{self.prefix}:last", name)
                return int(pipe.execute()[0])

        return self._call(remove)

    def evict(self, *, before: float | None = None, users: int | None = None) -> int:
        last, gone = f"{self.prefix}:last", []
        if before is not None:
            gone += self._call(lambda: self._db.zrangebyscore(last, "-inf", f"({before}"))
        if users is not None:
            total = self._call(lambda: self._db.zcard(last))
            gone += self._call(lambda: self._db.zrange(last, 0, total - users - 1)) if total > users else []
        for name in set(gone):
            self.forget(int(name[2:]) if name[0] == "i" else name[2:])
        return len(set(gone))

    def size(self) -> dict[str, float]:
        def measure() -> dict[str, float]:
            names = self._db.zrange(f"{self.prefix}:last", 0, -1)
            events = total = 0
            for name in names:
                for kind in ("events", "attributes"):
                    total += self._db.memory_usage(f"{self.prefix}:{kind}:{name!s}") or 0
                events += self._db.hlen(f"{self.prefix}:events:{name!s}")
            total += self._db.memory_usage(f"{self.prefix}:last") or 0
            return {"users": len(names), "events": events, "bytes": total, "bytes_per_user": total / max(len(names), 1)}

        return self._call(measure)

    def close(self) -> None:
        self._db.close()

    def _name(self, user: UserId) -> str:
        return f"i:{user}" if isinstance(user, int) else f"s:{user}"

    def _call(self, do: Any) -> Any:
        try:
            return do()
        except self._errors as error:
            raise StoreError(f"{self.path}: the Redis server did not answer as it should ({error})") from error


_APPEND = """
local new = {}
for group = 1, tonumber(ARGV[1]) do new[group] = 0 end
for place = 2, #ARGV do
  local user, id, time, event, group = unpack(cjson.decode(ARGV[place]))
  local key = KEYS[1] .. ':events:' .. user
  local number = redis.call('HLEN', key)
  new[group] = new[group] + redis.call('HSETNX', key, id, '[' .. event .. ',' .. number .. ']')
  redis.call('ZADD', KEYS[1] .. ':last', 'GT', time, user)
end
return new
"""


def open_store(where: "str | Path | Store") -> Store:
    """The store at a file's path or a `redis://` address; a store is itself."""
    if isinstance(where, str) and where.startswith(("redis://", "rediss://", "unix://")):
        return RedisStore(where)
    return SqliteStore(where) if isinstance(where, str | Path) else where
