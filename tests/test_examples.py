"""The examples in docstrings print what they say, and every public function has one.

Examples may use `mr` (metarec_jax), `jax`, `jnp` and `np` without importing them; they run in an empty folder.
"""

import doctest
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr

ROOT = Path(mr.__file__).parent
NAMESPACE = {"mr": mr, "jax": jax, "jnp": jnp, "np": np}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text()
}

ROOMS = ("core", "data", "tasks", "metrics", "models", "evaluation")  # all that they export
INSIDE = ("data.cleaning", "metrics.lists", "evaluation.counterfactual", "evaluation.intervals")  # their functions
OTHERS = (
    *("core.implicit.adapt", "core.implicit.proximal", "core.inner.adapt", "core.inner.predict"),
    *("core.sparse.meta_step", "core.sparse.rowwise_adagrad", "Event", "SqliteStore"),
    *("cnp", "ials", "maml", "prototypes", "ranked", "ridge", "stack"),
)
TRAINS = "reads a comparison, which takes seconds of training"
EXCUSED = {
    "data.open_bandit": "needs the network",
    "evaluation.compare": "takes seconds of training",
    "evaluation.Comparison": TRAINS,
    "evaluation.intervals.best_baseline": TRAINS,
    "evaluation.intervals.by_segment": TRAINS,
    "evaluation.intervals.difference": TRAINS,
    "evaluation.intervals.values": TRAINS,
    "evaluation.load_comparison": TRAINS,
    "evaluation.markdown": TRAINS,
    "evaluation.report": TRAINS,
}


def _get(name):
    found = mr
    for part in name.split("."):
        found = getattr(found, part)
    return found


def public_names():
    """Names below `metarec_jax` of the functions and classes that need an example."""
    names = [f"{room}.{name}" for room in ROOMS for name in _get(room).__all__ if callable(_get(f"{room}.{name}"))]
    for inside in INSIDE:
        module = _get(inside)
        names += [
            f"{inside}.{name}"
            for name, value in vars(module).items()
            if not name.startswith("_")
            and callable(value)
            and not isinstance(value, type)
            and getattr(value, "__module__", None) == module.__name__
        ]
    return [*names, *OTHERS]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs=NAMESPACE)
    lines = [line.strip() for line in MODULES[name].read_text().splitlines()]
    assert sum(len(test.examples) for test in tests) == sum(line.startswith(">>> ") for line in lines)
    runner, report = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE), []
    for test in tests:
        runner.run(test, out=report.append)
    assert not report, "".join(report)


def test_every_public_function_has_an_example():
    missing = {name for name in public_names() if ">>> " not in (_get(name).__doc__ or "")}
    assert missing == EXCUSED.keys()
