"""The command line, run as a user runs it."""

import os
import re
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from metarec_jax import cli


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
    assert all(learner in judged.output for learner in ("alpaca", "two means", "ALS fold-in", "item-kNN"))
    got = run("recommend", model, "3=5", "4=1", "-k", 4)
    assert got.exit_code == 0, got.output
    assert len(re.findall(r"^ +\d\. +0\.\d+ ", got.output, re.MULTILINE)) == 4
    unknown = run("recommend", model, "999=5")
    assert "does not know 999" in unknown.output


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
