"""The leaderboard and the search run from end to end, on data small enough for a test."""

import json
from pathlib import Path

import numpy as np
import pytest

import metarec_jax as mr

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as its command does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name)


def test_the_leaderboard_has_every_learner_and_goes_on_from_its_log(benchmark, synthetic, tmp_path, capsys):
    quality, log = benchmark("quality"), tmp_path / "log.jsonl"
    run = ("ridge",), range(2), synthetic, mr.ColdUsers(), 2, log, {}, None
    rows = quality.run(*run)
    assert {row["learner"] for row in rows} == {"ridge", *mr.evaluation.BASELINES}
    assert all(set(row["results"]) == {str(size) for size in quality.SUPPORT} for row in rows)
    capsys.readouterr()
    again = quality.run(*run)
    assert "split" not in capsys.readouterr().out  # nothing is trained again
    assert again == [json.loads(json.dumps(row)) for row in rows]
    quality.report(rows, "click")
    table = capsys.readouterr().out
    own = np.mean([row["results"]["None"]["auc"] for row in rows if row["learner"] == "ridge"])
    assert f"| ridge | {own:.4f} |" in table


def test_the_search_draws_the_same_settings_again_and_the_default_first(benchmark, synthetic):
    tune = benchmark("tune")
    assert set(tune.SPACE) <= set(mr.STRATEGIES)
    assert tune.drawn("maml", 0, seed=0) == {"outer": {}, "own": {}}
    assert tune.drawn("maml", 1, seed=0) == tune.drawn("maml", 1, seed=0) != tune.drawn("maml", 2, seed=0)
    for name in mr.STRATEGIES:
        settings = tune.drawn(name, 1, seed=0)
        model = mr.models.MODELS[mr.strategies.DEFAULT_MODEL.get(name, "mlp")](mr.models.fields_of(synthetic))
        mr.STRATEGIES[name](model, **settings["own"])  # it knows what it is given
        assert 1e-3 <= settings["outer"]["learning_rate"] <= 1e-2


def test_a_system_that_fails_leaves_a_row_and_the_next_is_measured(benchmark, capsys):
    throughput = benchmark("throughput")
    table = throughput.Table("label", "system", title="T")

    def out_of_memory() -> None:
        raise MemoryError("no room\nfor it")

    def rows():
        yield "wide", out_of_memory
        yield "narrow", lambda: throughput.Timing([1.0, 2.0, 4.0], 8, None)
        raise RuntimeError("no device")

    assert throughput.add_rows(table, "label", rows(), limit=None) is None  # the first has no rate to compare with
    assert table.row_count == 3
    told = capsys.readouterr().err
    assert "wide: MemoryError: no room\n" in told
    assert "narrow 4 users/s (2 to 8)" in told
    assert "all that follow: RuntimeError: no device" in told
    assert throughput.add_rows(table, "label", iter([("narrow", lambda: throughput.Timing([2.0], 8, None))]), None) == 4
