"""The service over real HTTP: what it answers, what it refuses, what it never loses."""

import json
import re
import threading
import time

import httpx
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.errors import ModelFileError, StoreError
from metarec_jax.serving import Service

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client(serve):
    with serve() as address, httpx.Client(base_url=address, timeout=60) as found:
        yield found


def items(answer):
    return [(r["item"], pytest.approx(r["score"], rel=1e-5)) for r in answer.json()["items"]]


def as_pairs(found):
    return [(r.item, r.score) for r in found]


def test_it_recommends_what_the_recommender_does(client, service, stocked):
    asked = {"history": {"100": 5, "103": 1}, "attributes": {"country": "nl"}, "k": 4}
    expected = as_pairs(stocked.recommend({100: 5, 103: 1}, k=4, user={"country": "nl"}))
    assert items(client.post("/v1/recommend", json=asked)) == expected
    pairs = asked | {
        "history": [[100, 5], [103, 1]],
        "where": {"colour": ["red"], "price": {"from": 0.5}},
        "block": [120],
    }
    expected = as_pairs(
        stocked.recommend(
            {100: 5, 103: 1}, k=4, user={"country": "nl"}, where={"colour": ["red"], "price": (0.5, None)}, block=[120]
        )
    )
    answer = client.post("/v1/recommend", json=pairs)
    assert items(answer) == expected
    assert answer.json()["model"] == service.current.version
    assert len(client.post("/v1/recommend", json={}).json()["items"]) == 10
    sure = client.post("/v1/recommend", json={"deviation": True, "k": 1}).json()["items"][0]
    assert sure["deviation"] > 0


def test_feedback_is_in_the_next_answer_and_forgotten_on_demand(client, stocked):
    events = [
        {"user": "ann", "item": 100, "kind": "rating", "value": 5, "id": "a"},
        {"user": "ann", "item": 103, "kind": "click"},
    ]
    assert client.post("/v1/update", json={"events": events}).json() == {"new": 2}
    assert client.post("/v1/update", json={"events": events[:1]}).json() == {"new": 0}
    assert client.post("/v1/describe", json={"user": "ann", "attributes": {"country": "de"}}).status_code == 200
    expected = as_pairs(stocked.recommend({100: 5, 103: 4}, k=3, user={"country": "de"}))
    assert items(client.post("/v1/recommend", json={"user": "ann", "k": 3})) == expected
    why = client.post("/v1/explain", json={"user": "ann", "item": expected[0][0]}).json()
    assert {cause["item"] for cause in why["causes"]} == {100, 103}
    assert client.post("/v1/explain", json={"history": [[100, 5]], "item": 101}).json()["causes"][0]["item"] == 100
    assert client.post("/v1/forget", json={"user": "ann"}).json() == {"events": 2}
    assert items(client.post("/v1/recommend", json={"user": "ann", "k": 3})) == as_pairs(stocked.recommend({}, k=3))


def test_events_have_contexts(tmp_path, run_app):
    data, rng = mr.data.synthetic(users=60, items=40, seed=0), np.random.default_rng(0)
    device = rng.choice(["phone", "tv"], len(data.rating))
    rows = {"user_id": data.user, "item_id": data.item, "rating": data.rating, "device": device}
    protocol, options = mr.ColdUsers(query=3, minimum=5), {"epochs": 1, "progress": False, "buckets": 1}
    trained = mr.train(mr.data.from_tables(rows, context=["device"]), "ridge", "deepfm", protocol=protocol, **options)
    trained.save(tmp_path / "model")
    service = Service(tmp_path / "model")
    service.warm, service.ready = lambda: None, True
    events = [{"user": "ann", "item": 3, "kind": "rating", "value": 5, "context": {"device": "phone"}}]
    with run_app(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.post("/v1/update", json={"events": events}).json() == {"new": 1}
        found = items(client.post("/v1/recommend", json={"user": "ann", "k": 3}))
        assert found == as_pairs(trained.recommend([(3, 5.0, {"device": "phone"})], k=3))
        for context, message in (({"place": "home"}, "it knows: device"), ({"device": "watch"}, "no category 'watch'")):
            answer = client.post("/v1/update", json={"events": [events[0] | {"context": context}]})
            assert answer.status_code == 400
            assert message in answer.json()["error"]


def test_items_are_found_by_title_health_and_metrics_are_there(client, service):
    found = client.get("/v1/items", params={"search": "thing 1"}).json()["items"]
    about = {"colour": ["green"], "tags": ["sale", "new"]}
    assert {"item": 110, "title": "Thing 10", "about": about} in found
    assert client.get("/health").json() == {"status": "ok", "model": service.current.version}
    model = {"model": service.current.version, "items": 50, "predicts": "click", "ratings": [2.0, 5.0]}
    assert client.get("/v1/model").json() == model
    client.post("/v1/update", json={"events": [{"user": 1, "item": 100, "kind": "click"}]})
    client.post("/v1/recommend", json={"k": 0})
    text = client.get("/metrics").text
    assert "metarec_events_total 1.0" in text
    assert 'metarec_requests_total{path="/v1/recommend",status="400"} 1.0' in text
    assert f'metarec_model{{version="{service.current.version}"}} 1.0' in text


def test_varied_items_to_start_with_and_fields_to_group_them_by(shared_client, stocked):
    first = shared_client.get("/v1/start", params={"k": 5}).json()["items"]
    assert [r["item"] for r in first] == [r.item for r in stocked.recommend([], 5, diversity=0.7)]
    assert [r["item"] for r in first] != [r.item for r in stocked.recommend([], 5)]
    assert len(shared_client.get("/v1/start").json()["items"]) == 12
    fields = {field["name"]: field for field in shared_client.get("/v1/fields").json()["fields"]}
    assert list(fields) == ["colour", "tags"]  # numbers do not group
    counts = [(own["value"], own["items"]) for own in fields["colour"]["values"]]
    assert counts == [("green", 17), ("red", 17), ("blue", 16)]
    for value, count in ((own["value"], own["items"]) for own in fields["tags"]["values"]):
        assert len(stocked.recommend({}, 50, where={"tags": value})) == count
    ids = [r["item"] for r in first]
    described = shared_client.get("/v1/items", params={"id": ids}).json()["items"]
    assert described == [{name: r[name] for name in ("item", "title", "about")} for r in first]
    for r in described:
        assert r["item"] in {own.item for own in stocked.recommend({}, 50, where=r["about"])}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("start?k=0", "k must be an integer from 1 to 1000"),
        ("start?k=many", "k must be an integer from 1 to 1000, got 'many'"),
        ("start?k=", "k must be an integer from 1 to 1000"),
        ("start?k=3&k=4", "k is given twice"),
        ("start?count=3", "'count' is unknown here; an address may hold k"),
        ("fields?k=3", "'k' is unknown here; an address may hold no parameters"),
        ("items?serch=x", "'serch' is unknown here; an address may hold search, id"),
        ("items?search=x&id=100", "search or id, not both"),
        ("items?id=x", "ids of this model are integers"),
        ("items?id=7", "item 7 is unknown"),
    ],
)
def test_a_bad_address_is_refused_with_a_message(shared_client, address, message):
    answer = shared_client.get(f"/v1/{address}")
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("recommend", b"[", 400, "this is no JSON"),
        ("recommend", b"\xff\xfe", 400, "this is no JSON"),
        ("recommend", b"[" * 100_000, 400, "this is no JSON"),
        ("recommend", b"[]", 400, "expected a JSON object"),
        ("recommend", b'{"histry": []}', 400, "'histry' is unknown here; a request may hold user, history"),
        ("explain", b'{"item": 100, "k": 3}', 400, "'k' is unknown here"),
        ("forget", b'{"user": 1, "really": true}', 400, "'really' is unknown here"),
        ("recommend", b'{"k": NaN}', 400, "NaN is no number of JSON"),
        ("recommend", b'{"k": 0}', 400, "k must be an integer from 1 to 1000"),
        ("recommend", b'{"k": 1e9}', 400, "k must be an integer from 1 to 1000"),
        ("recommend", b'{"history": 5}', 400, "expected a list of [item, rating] or"),
        ("recommend", b'{"history": {"x": 5}}', 400, "ids of this model are integers"),
        ("recommend", b'{"history": [[100, 99]]}', 400, "off the scale"),
        ("recommend", b'{"history": [[100]]}', 400, "every entry must be (item, rating)"),
        ("recommend", b'{"history": [[{}, 5]]}', 400, "must be an integer"),
        ("recommend", b'{"attributes": {"age": 3}}', 400, "'age' is unknown to the model"),
        ("recommend", b'{"attributes": 3}', 400, "attributes: expected an object"),
        ("recommend", b'{"context": 3}', 400, "context: expected an object"),
        ("recommend", b'{"where": {"colour": "pink"}}', 400, "no item has colour 'pink'"),
        ("recommend", b'{"where": 3}', 400, "where: expected an object"),
        ("recommend", b'{"diversity": "much"}', 400, "diversity: expected a number"),
        (
            "recommend",
            b'{"explore": "thompson", "seed": 1180591620717411303424}',
            400,
            "seed: expected an integer of 32",
        ),
        ("recommend", b'{"only": 3}', 400, "only: expected a list"),
        ("recommend", b'{"user": [1]}', 400, "an id is an integer or a string"),
        ("update", b'{"events": 3}', 400, "expected {"),
        ("update", b'{"events": [{"user": 1}]}', 400, "event 0: expected an Event"),
        ("update", b'{"events": [{"user": 1, "item": 100, "kind": "click", "time": 9e12}]}', 400, "in the future"),
        ("explain", b'{"user": 1}', 400, "an item is missing"),
        ("explain", b'{"user": 1, "item": 7}', 400, "item 7 is unknown"),
        ("explain", b'{"user": {}, "item": 100}', 400, "user: an id"),
        ("describe", b'{"user": 1}', 400, "expected {"),
        ("forget", b"{}", 400, "expected {"),
        ("recommend", b" " * (10 << 20), 413, "at most"),
    ],
)
def test_bad_input_is_refused_with_a_message(shared_client, path, body, status, message):
    answer = shared_client.post(f"/v1/{path}", content=body, headers=JSON)
    assert answer.status_code == status
    assert message in answer.json()["error"]


@pytest.fixture(scope="module")
def shared_client(stocked, tmp_path_factory, run_app):
    """One server for what changes nothing."""
    folder = tmp_path_factory.mktemp("serving")
    stocked.save(folder / "model")
    service = Service(folder / "model")
    service.warm, service.ready = lambda: None, True
    with run_app(service) as address, httpx.Client(base_url=address, timeout=60) as found:
        yield found


def test_only_json_and_known_paths(shared_client):
    assert shared_client.post("/v1/recommend", content=b"{}").status_code == 415
    assert shared_client.get("/v1/recommend").status_code == 405
    assert shared_client.get("/nothing").status_code == 404


def test_a_bad_request_does_not_spoil_its_batch(service):
    good, bad = {"history": [[100, 5]], "k": 3}, {"history": [[100, 99]], "k": 3}
    answers = service.recommend([good, bad, good | {"k": 5}, {"user": 7}, good | {"diversity": 0.5}])
    assert isinstance(answers[1], mr.DataError)
    assert [len(answers[i]["items"]) for i in (0, 2, 3, 4)] == [3, 5, 10, 3]
    assert answers[0]["items"] == service.recommend([good])[0]["items"]
    event = {"user": 1, "item": 100, "kind": "click"}
    found = service.update([[event, event], [event | {"kind": "like"}], [event]])
    assert [found[0], found[2]] == [{"new": 2}, {"new": 1}]
    assert isinstance(found[1], mr.DataError)


def test_a_token_is_asked_for(serve):
    with serve(token="secret") as address, httpx.Client(base_url=address, timeout=60) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.post("/v1/recommend", json={}, headers=headers)
            assert answer.status_code == 401
            assert "Bearer TOKEN" in answer.json()["error"]
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.post("/v1/recommend", json={}, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_many_clients_are_answered_in_batches_and_alike(serve, service, monkeypatch):
    sizes, work = [], service.recommend
    monkeypatch.setattr(service, "recommend", lambda requests: sizes.append(len(requests)) or work(requests))
    with serve(budget=0.02) as address:
        found = in_parallel(
            lambda i: httpx.post(f"{address}/v1/recommend", json={"history": [[100 + i % 5, 5]]}, timeout=60), 24
        )
    assert {answer.status_code for answer in found} == {200}
    assert all(items(found[i]) == [(r["item"], r["score"]) for r in found[i % 5].json()["items"]] for i in range(24))
    assert sum(sizes) == 24
    assert len(sizes) < 24


def in_parallel(work, times):
    found = [None] * times

    def one(i):
        found[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_overload_sheds_and_loses_no_acknowledged_event(serve, service, monkeypatch):
    work = service.update
    monkeypatch.setattr(service, "update", lambda requests: time.sleep(0.05) or work(requests))

    def send(i):
        event = {"user": "ann", "item": 100, "kind": "click", "id": str(i)}
        return httpx.post(f"{address}/v1/update", json={"events": [event]}, timeout=60)

    with serve(waiting=3, largest=2, budget=0.0) as address:
        found = in_parallel(send, 40)
    kept = len(service.users.read(["ann"], 100)[0].events)
    acknowledged = [answer for answer in found if answer.status_code == 200]
    refused = [answer for answer in found if answer.status_code == 503]
    assert len(acknowledged) == kept > 0
    assert len(refused) == 40 - kept > 0
    assert all(answer.headers["retry-after"] == "1" for answer in refused)


def test_a_store_that_fails_is_a_503_and_nothing_is_acknowledged(serve, service, monkeypatch):
    def fails(*groups):
        raise StoreError("the disk is full")

    monkeypatch.setattr(service.users, "append", fails)
    with serve() as address:
        answer = httpx.post(f"{address}/v1/update", json={"events": [{"user": 1, "item": 100, "kind": "click"}]})
    assert (answer.status_code, answer.json()) == (503, {"error": "the disk is full"})


def test_a_model_is_swapped_without_dropping_a_request(serve, service, model, stocked):
    before, stop, statuses, versions = service.current.version, threading.Event(), [], set()

    def ask():
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/recommend", json={"history": [[100, 5]], "k": 3})
                statuses.append(answer.status_code)
                versions.add(answer.json()["model"])

    def await_answer(arrived):
        deadline = time.monotonic() + 30
        while not arrived() and time.monotonic() < deadline:
            time.sleep(0.01)

    with serve() as address:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        await_answer(lambda: before in versions)
        stocked.add_items({"item_id": [7], "title": ["Brand new"]}).save(model)
        answer = httpx.post(f"{address}/v1/model/reload", timeout=120)
        await_answer(lambda: answer.json()["model"] in versions)
        stop.set()
        for thread in threads:
            thread.join()
        assert httpx.get(f"{address}/v1/items", params={"search": "brand"}).json()["items"][0]["item"] == 7
    after = answer.json()["model"]
    assert after != before
    assert versions == {before, after}
    assert set(statuses) == {200}


def test_a_broken_model_folder_leaves_the_old_one_in_use(serve, service, model, monkeypatch):
    monkeypatch.setattr("metarec_jax.serving.service.TRIES", 2)
    (model / "arrays.safetensors").write_bytes(b"half")
    with serve() as address:
        answer = httpx.post(f"{address}/v1/model/reload", timeout=60)
        assert answer.status_code == 409
        assert "damaged or incomplete" in answer.json()["error"]
        assert httpx.post(f"{address}/v1/recommend", json={}, timeout=60).status_code == 200
    with pytest.raises(ModelFileError, match="damaged"):
        Service(model)


def test_a_model_that_is_written_while_it_is_loaded_is_whole(stocked, service, model):
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            stocked.add_items({"item_id": [1000 + number]}).save(model)
            number += 1
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.5)
    try:
        found = [service._load() for _ in range(5)]
    finally:
        stop.set()
        writer.join()
    assert all(len(recommender.stock) == 52 for recommender in found)


def test_the_command_line_asks_for_a_token_off_loopback(model, monkeypatch):
    from click.testing import CliRunner

    from metarec_jax import cli

    monkeypatch.delenv("METAREC_TOKEN", raising=False)
    done = CliRunner().invoke(cli.cli, ["serve", str(model), "--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "set METAREC_TOKEN" in done.output


def test_json_of_an_answer_is_plain(service):
    answer = service.recommend([{"history": [[100, 5]], "deviation": True, "k": 2}])[0]
    assert json.loads(json.dumps(answer)) == answer


def test_a_failure_inside_is_a_500_whose_number_is_in_the_log(serve, service, monkeypatch, caplog):
    def fails(requests):
        raise ValueError("something of ours")

    monkeypatch.setattr(service, "recommend", fails)
    with serve() as address, caplog.at_level("ERROR", "metarec_jax"):
        answer = httpx.post(f"{address}/v1/recommend", json={"history": []})
    assert answer.status_code == 500
    (number,) = re.findall(r"request (\w+)", answer.json()["error"])
    assert "something of ours" not in answer.text
    assert number in caplog.text
    assert "something of ours" in caplog.text
