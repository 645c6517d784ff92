"""The command line, run as a user runs it."""

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import metarec_jax as mr
from metarec_jax import cli
from metarec_jax.cli import site


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(40)[:15] for _ in range(60)])
    table = {"customer": np.repeat(np.arange(60), 15), "sku": items, "stars": rng.integers(1, 6, size=900)}
    path = tmp_path_factory.mktemp("data") / "ratings.csv"
    pl.DataFrame(table).write_csv(path)
    return path


COLUMNS = ["--column", "user_id=customer", "--column", "item_id=sku", "--column", "rating=stars"]


def run(*arguments):
    return CliRunner().invoke(cli.cli, [str(a) for a in arguments])


def test_train_evaluate_and_recommend_in_a_row(ratings, tmp_path):
    model = tmp_path / "model"
    trained = run("train", ratings, *COLUMNS, "--epochs", 2, "--out", model)
    assert trained.exit_code == 0, trained.output
    assert "metarec recommend" in trained.output
    judged = run("evaluate", model, ratings, *COLUMNS)
    assert judged.exit_code == 0, judged.output
    assert all(learner in judged.output for learner in ("stack", "popularity", "item-kNN", "EASE", "iALS"))
    assert all(column in judged.output for column in ("1 known", "5 known", "all known", "recall@20"))
    assert re.search(r"With 5 known, stack is 0\.\d+ (ahead of|behind) .*95 % interval", judged.output)
    told = json.loads(run("evaluate", model, ratings, *COLUMNS, "--json", "--support", 2).output)
    assert list(told) == ["stack", "popularity", *(f"{name} + popularity" for name in ("item-kNN", "EASE", "iALS"))]
    assert all(0 < values["ndcg@100, 2 known"] < 1 for values in told.values())
    few = run("evaluate", model, ratings, *COLUMNS, "--support", 2)
    assert re.search(r"With 2 known, stack is", few.output), few.output
    refused = run("evaluate", model, ratings, *COLUMNS, "--candidates", "all")
    assert (refused.exit_code, "--candidates is for clicks" in refused.output) == (2, True)
    got = run("recommend", model, "3=5", "4=1", "-k", 4)
    assert got.exit_code == 0, got.output
    shown = [float(score) for score in re.findall(r"^ +\d\. +(\d\.\d+) ", got.output, re.MULTILINE)]
    assert len(shown) == 4
    assert shown[0] == 1.0  # relative to the first
    assert shown == sorted(shown, reverse=True)
    unknown = run("recommend", model, "999=5")
    assert "unknown to the model (999)" in unknown.output


@pytest.mark.parametrize("options", [("--objective", "click"), ("--target", "click"), ("--objective", "rating")])
def test_clicks_and_ratings_are_asked_for_by_objective(ratings, tmp_path, options):
    model, kind = tmp_path / "model", options[1]
    trained = run("train", ratings, *COLUMNS, *options, "--query", 5, "--epochs", 2, "--out", model)
    assert trained.exit_code == 0, trained.output
    assert ("--target is deprecated" in trained.output) == (options[0] == "--target")
    recommender = mr.load(model)
    assert (recommender.target.kind, recommender.trained.recipe["strategy"]["name"]) == (kind, "alpaca")
    assert recommender.protocol == mr.ColdUsers(query=5, target=kind)
    judged = run("evaluate", model, ratings, *COLUMNS)
    assert judged.exit_code == 0, judged.output
    assert all(learner in judged.output for learner in ("alpaca", "two means", "ALS fold-in", "item-kNN"))
    got = run("recommend", model, "3=5", "4=1", "-k", 4)
    assert got.exit_code == 0, got.output
    assert len(re.findall(r"^ +\d\. +\d\.\d+ ", got.output, re.MULTILINE)) == 4


def test_options_of_clicks_are_refused_to_rank(ratings):
    for option in (("--query", 5), ("--users", 5, 50)):
        got = run("train", ratings, *COLUMNS, *option)
        assert got.exit_code == 2
        assert f"{option[0]} is for --objective click or rating" in got.output


def test_a_table_without_ratings_and_items_without_ratings(tmp_path):
    rng = np.random.default_rng(0)
    path, model = tmp_path / "plays.csv", tmp_path / "model"
    items = np.concatenate([rng.permutation(30)[:8] for _ in range(60)])
    pl.DataFrame({"user_id": np.repeat(np.arange(60), 8), "item_id": [f"x{i}" for i in items]}).write_csv(path)
    trained = run("train", path, "--strategy", "ials", "--epochs", 1, "--out", model)
    assert trained.exit_code == 0, trained.output
    alone, rated = run("recommend", model, "x1", "x2", "-k", 3), run("recommend", model, "x1=1", "x2=1", "-k", 3)
    assert alone.exit_code == 0, alone.output
    assert alone.output == rated.output
    assert "are mixed" in str(run("recommend", model, "x1", "x2=1").exception)
    assert run("explain", model, "x3", "x1", "x2").exit_code == 0


def test_quickstart_shows_a_ranking_and_a_list_for_a_taste(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.commands, "EXAMPLE_USER", {3: 5, 5: 4, 8: 1})
    monkeypatch.setattr(mr.data, "load", lambda name: mr.data.synthetic(users=80, items=60, seed=1))
    monkeypatch.setattr(mr, "train", functools.partial(mr.train, strategy="ials", epochs=1))
    got = run("quickstart", "--out", tmp_path / "model")
    assert got.exit_code == 0, got.output
    assert "With 5 known, ials is" in got.output
    assert re.search(r"5 of 5  item 3 .*\[3\]  genre \d", got.output)
    assert len(re.findall(r"^ +\d+\. +\d\.\d+  item \d+ .*genre \d$", got.output, re.MULTILINE)) == 10
    assert mr.load(tmp_path / "model").target.kind == "ranking"


@pytest.mark.parametrize("command", ["quickstart", "train", "evaluate", "recommend"])
def test_help_teaches(command):
    got = run(command, "--help")
    assert got.exit_code == 0
    assert len(got.output) > 300


def test_mistakes_get_one_line_and_no_traceback(monkeypatch, capsys, tmp_path):
    for arguments, message in [
        (["train", str(tmp_path / "nothing.csv")], "nothing.csv"),
        (["train", "ml-99k"], "neither a known dataset"),
        (["recommend", str(tmp_path)], "is this a saved model"),
    ]:
        monkeypatch.setattr("sys.argv", ["metarec", *arguments])
        with pytest.raises(SystemExit) as error:
            cli.main()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_compiled_programs_are_kept_for_the_next_command(ratings, tmp_path):
    """As a command of its own: only `main` keeps them."""
    model, where = tmp_path / "model", {**os.environ, "METAREC_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    where.pop("JAX_COMPILATION_CACHE_DIR", None)  # of the caller, which would be used in its place
    assert run("train", ratings, *COLUMNS, "--epochs", 1, "--out", model).exit_code == 0
    command = [sys.executable, "-m", "metarec_jax.cli", "explain", str(model), "4", "3=5", "2=1"]
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "for someone who has done nothing yet" in done.stdout
    assert list((tmp_path / "cache" / "compiled").iterdir())


def test_compare_and_report_in_a_row(ratings, tmp_path):
    out, page = tmp_path / "comparison", tmp_path / "report.html"
    options = ("-s", "ridge", "--splits", 2, "--epochs", 1, "--out", out)
    first = run("compare", ratings, *COLUMNS, *options)
    assert first.exit_code == 0, first.output
    assert "| ridge |" in first.output
    assert "ridge, split 1" in first.output
    again = run("compare", ratings, *COLUMNS, *options)
    assert again.exit_code == 0, again.output
    assert "split 1:" not in again.output  # nothing was run again
    shown = run("report", out, "--out", page)
    assert shown.exit_code == 0, shown.output
    assert "<svg" in page.read_text()


def test_tables_of_items_and_users_and_a_protocol_are_taken(ratings, tmp_path):
    data, model = pl.read_csv(ratings), tmp_path / "model"
    items, users = data["sku"].unique().sort(), data["customer"].unique().sort()
    pl.DataFrame({"sku": items, "colour": [("red", "blue")[i % 2] for i in range(len(items))]}).write_csv(
        tmp_path / "items.csv"
    )
    pl.DataFrame({"customer": users, "age": [20 + i % 50 for i in range(len(users))]}).write_csv(tmp_path / "users.csv")
    tables = ["--item-table", tmp_path / "items.csv", "--user-table", tmp_path / "users.csv"]
    protocol = ["--protocol", "StrongGeneralisation", "--set", "held_out=0.3", "--set", "fractions=[0.6, 0.2, 0.2]"]
    options = ["--strategy", "ials", "--epochs", 1, "--out", model]
    trained = run("train", ratings, *COLUMNS, *tables, *protocol, *options)
    assert trained.exit_code == 0, trained.output
    recommender = mr.load(model)
    assert recommender.protocol == mr.StrongGeneralisation(held_out=0.3, fractions=(0.6, 0.2, 0.2))
    assert [f.name for f in recommender.catalogue.user_fields] == ["age"]
    assert "colour" in [f.name for f in recommender.catalogue.item_fields]
    judged = run("evaluate", model, ratings, *COLUMNS, *tables, "--support", 1)
    assert judged.exit_code == 0, judged.output
    for wrong, message in [
        (["--protocol", "Strong"], "choose from ColdUsers"),
        (["--set", "held=1"], "no setting 'held'; it has dislikes"),
        (["--set", "threshold=high"], "--set threshold: expected numbers, got 'high'"),
        (["--set", "fractions=3"], "does not take these settings"),
        (["--protocol", "NextItem", "--objective", "click"], "judges rankings"),
    ]:
        refused = run("train", ratings, *COLUMNS, *wrong)
        assert refused.exit_code, refused.output
        assert message in refused.output + str(refused.exception)


def test_docs_lists_the_pages_and_prints_one():
    listed = run("docs")
    assert listed.exit_code == 0, listed.output
    pages = re.findall(r"^ . ([a-z-]+):", listed.output, re.MULTILINE)
    assert {"shop-clicks", "concepts", "strategies", "measured"} <= set(pages)
    for page in pages:
        shown = run("docs", page)
        assert shown.exit_code == 0, shown.output
        assert "After this page you" in shown.output
    assert "StrongGeneralisation" in run("docs", "data").output
    refused = run("docs", "nothing")
    assert (refused.exit_code, "there is no page 'nothing'; choose from command-line" in refused.output) == (2, True)


def test_links_of_the_site_lead_to_files(tmp_path):
    """The pages alone: the API reference takes ten seconds."""
    pytest.importorskip("pdoc")
    first = site.write_pages(tmp_path)
    assert {file.stem for file in tmp_path.glob("*.html")} == set(site.page_names())
    assert (tmp_path / "page.png").exists()
    linked = set()
    for page in tmp_path.glob("*.html"):
        html = page.read_text(encoding="utf-8")
        for target in re.findall(r'href="(?!https?:|api/)([^"]+)"', html):
            name, _, part = target.partition("#")
            other = tmp_path / (name or page.name)
            assert other.exists(), f"{page.name}: {target}"
            assert not part or f'id="{part}"' in other.read_text(encoding="utf-8"), f"{page.name}: {target}"
            linked |= {name} if page == first else set()
    assert len(linked) == len(site.page_names())
    modules = site.public_modules()  # what the links to api/ lead to
    assert {"metarec_jax", "metarec_jax.core", "metarec_jax.serving", "metarec_jax.strategies.ridge"} <= set(modules)


def test_a_site_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    refused = run("docs", "--site", tmp_path / "site")
    assert (refused.exit_code, "pip install 'metarec-jax[docs]'" in refused.output) == (2, True)
    assert not (tmp_path / "site").exists()
    assert "leave out PAGE" in run("docs", "data", "--site", tmp_path / "site").output
