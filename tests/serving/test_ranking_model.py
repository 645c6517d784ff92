"""A model that ranks, served: over HTTP, and the page in a real browser."""

import httpx
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.serving import Service


@pytest.fixture(scope="module", params=["ratings", "no ratings"])
def recommender(request):
    """Trained on two kinds of users, each with half of the items; with ratings, the other half is disliked."""
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 12), np.concatenate([rng.permutation(40)[:12] for _ in range(60)])
    own = users % 2 == items % 2
    table = {"user_id": users, "item_id": items, "rating": np.where(own, rng.integers(4, 6, len(own)), 1)}
    if request.param == "no ratings":
        table = {"user_id": users[own], "item_id": items[own]}
    titles = {"item_id": np.arange(40), "title": [f"Thing {i}" for i in range(40)]}
    data = mr.data.from_tables(table, items=titles)
    protocol = mr.StrongGeneralisation(minimum=3)
    options = {"rank": 4, "penalty": 0.001}
    return mr.train(data, "ials", protocol=protocol, strategy_options=options, epochs=2, progress=False, buckets=1)


@pytest.fixture
def service(recommender, tmp_path, monkeypatch):
    monkeypatch.setattr("metarec_jax.serving.warming.SIZES", ())
    recommender.save(tmp_path / "model")
    return Service(tmp_path / "model", tmp_path / "users.db")


def test_it_recommends_explains_and_learns_over_http(run_app, service, recommender):
    high = recommender.limits[1]
    with run_app(service) as address, httpx.Client(base_url=address, timeout=60) as client:

        def items(**asked):
            return [r["item"] for r in client.post("/v1/recommend", json={"k": 5} | asked).json()["items"]]

        model = client.get("/v1/model").json()
        assert (model["predicts"], model["ratings"], model["items"]) == ("ranking", list(recommender.limits), 40)
        expected = [r.item for r in recommender.recommend([0, 2], k=5)]
        assert all(item % 2 == 0 for item in expected)
        assert items(history=[0, 2]) == items(history=[[0, high], [2, high]]) == items(history={"0": high, "2": high})
        assert items(history=[0, 2]) == expected
        mixed = client.post("/v1/recommend", json={"history": [0, [2, high]]})
        assert (mixed.status_code, "are mixed" in mixed.json()["error"]) == (400, True)

        events = [{"user": "ann", "item": item, "kind": "purchase"} for item in (0, 2)]
        assert client.post("/v1/update", json={"events": events}).json() == {"new": 2}
        assert items(user="ann") == expected
        why = client.post("/v1/explain", json={"user": "ann", "item": expected[0]}).json()
        assert {cause["item"] for cause in why["causes"]} == {0, 2}

        dismissed = {"user": "ann", "item": expected[0], "kind": "dismiss"}
        assert client.post("/v1/update", json={"events": [dismissed]}).json() == {"new": 1}
        assert expected[0] not in items(user="ann")

        def refused(by):
            answer = client.post("/v1/recommend", json={"history": [0, 2], "by": by})
            return answer.json()["error"] if answer.status_code == 400 else ""

        assert "by is" in refused("luck")
        assert "by is" in refused(1.5)
        assert "by: expected" in refused([])
        if recommender.limits == (0.0, 1.0):  # without ratings there is nothing to predict
            assert "rating" in refused("rating")
        else:
            for by in ("rating", 0.3):
                assert items(history=[0, 2], by=by) == [r.item for r in recommender.recommend([0, 2], k=5, by=by)]


def test_the_page_shows_places_and_bars_in_place_of_numbers(run_app, service, browser):
    with run_app(service) as address:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("body[data-round='1']")
        assert "choose next out of all 40 items" in page.inner_text("#meaning")
        assert "Nothing is known of you yet" in page.inner_text("#status")
        assert page.locator("#recommended .score").count() == 0
        page.fill("#search", "thing 10")
        page.wait_for_selector("#found li")
        page.click("#found button[aria-label^='Like Thing 10']")
        page.wait_for_selector("body[data-round='2']")
        bars = page.locator("#recommended meter").evaluate_all("all => all.map(bar => bar.value)")
        assert bars[0] == 1.0
        assert bars == sorted(bars, reverse=True)
        assert 0 < bars[-1] < 1
        shown = page.locator("#recommended li").evaluate_all("all => all.map(li => Number(li.dataset.item))")
        assert sum(item % 2 == 0 for item in shown[:4]) == 4
        why = page.locator("#recommended .why").first.inner_text()
        assert "▲ Thing 10" in why
        assert "before you" not in why
        page.click("#recommended li:first-child button[aria-label^='Not for me']")
        page.wait_for_selector("body[data-round='3']")
        after = page.locator("#recommended li").evaluate_all("all => all.map(li => Number(li.dataset.item))")
        assert shown[0] not in after
        assert page.locator("#rated li").count() == 2
        assert errors == []
        page.close()
