"""The recommender in use: training time, latency and throughput in process and over HTTP, a million items, the store.

    python benchmarks/serving.py                  # everything; needs pip install -e '.[serve]'
    python benchmarks/serving.py --only process   # or train, reuse, ready, http, million, store, start, explain

Each figure stands beside a peer of the same run: implicit's ALS (fold-in and the top 10), where it is installed, and
for HTTP the same server with a handler that does nothing. Device and versions are printed.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.sparse import csr_matrix

import metarec_jax as mr

PARTS = ("train", "process", "reuse", "ready", "http", "million", "store", "start", "explain")


def spread(seconds: list[float]) -> str:
    """Median and 99th percentile in ms."""
    return f"{np.median(seconds) * 1e3:.2f} | {np.quantile(seconds, 0.99) * 1e3:.2f}"


def timed(work: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each of so many calls, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return found


def histories(recommender: mr.Recommender, users: int, length: int = 20) -> list[dict[Any, float]]:
    """Random users with so many ratings each."""
    rng = np.random.default_rng(0)
    ids = recommender.stock.trained.ids
    return [
        {
            i: float(r)
            for i, r in zip(rng.choice(ids, length, replace=False).tolist(), rng.integers(1, 6, length), strict=True)
        }
        for _ in range(users)
    ]


TRAIN = """
import sys, time
import metarec_jax as mr
data = mr.data.load("ml-100k")
begun = time.perf_counter()
mr.train(data, sys.argv[1], ratings=sys.argv[2] or None, progress=False)
print(time.perf_counter() - begun)
"""


def train(times: int = 3) -> None:
    """Seconds of a training of MovieLens-100K in a new process, with an empty and with a warm compilation cache."""
    print("\n| train ml-100k | empty cache, s | warm cache, s: median (range) |\n|---|---|---|")
    for strategy, ratings in (("stack", "als"), ("stack", ""), ("ials", "")):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            command = [sys.executable, "-c", TRAIN, strategy, ratings]
            runs = [subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(1 + times)]
        cold, *warm = (float(run.stdout) for run in runs)
        name = f"{strategy}, and {ratings} for ratings" if ratings else strategy
        print(f"| {name} | {cold:.1f} | {np.median(warm):.1f} ({min(warm):.1f} to {max(warm):.1f}) |")
    if (fitted := implicit_als()) is not None:
        print(f"| {fitted.name}, 15 iterations | | {fitted.seconds:.1f} |")


def process(recommender: mr.Recommender) -> None:
    """Adapt and the full-catalogue top 10, in process."""
    users = histories(recommender, 2048)
    turns = iter(users * 2)
    one = timed(lambda: recommender.recommend(next(turns), k=10), 1000)
    several = timed(lambda: recommender.batch.recommend(users, k=10), 5)
    print("\n| in process | median, ms | p99, ms | users/s |\n|---|---|---|---|")
    what = f"one user: adapt, top 10 of {len(recommender.stock) - 1:,} items"
    print(f"| {what} | {spread(one)} | {1 / np.median(one):,.0f} |")
    print(f"| 2,048 users in one call | | | {2048 / np.median(several):,.0f} |")
    implicit_process(users)


class Peer(NamedTuple):
    """ALS of implicit, fitted to MovieLens-100K."""

    name: str
    model: Any
    data: mr.data.Dataset
    seconds: float


def implicit_als() -> Peer | None:
    """Fit ALS of the same width by implicit; None if it is not installed."""
    try:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        import implicit
    except ImportError:
        print("\nimplicit is not installed: no peer (pip install implicit)")
        return None
    data = mr.data.load("ml-100k")
    liked = data.rating >= 4
    shape = (len(data.users), len(data.items))
    known = csr_matrix((np.ones(liked.sum(), np.float32), (data.user[liked], data.item[liked])), shape=shape)
    model = implicit.als.AlternatingLeastSquares(factors=64, iterations=15, random_state=0, use_gpu=False)
    begun = time.perf_counter()
    model.fit(known, show_progress=False)
    return Peer(f"implicit {implicit.__version__} ALS, 64 factors", model, data, time.perf_counter() - begun)


def implicit_process(users: list[dict[Any, float]]) -> None:
    """The same by implicit: users folded in."""
    peer = implicit_als()
    if peer is None:
        return
    model, data = peer.model, peer.data

    def rows(histories: list[dict[Any, float]]) -> Any:
        encoded = [data.items.encode([i for i, r in h.items() if r >= 4]) for h in histories]
        starts = np.cumsum([0, *map(len, encoded)])
        return csr_matrix(
            (np.ones(starts[-1], np.float32), np.concatenate(encoded), starts), shape=(len(encoded), len(data.items))
        )

    turns = iter(users * 2)
    one = timed(lambda: model.recommend(0, rows([next(turns)]), N=10, recalculate_user=True), 1000)
    numbers = np.arange(len(users))
    several = timed(lambda: model.recommend(numbers, rows(users), N=10, recalculate_user=True), 5)
    name = f"{peer.name}, fold-in"
    print(f"| {name}: one user | {spread(one)} | {1 / np.median(one):,.0f} |")
    print(f"| {name}: 2,048 users in one call | | | {2048 / np.median(several):,.0f} |")


EMPTY = """
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
async def answer(request):
    await request.body()
    return JSONResponse({{"items": []}})
routes = [Route("/v1/recommend", answer, methods=["POST"]), Route("/health", answer)]
uvicorn.run(Starlette(routes=routes), port={port}, log_level="warning")
"""


@contextmanager
def server(command: list[str], port: int, path: str = "GET /health", body: bytes = b"") -> Iterator[None]:
    """A process that has answered this request with 200."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(2400):
            try:
                if asyncio.run(load_on(port, path, [body], 1, 0.0))[1]:
                    break
            except OSError:
                pass
            time.sleep(0.05)
        else:
            raise SystemExit(f"{command} did not start")
        yield
    finally:
        running.terminate()
        running.wait()


async def load_on(
    port: int, path: str, bodies: list[bytes], clients: int, seconds: float
) -> tuple[float, list[float], int]:
    """Requests for so long from so many clients, each with a connection of its own: requests/s, the seconds of each
    answered with 200, and how many were not."""
    latencies: list[float] = []
    bad, until, begun = 0, time.perf_counter() + seconds, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal bad
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        place = number
        while True:
            body = bodies[place % len(bodies)]
            place += clients
            head = (
                f"{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            sent = time.perf_counter()
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(answer.split(b"content-length: ")[1].split(b"\r\n")[0]))
            if answer.startswith(b"http/1.1 200"):
                latencies.append(time.perf_counter() - sent)
            else:
                bad += 1
            if time.perf_counter() >= until:
                writer.close()
                return

    await asyncio.gather(*(client(number) for number in range(clients)))
    return len(latencies) / (time.perf_counter() - begun), latencies, bad


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def http(recommender: mr.Recommender, seconds: float) -> None:
    """64 clients, each with one request at a time."""
    bodies = [json.dumps({"history": list(h.items()), "k": 10}).encode() for h in histories(recommender, 512)]
    print("\n| HTTP, 64 clients | requests/s | median, ms | p99, ms | not 200 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        recommender.save(f"{folder}/model")
        port = free_port()
        ours = [sys.executable, "-m", "metarec_jax.cli", "serve", f"{folder}/model", "--users", f"{folder}/users.db"]
        events = [
            json.dumps({"events": [{"user": i, "item": 1 + i % 100, "kind": "click"}]}).encode() for i in range(4096)
        ]
        with server([*ours, "--port", str(port)], port):
            for name, path, sent in (
                ("recommend, top 10 for a history of 20", "POST /v1/recommend", bodies),
                ("update, one event on the disk", "POST /v1/update", events),
            ):
                asyncio.run(load_on(port, path, sent, 64, 2.0))
                rate, latencies, bad = asyncio.run(load_on(port, path, sent, 64, seconds))
                print(f"| {name} | {rate:,.0f} | {spread(latencies)} | {bad} |")
        port = free_port()
        with server([sys.executable, "-c", EMPTY.format(port=port)], port):
            rate, latencies, bad = asyncio.run(load_on(port, "POST /v1/recommend", bodies, 64, seconds))
            print(f"| a handler that does nothing (Starlette, uvicorn) | {rate:,.0f} | {spread(latencies)} | {bad} |")


def million(strategy: str, items: int, users: int) -> None:
    """The exact top 100 of a synthetic catalogue, in a process of its own."""
    rng = np.random.default_rng(0)
    n = 200_000
    data = mr.data.from_tables(
        {
            "user_id": np.repeat(np.arange(n // 20), 20),
            "item_id": (rng.permutation(items)[:n] if items >= n else rng.integers(0, items, n)),
            "rating": rng.integers(1, 6, n),
        },
        items={"item_id": np.arange(items), "price": rng.lognormal(size=items)},
    )
    objective = "ranking" if strategy in mr.strategies.RANKING else "click"
    recommender = mr.train(data, strategy, objective=objective, epochs=1, progress=False)
    sent = histories(recommender, users)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begun = time.perf_counter()
    recommender.batch.recommend(sent, k=100)
    first = time.perf_counter() - begun
    seconds = timed(lambda: recommender.batch.recommend(sent, k=100), 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"| {strategy}, exact top 100 of {items:,} items for {users} users | {np.median(seconds):.2f} | {first:.2f} | "
        f"{peak / 1e9:.2f} | {before / 1e9:.2f} |"
    )


def store(users: int) -> None:
    """Bytes and speed of the file of users."""
    with tempfile.TemporaryDirectory() as folder:
        kept, rng = mr.SqliteStore(f"{folder}/users.db"), np.random.default_rng(0)
        begun = time.perf_counter()
        for start in range(0, users, 10_000):
            kept.append(
                [
                    mr.Event(user, int(item), "click", time=1.6e9 + float(at), id=f"{user}-{at}")
                    for user in range(start, start + 10_000)
                    for at, item in enumerate(rng.integers(0, 1_000_000, 10))
                ]
            )
        seconds = time.perf_counter() - begun
        single = timed(lambda: kept.append([mr.Event(int(rng.integers(users)), 5, "click")]), 300)
        reading = timed(lambda: kept.read([int(rng.integers(users))], 512), 1000)
        size = kept.size()
        per_user = size["bytes_per_user"]
        print(f"\nStore, {users:,} users with 10 events each: {per_user:.0f} bytes a user, {per_user / 100:.1f} GB for "
              f"ten million; {users * 10 / seconds:,.0f} events/s in large calls")  # fmt: skip
        print(f"One event to the disk: median | p99 {spread(single)} ms; one user read: {spread(reading)} ms")


def start(recommender: mr.Recommender) -> None:
    """From the start of the process to the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        recommender.save(f"{folder}/model")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        ours = [sys.executable, "-m", "metarec_jax.cli", "serve", f"{folder}/model", "--users", f"{folder}/users.db"]
        for cache in ("empty", "warm", "warm"):
            port, begun = free_port(), time.perf_counter()
            with server([*ours, "--port", str(port)], port, "POST /v1/recommend", b'{"history": [[50, 5]]}'):
                print(
                    f"\nFirst answer of a fresh server, {cache} compilation cache: {time.perf_counter() - begun:.1f} s"
                )


def explain(recommender: mr.Recommender) -> None:
    """How well the gradient stands for leaving out, and what both cost."""
    found, seconds = [], []
    for history in histories(recommender, 200):
        item = recommender.recommend(history, k=1)[0].item
        begun = time.perf_counter()
        found.append(recommender.explain(history, item).agreement)
        seconds.append(time.perf_counter() - begun)
    low, high = np.quantile(found, [0.05, 0.95])
    print(
        f"\nExplain, 200 users of 20 ratings: rank correlation of gradient and leave-one-out {np.mean(found):.3f} on "
        f"average (5 to 95 %: {low:.3f} to {high:.3f}); both and the fields took median | p99 {spread(seconds[1:])} ms"
    )


def reuse(recommender: mr.Recommender) -> None:
    """Time of another store, of new items and of a loaded model in a warm process, and of the first list after it."""
    (history,) = histories(recommender, 1)
    text = recommender.stock.trained.ids.dtype.kind == "U"
    recommender.recommend(history)
    print("\n| in a warm process | call, ms | first list after it, ms |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        recommender.save(Path(folder) / "model")
        new = [f"new {i}" if text else 10**9 + i for i in range(20)]
        calls: dict[str, Callable[[int], mr.Recommender]] = {
            "with_users": lambda i: recommender.with_users(Path(folder) / f"users-{i}.db"),
            "add_items": lambda i: recommender.add_items({"item_id": [new[i]]}),
            "load": lambda i: mr.load(Path(folder) / "model"),
        }
        for name, call in calls.items():
            times = []
            for i in range(10):
                begun = time.perf_counter()
                other = call(i)
                made = time.perf_counter()
                other.recommend(history)
                times.append((made - begun, time.perf_counter() - made))
            print(f"| {name} | " + " | ".join(f"{np.median(t) * 1e3:.0f}" for t in zip(*times, strict=True)) + " |")


def ready(recommender: mr.Recommender) -> None:
    """How long a service compiles, and what the first request of each kind then takes beyond later ones."""
    from metarec_jax.serving import Service

    items = recommender.stock.trained.ids[:200].tolist()
    field = next((f for f in recommender.stock.fields if f.kind in ("categorical", "multi")), None)
    kinds: dict[str, dict[str, Any]] = {
        "3 items": {"history": items[:3]},
        "40 items": {"history": items[:40]},
        "200 items": {"history": items},
        "k 50": {"history": items[:3], "k": 50},
        "k 1000": {"history": items[:3], "k": 1000},
        "deviation": {"history": items[:3], "deviation": True},
        "ucb": {"history": items[:3], "explore": "ucb"},
        "thompson": {"history": items[:3], "explore": "thompson"},
        "diversity": {"history": items[:3], "diversity": 0.3},
        "by a share of the rating": {"history": items[:3], "by": 0.3},
        "only": {"history": items[:3], "only": items},
    }
    if field is not None and field.vocabulary is not None:
        kinds["where"] = {"history": items[:3], "where": {field.name: [field.vocabulary.ids[0].item()]}}
    with tempfile.TemporaryDirectory() as folder:
        recommender.save(Path(folder) / "model")
        service = Service(Path(folder) / "model")
        begun = time.perf_counter()
        service.warm()
        print(
            f"\nready after {time.perf_counter() - begun:.0f} s\n\n| request | first, ms | later, ms |\n|---|---|---|"
        )
        for name, request in kinds.items():
            times = []
            for _ in range(21):
                begun = time.perf_counter()
                (answer,) = service.recommend([request])
                times.append(time.perf_counter() - begun)
                assert not isinstance(answer, Exception), answer
            print(f"| {name} | {times[0] * 1e3:.1f} | {np.median(times[1:]) * 1e3:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", type=Path, help="a saved ml-100k model (default: one is trained)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load on each endpoint")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--stored", type=int, default=200_000, help="users in the store")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return million(given.child, given.items, given.users)
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}")
    if "train" in given.only:
        train()
    if given.only == ["train"]:
        return None
    recommender = mr.load(given.model) if given.model else mr.train(mr.data.load("ml-100k"), progress=False)
    if "process" in given.only:
        process(recommender)
    if "reuse" in given.only:
        reuse(recommender)
    if "ready" in given.only:
        ready(recommender)
    if "http" in given.only:
        http(recommender, given.seconds)
    if "million" in given.only:
        print("\n| catalogue | s | first call, s | peak memory, GB | of that before |\n|---|---|---|---|---|")
        for strategy in ("alpaca", "ridge", "ials"):
            sizes = ["--items", str(given.items), "--users", str(given.users)]
            subprocess.run([sys.executable, __file__, "--child", strategy, *sizes], check=True)
    if "store" in given.only:
        store(given.stored)
    if "start" in given.only:
        start(recommender)
    if "explain" in given.only:
        explain(recommender)


if __name__ == "__main__":
    main()
