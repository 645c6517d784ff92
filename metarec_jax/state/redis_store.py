"""RedisStore: users in a Redis server."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metarec_jax.errors import StoreError
from metarec_jax.state.events import VERSION, Event, Stored, StoredUser, UserId


class RedisStore:
    """A store in a Redis server, for several processes that serve the same users.

    Durability depends on the server. Acknowledged events survive a crash with `appendonly yes` and `appendfsync
    always`, but not with Redis' defaults.

    Args:
      url: `redis://host:port/database`.
      prefix: prefix of the keys.

    Raises:
      StoreError: the package `redis` is missing, no server answers, or the keys were written by a newer version.
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
            if version < VERSION:  # every older value can be read
                self._db.set(f"{prefix}:version", VERSION)
        except (redis.RedisError, ValueError) as error:
            raise StoreError(f"{url}: no Redis server answers there ({error})") from error
        if version > VERSION:
            raise StoreError(f"{url}: keys of version {version}, this package reads {VERSION}; update the package")
        self._append = self._db.register_script(_APPEND)

    def append(self, *groups: Iterable[Event]) -> list[int]:
        now, packed = time.time(), []
        for group, events in enumerate(groups):
            for e in events:
                at = now if e.time is None else e.time
                event = json.dumps([e.item, e.kind, e.value, at, *([dict(e.context)] if e.context else [])])
                packed.append(json.dumps([self._name(e.user), e.id or uuid.uuid4().hex, f"{at:.6f}", event, group + 1]))
        return self._call(lambda: self._append(keys=[self.prefix], args=[len(groups), *packed]))

    def describe(self, user: UserId, attributes: Mapping[str, Any]) -> None:
        name = self._name(user)

        def write() -> None:
            with self._db.pipeline(transaction=True) as pipe:
                pipe.set(f"{self.prefix}:attributes:{name}", json.dumps(dict(attributes)))
                pipe.zadd(f"{self.prefix}:last", {name: time.time()}, gt=True)
                pipe.execute()

        self._call(write)

    def read(self, users: Sequence[UserId], longest: int) -> list[StoredUser]:
        def fetch() -> list[Any]:
            with self._db.pipeline(transaction=False) as pipe:
                for user in users:
                    pipe.get(f"{self.prefix}:attributes:{self._name(user)}")
                    pipe.hgetall(f"{self.prefix}:events:{self._name(user)}")
                return pipe.execute()

        answers = self._call(fetch)
        stored_users = []
        for attributes, events in zip(answers[::2], answers[1::2], strict=True):
            numbered = [(Stored(*event), number) for event, number in map(json.loads, events.values())]
            numbered.sort(key=lambda pair: (pair[0].time, pair[1]))
            stored_users.append(StoredUser(json.loads(attributes or "{}"), [event for event, _ in numbered[-longest:]]))
        return stored_users

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
        last, evicted = f"{self.prefix}:last", []
        if before is not None:
            evicted += self._call(lambda: self._db.zrangebyscore(last, "-inf", f"({before}"))
        if users is not None:
            total = self._call(lambda: self._db.zcard(last))
            evicted += self._call(lambda: self._db.zrange(last, 0, total - users - 1)) if total > users else []
        for name in set(evicted):
            self.forget(int(name[2:]) if name[0] == "i" else name[2:])
        return len(set(evicted))

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
            raise StoreError(f"{self.path}: the request to the Redis server failed ({error})") from error


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
