"""Stores of users: the same tests for SQLite and a real Redis server; SQLite also survives kill -9."""

import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from metarec_jax.errors import StoreError
from metarec_jax.state.events import VERSION, Event, Stored
from metarec_jax.state.redis_store import RedisStore
from metarec_jax.state.sqlite_store import APPLICATION, SqliteStore
from metarec_jax.state.stores import open_store


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    options = [
        "--port",
        str(port),
        "--dir",
        str(folder),
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--save",
        "",
    ]
    running = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    for _ in range(100):
        try:
            RedisStore(url).close()
            break
        except StoreError:
            time.sleep(0.05)
    yield url
    running.terminate()
    running.wait()


@pytest.fixture(params=["sqlite", "redis"])
def store(request, tmp_path):
    if request.param == "sqlite":
        found = SqliteStore(tmp_path / "users.db")
    else:
        found = RedisStore(request.getfixturevalue("redis_url"), prefix=tmp_path.name)
    yield found
    found.close()


def event(user, item, at, kind="click", value=None, name=None):
    return Event(user, item, kind, value, float(at), name or f"{item}-{at}")


def test_events_come_back_in_the_order_of_time(store):
    sent = [event("ann", 5, 30), event("ann", 6, 10, "rating", 4.5), event("ann", 7, 10, "dismiss"), event(8, "x", 1)]
    assert store.append(sent) == [4]
    ann, eight, nobody, text = store.read(["ann", 8, "bob", "8"], longest=10)
    assert ann.events == [
        Stored(6, "rating", 4.5, 10.0),
        Stored(7, "dismiss", None, 10.0),
        Stored(5, "click", None, 30.0),
    ]
    assert eight.events == [Stored("x", "click", None, 1.0)]
    assert nobody == text == ({}, [])
    assert [e.item for e in store.read(["ann"], longest=2)[0].events] == [7, 5]


def test_an_event_that_comes_again_counts_once(store):
    assert store.append([event(1, 5, 10, name="a"), event(1, 6, 11, name="a")]) == [1]
    assert store.append([event(1, 5, 10, name="a")], [event(1, 7, 12, name="b"), event(2, 5, 10, name="a")]) == [0, 2]
    assert [e.item for e in store.read([1], 10)[0].events] == [5, 7]
    assert store.append([Event(1, 9, "click", None, 20.0), Event(1, 9, "click", None, 20.0)]) == [2]  # without ids


def test_the_context_of_an_event_is_kept(store):
    phone = {"device": "phone", "tags": ["a", "b"], "hour": 8.5, "zoë ☃": True}
    store.append(
        [event("ann", 1, 1)._replace(context=phone), event("ann", 2, 2), event("ann", 3, 3)._replace(context={})]
    )
    assert [e.context for e in store.read(["ann"], 10)[0].events] == [phone, None, None]
    assert store.read(["ann"], 2)[0].events[-1].context is None


def test_attributes_are_kept_and_replaced(store):
    store.describe("ann", {"age": 30, "country": "nl"})
    store.append([event("ann", 1, 1)])
    store.describe("ann", {"age": 31})
    assert store.read(["ann"], 10)[0].attributes == {"age": 31}


def test_ids_of_64_bits_and_strings_of_any_language(store):
    for user in (2**63 - 1, -(2**63), "zoë ☃", "a'; DROP TABLE user; --"):
        store.append([event(user, 2**62 + 1, 1)])
        assert store.read([user], 10)[0].events[0].item == 2**62 + 1


def test_a_forgotten_user_leaves_nothing_and_others_stay(store):
    store.append([event("ann", 1, 1), event("ann", 2, 2), event("bob", 3, 3)])
    store.describe("ann", {"age": 30})
    assert store.forget("ann") == 2
    assert store.forget("ann") == 0
    ann, bob = store.read(["ann", "bob"], 10)
    assert ann == ({}, [])
    assert len(bob.events) == 1
    assert store.size()["users"] == 1


def test_idle_users_are_evicted(store):
    for user in range(10):
        store.append([event(user, 1, 100 + user)])
    assert store.evict(before=103.0) == 3
    assert store.evict(users=4) == 3
    assert [bool(p.events) for p in store.read(range(10), 1)] == [False] * 6 + [True] * 4
    assert store.evict(users=100) == 0


def test_its_size_is_reported(store):
    for user in range(50):
        store.append([event(user, i, i) for i in range(10)])
    size = store.size()
    assert (size["users"], size["events"]) == (50, 500)
    assert 100 < size["bytes_per_user"] == size["bytes"] / 50 < 5000


def test_ten_thousand_events_at_once_and_from_many_threads(store):
    assert store.append([event("ann", i, i) for i in range(10_000)]) == [10_000]
    work = [
        threading.Thread(target=lambda t=t: [store.append([event("bob", t, i)]) for i in range(25)]) for t in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    ann, bob = store.read(["ann", "bob"], longest=20_000)
    assert (len(ann.events), len(bob.events)) == (10_000, 200)


def test_what_is_deleted_is_not_in_the_files(tmp_path):
    store = SqliteStore(tmp_path / "users.db")
    secret = "a-name-that-nobody-else-has"
    store.append([event(secret, i, i) for i in range(300)] + [event("bob", i, i) for i in range(300)])
    store.describe(secret, {"note": "a-secret-attribute"})
    written = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert secret.encode() in written
    store.forget(secret)
    written = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert secret.encode() not in written
    assert b"a-secret-attribute" not in written
    assert len(store.read(["bob"], 500)[0].events) == 300


def test_a_deletion_that_cannot_be_complete_says_so(tmp_path):
    store = SqliteStore(tmp_path / "users.db")
    store._db.execute("PRAGMA busy_timeout = 50")
    store.append([event("ann", 1, 1)])
    reader = sqlite3.connect(tmp_path / "users.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM user").fetchall()
    with pytest.raises(StoreError, match="another process reads the file"):
        store.forget("ann")
    reader.close()
    assert store.forget("ann") == 0
    assert b"ann" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())


def test_a_file_damaged_after_opening_is_named_when_read(tmp_path):
    store = SqliteStore(tmp_path / "users.db")
    store.append([event(user, i, i) for user in range(200) for i in range(10)])
    store.close()
    content = bytearray((tmp_path / "users.db").read_bytes())
    content[2 * 4096 :] = b"\xff" * len(content[2 * 4096 :])
    (tmp_path / "users.db").write_bytes(content)
    damaged = SqliteStore(tmp_path / "users.db")
    for use in (lambda: damaged.read(range(200), 10), damaged.size):
        with pytest.raises(StoreError, match=r"users\.db: cannot be read"):
            use()


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, and long enough to have a header" * 100)
    with pytest.raises(StoreError, match="cannot be opened as a store"):
        SqliteStore(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(StoreError, match="none of metarec_jax"):
        SqliteStore(tmp_path / "other.db")
    newer = SqliteStore(tmp_path / "newer.db")
    newer._db.execute(f"PRAGMA user_version = {VERSION + 1}")
    newer.close()
    with pytest.raises(StoreError, match="written by a newer metarec_jax"):
        SqliteStore(tmp_path / "newer.db")
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteStore(tmp_path / "no" / "folder.db")


def test_a_file_of_version_1_is_brought_to_this_version_with_its_events(tmp_path):
    old = sqlite3.connect(tmp_path / "users.db")
    old.executescript(
        f"""
        PRAGMA application_id = {APPLICATION};
        PRAGMA user_version = 1;
        CREATE TABLE user (key INTEGER PRIMARY KEY, id UNIQUE NOT NULL, attributes TEXT,
          last REAL NOT NULL, changes INTEGER NOT NULL);
        CREATE TABLE event (user INTEGER NOT NULL, id TEXT NOT NULL, number INTEGER NOT NULL,
          item NOT NULL, kind TEXT NOT NULL, value REAL, time REAL NOT NULL, PRIMARY KEY (user, id)) WITHOUT ROWID;
        CREATE INDEX idle ON user (last);
        INSERT INTO user VALUES (1, 'ann', '{{"age": 30}}', 20.0, 2);
        INSERT INTO event VALUES (1, 'a', 1, 5, 'rating', 4.5, 10.0), (1, 'b', 2, 6, 'click', NULL, 20.0);
        """
    )
    old.close()
    before = [Stored(5, "rating", 4.5, 10.0), Stored(6, "click", None, 20.0)]
    for _ in range(2):  # opened by this version, and opened again
        store = SqliteStore(tmp_path / "users.db")
        assert store.read(["ann"], 2) == [({"age": 30}, before)]
        store.close()
    store = SqliteStore(tmp_path / "users.db")
    new = event("ann", 7, 30)._replace(context={"device": "tv"})
    assert store.append([new, event("ann", 5, 10, name="a")]) == [1]
    assert store.read(["ann"], 9)[0].events == [*before, Stored(7, "click", None, 30.0, {"device": "tv"})]
    assert store._db.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_redis_values_of_version_1_have_no_context(redis_url):
    store = RedisStore(redis_url, prefix="older")
    store._db.set("older:version", 1)
    store._db.hset("older:events:s:ann", "a", '[[5,"rating",4.5,10.0],0]')
    store = RedisStore(redis_url, prefix="older")
    assert store.read(["ann"], 2)[0].events == [Stored(5, "rating", 4.5, 10.0)]
    assert store._db.get("older:version") == str(VERSION)


def test_a_newer_or_absent_redis_is_refused(redis_url):
    store = RedisStore(redis_url, prefix="newer")
    store._db.set("newer:version", VERSION + 1)
    with pytest.raises(StoreError, match="update the package"):
        RedisStore(redis_url, prefix="newer")
    with pytest.raises(StoreError, match="no Redis server answers"):
        RedisStore("redis://127.0.0.1:1/0")


def test_a_full_disk_keeps_all_or_nothing(tmp_path):
    store = SqliteStore(tmp_path / "users.db")
    store.append([event("ann", 1, 1)])
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="nothing of this call was kept"):
        store.append([event("ann", i, i) for i in range(10_000)])
    assert len(store.read(["ann"], 100)[0].events) == 1
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.append([event("ann", 2, 2)]) == [1]


def test_stores_are_opened_by_path_or_address(tmp_path, redis_url):
    assert isinstance(open_store(tmp_path / "a.db"), SqliteStore)
    assert isinstance(open_store(redis_url), RedisStore)
    own = SqliteStore()
    assert open_store(own) is own


WRITER = """
    import os, sys
    from metarec_jax.state.events import Event
    from metarec_jax.state.sqlite_store import SqliteStore

    path, cycles = sys.argv[1], int(sys.argv[2])
    for line in sys.stdin:  # a cycle: a child writes until it is killed
        first = int(line)
        child = os.fork()
        if not child:
            store = SqliteStore(path)
            number = first
            while True:
                size, user, at = 1 + number % 4, number % 7, 1.0 + number
                store.append([Event(user, i, "click", None, at, f"{number}-{i}") for i in range(size)])
                os.write(1, f"{number}\\n".encode())  # acknowledged
                number += 1
        os.write(1, f"child {child}\\n".encode())  # one write: nothing comes in between
        os.waitpid(child, 0)
        os.write(1, b"dead\\n")
"""


def test_no_acknowledged_event_is_lost_when_writers_are_killed_at_any_moment(tmp_path):
    path, cycles, rng = tmp_path / "users.db", 200, random.Random(0)
    SqliteStore(path).close()
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITER), str(path), str(cycles)]
    acknowledged, first = [], 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as parent:
        for _ in range(cycles):
            parent.stdin.write(f"{first}\n")
            parent.stdin.flush()
            child, seen = None, []
            wanted, pause = rng.randrange(0, 4), rng.random() * 0.004
            for line in parent.stdout:
                if line.startswith("child"):
                    child = int(line.split()[1])
                elif line.startswith("dead"):
                    break
                else:
                    seen.append(int(line))
                if child and len(seen) >= wanted:
                    time.sleep(pause)
                    os.kill(child, 9)
                    wanted = 10**9
            acknowledged += seen
            first = (max(seen) if seen else first) + 2  # the one after may have been kept without a word
    store = SqliteStore(path)  # opens after two hundred deaths
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = {name for (name,) in store._db.execute("SELECT id FROM event")}
    assert len(acknowledged) > cycles / 2
    assert {f"{number}-{i}" for number in acknowledged for i in range(1 + number % 4)} <= kept
    for number in {int(name.split("-")[0]) for name in kept}:  # whole calls only
        assert {f"{number}-{i}" for i in range(1 + number % 4)} <= kept
