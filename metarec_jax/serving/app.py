"""App: the service over HTTP (ASGI), as run by `metarec serve`."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from metarec_jax.errors import DataError, ModelFileError, OptionError, StoreError
from metarec_jax.serving.batcher import Batcher, Overloaded
from metarec_jax.serving.service import OPTIONS, Service

LARGEST = 4 << 20  # maximum bytes of a request
EXPLAIN = ("item", "user", "history", "attributes", "context")
RECOMMEND = ("user", "history", "attributes", "k", "where", *OPTIONS)
LOG = logging.getLogger("metarec_jax")
PAGE = Path(__file__).with_name("page")
PARTS = ("page.css", "page.js", "service.js", "tiles.js", "list.js")
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class BadRequest(Exception):
    """A rejected request: `status` is the HTTP status, the message is for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def create_app(
    service: Service,
    *,
    token: str | None = None,
    budget: float = 0.002,
    largest: int = 64,
    waiting: int = 512,
    ready: Callable[[], None] = lambda: None,
) -> Starlette:
    """Create the ASGI application; it compiles the model's programs in the background from its start.

    Args:
      service: the service behind the endpoints.
      token: token required as `Authorization: Bearer TOKEN`; None: no authentication (for loopback only).
      budget: seconds that a request may wait to be batched with others.
      largest: maximum number of requests per batch.
      waiting: maximum number of waiting requests; further ones get status 503.
      ready: called when all programs are compiled.
    """
    options: dict[str, Any] = {"largest": largest, "budget": budget, "waiting": waiting}
    recommending = Batcher(service.recommend, **options)
    updating = Batcher(service.update, **options)
    others = asyncio.Semaphore(waiting)
    registry = CollectorRegistry()
    answered = Counter("metarec_requests", "Requests answered.", ["path", "status"], registry=registry)
    seconds = Histogram(
        "metarec_request_seconds", "Time to answer.", ["path"], registry=registry,
        buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
    )  # fmt: skip
    stored_events = Counter("metarec_events", "Events kept.", registry=registry)
    Gauge("metarec_waiting", "Requests that wait.", registry=registry).set_function(
        lambda: len(recommending) + len(updating)
    )
    model = Gauge("metarec_model", "The model in use.", ["version"], registry=registry)

    async def recommend(request: Request) -> Any:
        return await recommending.submit(await _body(request, RECOMMEND))

    async def update(request: Request) -> Any:
        events = (await _body(request, ("events",))).get("events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise BadRequest(400, 'expected {"events": [{"user": ..., "item": ..., "kind": ...}, ...]}')
        result = await updating.submit(events)
        stored_events.inc(result["new"])
        return result

    async def explain(request: Request) -> Any:
        return await _in_thread(others, service.explain, await _body(request, EXPLAIN))

    async def describe(request: Request) -> Any:
        body = await _body(request, ("user", "attributes"))
        if "user" not in body or not isinstance(body.get("attributes"), dict):
            raise BadRequest(400, 'expected {"user": ..., "attributes": {...}}')
        await _in_thread(others, service.current.describe_user, body["user"], body["attributes"])
        return {}

    async def forget(request: Request) -> Any:
        body = await _body(request, ("user",))
        if "user" not in body:
            raise BadRequest(400, 'expected {"user": ...}')
        return {"events": await _in_thread(others, service.current.forget, body["user"])}

    async def find(request: Request) -> Any:
        query = _query(request, ("search", "id"), several=("id",))
        if query.keys() == {"search", "id"}:
            raise BadRequest(400, "search or id, not both")
        if "id" in query:
            return {"items": await _in_thread(others, service.items, query["id"])}
        return {"items": await _in_thread(others, service.find, query.get("search", [""])[0][:200])}

    async def start(request: Request) -> Any:
        (k,) = _query(request, ("k",)).get("k", ["12"])
        return await _in_thread(others, service.start, int(k) if k.isascii() and k.isdigit() else k)

    async def fields(request: Request) -> Any:
        _query(request, ())
        return await _in_thread(others, service.fields)

    async def version(request: Request) -> Any:
        return service.describe()

    async def reload(request: Request) -> Any:
        return {"model": await asyncio.get_running_loop().run_in_executor(None, service.reload)}

    async def health(request: Request) -> Response:
        state = {"status": "ok" if service.ready else "starting", "model": service.current.version}
        return JSONResponse(state, 200 if service.ready else 503)

    async def metrics(request: Request) -> Response:
        model.clear()
        model.labels(service.current.version).set(1)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def allowed(request: Request) -> None:
        authorization = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            raise BadRequest(401, "send the token: Authorization: Bearer TOKEN")

    def endpoint(answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def handled(request: Request) -> Response:
            begun, status, path = time.perf_counter(), 200, request.url.path
            try:
                allowed(request)
                content = await answer(request)
                return content if isinstance(content, Response) else JSONResponse(content)
            except BadRequest as error:
                status = error.status
                return _refusal(status, error, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
            except (DataError, ModelFileError, OptionError) as error:
                status = 409 if isinstance(error, ModelFileError) else 400
                return _refusal(status, error)
            except Overloaded:
                status = 503
                return _refusal(status, "too many requests are waiting; try again", {"Retry-After": "1"})
            except StoreError as error:
                status = 503
                return _refusal(status, error, {"Retry-After": "1"})
            except BaseException as error:
                status = 500
                if not isinstance(error, Exception):  # cancelled
                    raise
                number = uuid.uuid4().hex[:12]
                LOG.exception("request %s failed", number)
                return _refusal(status, f"internal error; the log of the server has it as request {number}")
            finally:
                answered.labels(path, str(status)).inc()
                seconds.labels(path).observe(time.perf_counter() - begun)

        return handled

    def file(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def send(request: Request) -> Response:
            return FileResponse(PAGE / name, headers=SAFE)

        return send

    def prepare() -> None:
        service.warm()
        ready()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        warming = asyncio.get_running_loop().run_in_executor(None, prepare)
        yield
        await warming
        await recommending.close()  # accepted requests are answered, accepted events stored
        await updating.close()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", file("index.html")),
            *(Route(f"/{name}", file(name)) for name in PARTS),
            Route("/health", health),
            Route("/metrics", endpoint(metrics)),
            Route("/v1/recommend", endpoint(recommend), methods=["POST"]),
            Route("/v1/update", endpoint(update), methods=["POST"]),
            Route("/v1/explain", endpoint(explain), methods=["POST"]),
            Route("/v1/describe", endpoint(describe), methods=["POST"]),
            Route("/v1/forget", endpoint(forget), methods=["POST"]),
            Route("/v1/items", endpoint(find)),
            Route("/v1/start", endpoint(start)),
            Route("/v1/fields", endpoint(fields)),
            Route("/v1/model", endpoint(version)),
            Route("/v1/model/reload", endpoint(reload), methods=["POST"]),
        ],
    )


async def _in_thread(limit: asyncio.Semaphore, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work` in a thread; raise `Overloaded` if the limit of concurrent calls is reached."""
    if limit.locked():
        raise Overloaded
    async with limit:
        return await asyncio.get_running_loop().run_in_executor(None, work, *args)


async def _body(request: Request, names: Collection[str]) -> dict[str, Any]:
    """Return the JSON object of a request; reject keys not in `names`."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise BadRequest(415, "send JSON, with Content-Type: application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise BadRequest(413, f"a request has at most {LARGEST} bytes; split it")
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"this is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(400, f"expected a JSON object, got {type(body).__name__}")
    if unknown := body.keys() - set(names):
        raise BadRequest(400, f"{min(unknown)[:50]!r} is unknown here; a request may hold {', '.join(names)}")
    return body


def _query(request: Request, names: Collection[str], several: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the query parameters of a request; only those in `several` may be repeated."""
    parameters: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name not in names:
            expected = ", ".join(names) or "no parameters"
            raise BadRequest(400, f"{name[:50]!r} is unknown here; an address may hold {expected}")
        if name in parameters and name not in several:
            raise BadRequest(400, f"{name} is given twice; give it once")
        parameters.setdefault(name, []).append(value)
    return parameters


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _refusal(status: int, why: Any, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": str(why)}, status, headers)
