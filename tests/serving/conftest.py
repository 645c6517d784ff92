"""A service of a saved model, in process and on a port."""

import functools
import threading
import time
from contextlib import contextmanager

import pytest

from metarec_jax.serving import Service, create_app


@pytest.fixture
def model(stocked, tmp_path):
    """The folder of a saved model."""
    stocked.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def service(model, tmp_path, monkeypatch):
    """A service that compiles little before it is ready."""
    monkeypatch.setattr("metarec_jax.serving.warming.SIZES", ())
    return Service(model, tmp_path / "users.db")


@pytest.fixture(scope="session")
def run_app():
    """`with run_app(service, **options) as address`: the app on a port of loopback, as `metarec serve` runs it."""
    import uvicorn

    @contextmanager
    def running(service, **options):
        server = uvicorn.Server(uvicorn.Config(create_app(service, **options), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not (server.started and service.ready):
            assert thread.is_alive()
            time.sleep(0.02)
        (port,) = {s.getsockname()[1] for one in server.servers for s in one.sockets}
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()

    return running


@pytest.fixture
def serve(run_app, service):
    """`with serve(**options) as address`: the `service` on a port."""
    return functools.partial(run_app, service)
