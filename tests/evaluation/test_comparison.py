"""Comparisons: same tasks for all, nothing run twice, intervals that cover, a report that is whole."""

import dataclasses
import html.parser
import re
import shutil

import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

import metarec_jax as mr
from metarec_jax.errors import DataError
from metarec_jax.evaluation import comparison as comparison_module
from metarec_jax.evaluation import intervals
from metarec_jax.evaluation.comparison import Comparison, Run

SUPPORT = (2, None)


@pytest.fixture(scope="module")
def data():
    return mr.data.synthetic(users=80, items=45, seed=0)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    where = tmp_path_factory.mktemp("comparison")
    strategies = {"ridge": {"strategy": "ridge"}, "<b>lwa</b>": {"strategy": "lwa"}}
    options = {"splits": 2, "support": SUPPORT, "epochs": 2, "buckets": 1, "progress": False}
    mr.evaluation.compare(data, strategies, folder=where, **options)
    return where


@pytest.fixture(scope="module")
def comparison(folder):
    return mr.evaluation.load_comparison(folder)


def test_a_run_is_what_evaluate_says(data, comparison):
    trained = mr.train(data, "ridge", objective="click", seed=1, epochs=2, buckets=1, progress=False)
    for size in SUPPORT:
        expected = trained.evaluate(support=size)
        for learner in ("ridge", "two means", "ALS fold-in", "item-kNN"):
            for metric in intervals.METRICS["click"]:
                value = intervals.values(comparison, learner, metric, size)[1]
                np.testing.assert_allclose(value, expected[learner][metric], rtol=1e-5, err_msg=metric)


def test_a_run_names_its_users_and_items(data, comparison):
    run = comparison.runs["ridge", 0]
    liked = {(u, i): r >= 4 for u, i, r in zip(data.user, data.item, data.rating, strict=True)}
    for user, row, target, mask in zip(run.users, run.items, run.target, run.mask, strict=True):
        assert [liked[user, item] for item in row[mask > 0]] == (target[mask > 0] > 0.5).tolist()
    counts = np.bincount(data.user, minlength=len(data.users))
    np.testing.assert_array_equal(run.lengths + run.mask.sum(1), counts[run.users])


def test_what_is_on_disk_is_not_run_again_and_a_missing_run_is(data, folder, monkeypatch, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    trained = []
    real = comparison_module.train
    monkeypatch.setattr(comparison_module, "train", lambda *a, **k: trained.append(k["seed"]) or real(*a, **k))
    options = {"splits": 2, "support": SUPPORT, "folder": copy, "epochs": 2, "buckets": 1, "progress": False}
    names = {"ridge": {"strategy": "ridge"}}
    again = mr.evaluation.compare(data, names, **options)
    assert trained == []
    assert again.learners == ["ridge", *mr.evaluation.BASELINES]
    before = intervals.values(again, "ridge", "auc")
    (copy / "run-ridge-1.npz").unlink()
    once_more = mr.evaluation.compare(data, names, **options)
    assert trained == [1]
    np.testing.assert_array_equal(intervals.values(once_more, "ridge", "auc"), before)
    with pytest.raises(DataError, match="another kind"):
        mr.evaluation.compare(data, names, **options | {"protocol": mr.ColdUsers(query=5)})
    (copy / "run-ridge-0.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"run-ridge-0\.npz: damaged"):
        mr.evaluation.load_comparison(copy)


def test_bad_arguments_and_failures_are_told(data, tmp_path):
    for strategies, splits in (([], 2), (["ridge", "ridge"], 2), (["ridge"], 0), (["ridge"], [1, 1])):
        with pytest.raises(ValueError, match="none twice"):
            mr.evaluation.compare(data, strategies, splits=splits)
    with pytest.raises(ValueError, match="name of a baseline"):
        mr.evaluation.compare(data, {"two means": {}}, splits=1)
    with pytest.raises(DataError, match="no comparison"):
        mr.evaluation.load_comparison(tmp_path)
    hopeless = {"ridge": {"strategy": "ridge"}, "nan": {"strategy": "ridge", "optimizer": optax.scale(np.nan)}}
    options = {"splits": 1, "support": (None,), "epochs": 1, "progress": False, "folder": tmp_path / "failing"}
    found = mr.evaluation.compare(data, hopeless, **options)
    assert list(found.failed) == [("nan", 0)]
    assert "learning rate" in found.failed["nan", 0]
    assert found.learners == ["ridge", *mr.evaluation.BASELINES]
    assert mr.evaluation.load_comparison(tmp_path / "failing").failed == found.failed


def made(rng: np.random.Generator, users: int, gain: float, splits: int = 2) -> Comparison:
    """A comparison without training: users are drawn, "better" is right by `gain` more on average."""
    runs = {}
    for seed in range(splits):
        shape, chosen = (users, 6), np.arange(1, users + 1)
        target = (rng.random(shape) < 0.5).astype(np.float32)
        skill = rng.normal(0, 0.5, (users, 1))
        for name, extra in (("better", gain), ("worse", 0.0)):
            scores = 1 / (1 + np.exp(-(target - 0.5) * (1 + extra + skill) - rng.normal(0, 1, shape)))
            whole = np.ones(shape, np.float32)
            runs[name, seed] = Run(scores[None], target, whole, chosen, whole.astype(int), chosen, {}, [])
    setting = {"seeds": list(range(splits)), "support": [None]}
    return Comparison(setting, "click", runs, {}, {})


def test_the_bootstrap_agrees_with_scipy_on_a_mean_over_users():
    found = made(np.random.default_rng(0), users=150, gain=0.5, splits=1)
    ours = intervals.difference(found, "better", "worse", "log_loss", draws=4000)
    loss = [
        intervals.PER_INTERACTION["log_loss"](r.scores[0], r.target).mean(1)
        for r in (found.runs["better", 0], found.runs["worse", 0])
    ]
    theirs = stats.bootstrap((loss[0] - loss[1],), np.mean, method="percentile", n_resamples=4000, rng=0)
    np.testing.assert_allclose(ours.mean, (loss[0] - loss[1]).mean(), rtol=1e-5)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    np.testing.assert_allclose([ours.low, ours.high], theirs.confidence_interval, atol=0.06 * width)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    for metric in ("auc", "within_user_auc", "precision@5"):
        covered = 0
        for _ in range(120):
            found = intervals.difference(made(rng, 60, gain=0.0), "better", "worse", metric, draws=300, level=0.8)
            covered += found.low <= 0 <= found.high
        assert 0.68 < covered / 120 < 0.92, metric  # 0.8, give or take three deviations


def test_a_weighted_auc_is_the_auc_of_the_repeated_users():
    rng = np.random.default_rng(2)
    found = made(rng, 12, 0.3, splits=1)
    run = found.runs["better", 0]
    tied = dataclasses.replace(found, runs={("better", 0): run._replace(scores=np.round(run.scores, 1))})
    sums = intervals._sums(tied, "better", 0, "auc", None)
    weights = rng.multinomial(12, np.full(12, 1 / 12), size=5).astype(np.float32)
    for row, value in zip(weights.astype(int), sums.value(weights), strict=True):
        target, scores = (np.repeat(x, row, axis=0).ravel() for x in (run.target, np.round(run.scores[0], 1)))
        np.testing.assert_allclose(value, roc_auc_score(target, scores), rtol=1e-5)


def test_holm_equals_its_definition():
    assert intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert intervals.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_segments_part_the_whole(comparison):
    for segment in ("user/activity", "item/popularity"):
        found = intervals.by_segment(comparison, "ridge", "accuracy", segment)
        assert set(found) <= set(intervals.ORDER)
        labels = comparison.segments[segment]
        for label, value in found.items():
            per_split = []
            for seed in comparison.seeds:
                run, scores = comparison.runs["ridge", seed], comparison.scores("ridge", seed)
                rows = run.users[:, None] if segment.startswith("user/") else run.items
                chosen = (labels[rows] == label) & (run.mask > 0)
                if chosen.any():
                    per_split.append(((scores.scores >= 0.5) == (run.target > 0.5))[chosen].mean())
            np.testing.assert_allclose(value, np.mean(per_split), rtol=1e-6)


def nothing_closed(page: str) -> list[str]:
    """Tags that are open at the end or closed out of turn."""
    wrong, stack, void = [], [], {"meta", "br", "wbr", "img"}

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if not stack or stack.pop() != tag:
                wrong.append(tag)

    Parser().feed(page)
    return wrong + stack


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    return mr.evaluation.report(comparison, tmp_path_factory.mktemp("report") / "report.html", draws=50)


def test_the_report_is_one_whole_file_that_fetches_nothing(comparison, written):
    page = written.read_text()
    assert nothing_closed(page) == []
    assert page.count("<svg") == 5
    fetched = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?(?!#)[^"')\s>]+""", page)
    assert [f for f in fetched if "#" not in f] == []
    assert "<script" not in page
    assert "<b>lwa" not in page
    assert page.count("&lt;b&gt;lwa&lt;/b&gt;") >= 5  # the table and the legends
    assert comparison.setting["hash"] in page
    assert all(learner in page for learner in ("ridge", "two means", "ALS fold-in", "item-kNN"))


def test_the_report_opens_in_a_browser(comparison, written, browser):
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda r: requests.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(written.as_uri())
    strategies = [name for name in comparison.learners if name not in mr.evaluation.BASELINES]
    assert page.locator("tbody").first.locator("tr").count() == len(comparison.learners)
    assert page.locator("tbody").last.locator("tr").count() == len(strategies)
    clipped = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(clipped) == 0
    assert page.locator("svg").count() == 5
    assert errors == []
    assert requests == [written.as_uri()]
    page.close()


def test_markdown_has_a_row_for_each_learner(comparison):
    lines = mr.evaluation.markdown(comparison, draws=50).splitlines()
    assert lines[0] == mr.evaluation.in_words(comparison.setting)
    assert len(lines) == 4 + len(comparison.learners)
    assert len({line.count(" | ") for line in lines[2:]}) == 1


def test_without_matplotlib_the_report_says_what_to_install(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'metarec-jax\[plot\]'"):
        mr.evaluation.report(comparison, tmp_path / "report.html", draws=10)
