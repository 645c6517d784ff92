"""App: the service over HTTP (ASGI), as run by `metarec serve`."""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from metarec_jax.errors import DataError, ModelFileError, OptionError, StoreError
from metarec_jax.serving.batcher import Overloaded
from metarec_jax.serving.endpoints import BadRequest, Endpoints
from metarec_jax.serving.service import Service
from metarec_jax.serving.telemetry import Telemetry

LOG = logging.getLogger("metarec_jax")
PAGE = Path(__file__).with_name("page")
PARTS = ("page.css", "page.js", "service.js", "tiles.js", "list.js")
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Handler = Callable[[Request], Awaitable[Any]]


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
    endpoints = Endpoints(service, largest=largest, budget=budget, waiting=waiting)

    def prepare() -> None:
        service.warm()
        ready()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        warming = asyncio.get_running_loop().run_in_executor(None, prepare)
        yield
        await warming
        await endpoints.close()

    def route(method: str, path: str, handler: Handler) -> Route:
        return Route(path, _answering(handler, token, endpoints.telemetry), methods=[method])

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", _file("index.html")),
            *(Route(f"/{name}", _file(name)) for name in PARTS),
            Route("/health", endpoints.health),
            route("GET", "/metrics", endpoints.metrics),
            route("POST", "/v1/recommend", endpoints.recommend),
            route("POST", "/v1/update", endpoints.update),
            route("POST", "/v1/explain", endpoints.explain),
            route("POST", "/v1/describe", endpoints.describe),
            route("POST", "/v1/forget", endpoints.forget),
            route("GET", "/v1/items", endpoints.find),
            route("GET", "/v1/start", endpoints.start),
            route("GET", "/v1/fields", endpoints.fields),
            route("GET", "/v1/model", endpoints.model),
            route("POST", "/v1/model/reload", endpoints.reload),
        ],
    )


def _answering(handler: Handler, token: str | None, telemetry: Telemetry) -> Callable[[Request], Awaitable[Response]]:
    """Authenticate a request before its handler, turn errors into statuses, and count the answer."""

    async def answer(request: Request) -> Response:
        begun, status, path = time.perf_counter(), 200, request.url.path
        try:
            _authenticate(request, token)
            content = await handler(request)
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
            telemetry.answered(path, status, time.perf_counter() - begun)

    return answer


def _authenticate(request: Request, token: str | None) -> None:
    """Raise `BadRequest` unless the request carries the token."""
    authorization = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
        raise BadRequest(401, "send the token: Authorization: Bearer TOKEN")


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of one file of the page."""

    async def send(request: Request) -> Response:
        return FileResponse(PAGE / name, headers=SAFE)

    return send


def _refusal(status: int, why: Any, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": str(why)}, status, headers)
