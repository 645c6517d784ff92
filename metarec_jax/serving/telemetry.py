"""Telemetry: the Prometheus metrics of the service."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)  # upper bounds in seconds


class Telemetry:
    """The metrics of one application, in a registry of their own.

    Args:
      waiting: returns the number of waiting requests.
      version: returns the version of the model in use.
    """

    def __init__(self, waiting: Callable[[], int], version: Callable[[], str | None]) -> None:
        self._version = version
        self._registry = CollectorRegistry()
        self._requests = Counter("metarec_requests", "Requests answered.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "metarec_request_seconds", "Time to answer.", ["path"], registry=self._registry, buckets=BUCKETS
        )
        self._events = Counter("metarec_events", "Events kept.", registry=self._registry)
        Gauge("metarec_waiting", "Requests that wait.", registry=self._registry).set_function(waiting)
        self._model = Gauge("metarec_model", "The model in use.", ["version"], registry=self._registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request and the seconds that its answer took."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def stored(self, events: int) -> None:
        """Count new events."""
        self._events.inc(events)

    def exposition(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        self._model.clear()
        self._model.labels(self._version()).set(1)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
