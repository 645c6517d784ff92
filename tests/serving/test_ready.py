"""Ready: once a service says so, no request compiles anything."""

import jax
import pytest

import metarec_jax as mr
from metarec_jax.serving import Service

BACKEND = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Names of the events of compilation, as they come."""
    events = []

    def listen(event, seconds, **context):
        if event == BACKEND:
            events.append(context.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_no_request_compiles_anything_after_ready(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr("metarec_jax.serving.warming.SIZES", (1, 8))
    monkeypatch.setattr("metarec_jax.serving.warming.LENGTHS", (32, 128))
    monkeypatch.setattr("metarec_jax.inference.predictor.SEEN", 64)  # fewer than some users have seen
    monkeypatch.setattr("metarec_jax.serving.warming.COUNTS", (10, 100))
    data = mr.data.synthetic(users=100, items=60)
    options = {"rank": 4, "sweeps": 1}
    mr.train(data, "ials", epochs=1, progress=False, buckets=1, strategy_options=options).save(tmp_path / "model")
    service = Service(tmp_path / "model", tmp_path / "users.db")
    service.warm()
    service.update([[{"user": "ann", "item": 3, "kind": "rating", "value": 5.0}]])
    many = [{"user": "zoe", "item": item, "kind": "click"} for item in (*range(1, 51), *range(1000, 1070))]
    service.update([many])
    before = len(compiled)
    assert before > 20
    short = [
        {"history": [3, 17]},
        {"history": [[i, 3.0] for i in range(1, 50)], "k": 40},
        {"history": [], "where": {"genre": ["genre 1"]}},
        {"history": [3], "only": [1, 2, 3], "block": [1], "k": 99},
        {"history": [3], "deviation": True},
        {"history": [3], "explore": "ucb", "strength": 2, "k": 20},
        {"history": [3], "explore": "thompson", "seed": 5, "where": {"genre": ["genre 2"]}},
        {"history": [3], "diversity": 0.5},
        {"history": [[3, 5.0]], "by": "rating"},
        {"history": [[3, 5.0]] * 1, "by": 0.3, "k": 30},
        {"user": "ann", "exclude_seen": False},
        {"user": "bob", "attributes": None},
    ]
    long = [  # more seen and blocked items than are listed by user
        {"user": "zoe", "k": 20},
        {"user": "zoe", "where": {"genre": ["genre 1"]}, "by": "rating"},
        {"user": "zoe", "by": 0.3},
        {"user": "zoe", "deviation": True, "only": list(range(1, 60))},
        {"user": "zoe", "explore": "thompson", "exclude_seen": False},
        {"history": [3], "block": list(range(1, 100))},
    ]
    for request in [*short, *long]:
        for company in (1, 3, 8):
            for answer in service.recommend([request] * company):
                assert not isinstance(answer, Exception), (request, answer)
            assert compiled[before:] == [], f"{request}, {company} at once"
    for k in (1, 12, 60):
        service.start(k)
    service.fields()
    service.find("1")
    service.explain({"history": [3, 17], "item": 5})
    service.explain({"history": list(range(1, 45)), "item": 5})
    service.explain({"user": "zoe", "item": 5})
    assert compiled[before:] == []
