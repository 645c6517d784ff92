"""Endpoints: the handlers of the service, each from a request to the content of its response."""

import asyncio
import json
from collections.abc import Callable, Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from metarec_jax.serving.batcher import Batcher, Overloaded
from metarec_jax.serving.service import OPTIONS, Service
from metarec_jax.serving.telemetry import Telemetry

LARGEST = 4 << 20  # maximum bytes of a request
RECOMMEND = ("user", "history", "attributes", "k", "where", *OPTIONS)  # names that a request may hold, by endpoint
UPDATE = ("events",)
EXPLAIN = ("item", "user", "history", "attributes", "context")
DESCRIBE = ("user", "attributes")
FORGET = ("user",)
FIND = ("search", "id")
START = ("k",)


class BadRequest(Exception):
    """A rejected request: `status` is the HTTP status, the message is for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Endpoints:
    """Handlers that return a JSON value or a `Response`.

    Recommendations and updates are batched. Other calls of the service run in threads of their own.

    Args:
      service: the service behind the endpoints.
      largest: maximum number of requests per batch.
      budget: seconds that a request may wait to be batched with others.
      waiting: maximum number of waiting requests, and of other calls at a time; further ones raise `Overloaded`.
    """

    def __init__(self, service: Service, *, largest: int, budget: float, waiting: int) -> None:
        self.service = service
        self.recommending = Batcher(service.recommend, largest=largest, budget=budget, waiting=waiting)
        self.updating = Batcher(service.update, largest=largest, budget=budget, waiting=waiting)
        self.telemetry = Telemetry(
            lambda: len(self.recommending) + len(self.updating), lambda: self.service.current.version
        )
        self._calls = asyncio.Semaphore(waiting)

    async def close(self) -> None:
        """Answer the accepted requests and store the accepted events, then stop."""
        await self.recommending.close()
        await self.updating.close()

    async def recommend(self, request: Request) -> Any:
        """Rank items for a user; `POST /v1/recommend`."""
        return await self.recommending.submit(await _body(request, RECOMMEND))

    async def update(self, request: Request) -> Any:
        """Store events; `POST /v1/update`."""
        events = (await _body(request, UPDATE)).get("events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise BadRequest(400, 'expected {"events": [{"user": ..., "item": ..., "kind": ...}, ...]}')
        result = await self.updating.submit(events)
        self.telemetry.stored(result["new"])
        return result

    async def explain(self, request: Request) -> Any:
        """Explain an item's score; `POST /v1/explain`."""
        return await self._in_thread(self.service.explain, await _body(request, EXPLAIN))

    async def describe(self, request: Request) -> Any:
        """Store a user's attributes; `POST /v1/describe`."""
        body = await _body(request, DESCRIBE)
        if "user" not in body or not isinstance(body.get("attributes"), dict):
            raise BadRequest(400, 'expected {"user": ..., "attributes": {...}}')
        await self._in_thread(self.service.current.describe_user, body["user"], body["attributes"])
        return {}

    async def forget(self, request: Request) -> Any:
        """Delete a user; `POST /v1/forget`."""
        body = await _body(request, FORGET)
        if "user" not in body:
            raise BadRequest(400, 'expected {"user": ...}')
        return {"events": await self._in_thread(self.service.current.forget, body["user"])}

    async def find(self, request: Request) -> Any:
        """Look items up by title or by id; `GET /v1/items`."""
        query = _query(request, FIND, several=("id",))
        if query.keys() == {"search", "id"}:
            raise BadRequest(400, "search or id, not both")
        if "id" in query:
            return {"items": await self._in_thread(self.service.items, query["id"])}
        return {"items": await self._in_thread(self.service.find, query.get("search", [""])[0][:200])}

    async def start(self, request: Request) -> Any:
        """List varied items for a user without a history; `GET /v1/start`."""
        (k,) = _query(request, START).get("k", ["12"])
        return await self._in_thread(self.service.start, int(k) if k.isascii() and k.isdigit() else k)

    async def fields(self, request: Request) -> Any:
        """List the fields that group items; `GET /v1/fields`."""
        _query(request, ())
        return await self._in_thread(self.service.fields)

    async def model(self, request: Request) -> Any:
        """Describe the model in use; `GET /v1/model`."""
        return self.service.describe()

    async def reload(self, request: Request) -> Any:
        """Reload the model folder; `POST /v1/model/reload`."""
        return {"model": await asyncio.get_running_loop().run_in_executor(None, self.service.reload)}

    async def health(self, request: Request) -> Response:
        """Report whether all programs are compiled; `GET /health`."""
        ready = self.service.ready
        state = {"status": "ok" if ready else "starting", "model": self.service.current.version}
        return JSONResponse(state, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format; `GET /metrics`."""
        return self.telemetry.exposition()

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run `work` in a thread; raise `Overloaded` if the limit of concurrent calls is reached."""
        if self._calls.locked():
            raise Overloaded
        async with self._calls:
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
