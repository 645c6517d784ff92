"""Compare: strategies and plain baselines on the same tasks of several splits. Every score is kept, on disk too."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax._files import write_whole
from metarec_jax.data.dataset import Dataset
from metarec_jax.errors import DataError
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.holdout import adaptation_cost, evaluate_scores
from metarec_jax.evaluation.protocol import describe, in_words
from metarec_jax.metrics.scoring import Scores
from metarec_jax.tasks.candidates import Among
from metarec_jax.tasks.candidates import candidates as draw
from metarec_jax.tasks.protocols import Protocol
from metarec_jax.tasks.splits import ColdUsers
from metarec_jax.training.train import train

SUPPORT = (1, 3, 5, 10, None)
SETTING, FAILED = "comparison.json", "failed.json"


class Run(NamedTuple):
    """One learner on one split.

    Attributes:
      scores: `[sizes, users, query]` click probabilities or ratings, one layer for each support size.
      target, mask: `[users, query]`.
      users: `[users]` user rows of the dataset.
      items: `[users, query]` item rows, the candidates.
      lengths: `[users]` support examples that each user has.
      cost: of a strategy `train_s`, `epochs`, `adapt_ms` (a user) and `bytes` (a user's adapted values); of a baseline
        nothing.
      history: the training log, one dict an epoch.
    """

    scores: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    users: np.ndarray
    items: np.ndarray
    lengths: np.ndarray
    cost: dict[str, float]
    history: list[dict[str, float]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; `metarec_jax.evaluation.intervals` and `.report` read it.

    Attributes:
      setting: what was measured, with its hash (`metarec_jax.evaluation.protocol.describe`).
      kind: "click" or "rating".
      runs: by learner and seed, baselines among them.
      failed: by learner and seed, why a training came to nothing.
      segments: named `[user rows]` or `[item rows]` labels, `user/NAME` or `item/NAME`.
    """

    setting: dict[str, Any]
    kind: str
    runs: dict[tuple[str, int], Run]
    failed: dict[tuple[str, int], str]
    segments: dict[str, np.ndarray]

    @property
    def seeds(self) -> list[int]:
        return self.setting["seeds"]

    @property
    def learners(self) -> list[str]:
        """Those with a run of every split: strategies in the order given, then the baselines."""
        names = dict.fromkeys(name for name, _ in self.runs)
        complete = [n for n in names if all((n, seed) in self.runs for seed in self.seeds)]
        return [n for n in complete if n not in BASELINES] + [n for n in BASELINES if n in complete]

    def scores(self, learner: str, seed: int, support: int | None = None) -> Scores:
        """`[users, query]` of one run with at most `support` examples of each user."""
        run = self.runs[learner, seed]
        return Scores(run.scores[self.setting["support"].index(support)], run.target, run.mask)

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(self.learners)} on {in_words(self.setting)}"


def compare(
    data: Dataset,
    strategies: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    splits: int | Sequence[int] = 10,
    protocol: Protocol | None = None,
    support: Sequence[int | None] = SUPPORT,
    candidates: Among = "query",
    folder: str | Path | None = None,
    progress: bool = True,
    report: Callable[[str], Any] = print,
    **train_options: Any,
) -> Comparison:
    """Train each strategy once a split, and score the same test users with each size of support set.

    Args:
      data: the dataset.
      strategies: names in `metarec_jax.STRATEGIES`, or your own names with arguments of `metarec_jax.train`, such as
        `{"wide ridge": {"strategy": "ridge", "model_options": {"width": 32}}}`.
      splits: how many (seeds 0 and up), or the seeds.
      protocol: which users train, validate and test (default `ColdUsers()`).
      support: largest support sizes; None is all that a user has.
      candidates: among what the queries are ranked, see `metarec_jax.Recommender.evaluate`.
      folder: each run is written there when it is done, and what is there is not run again, also after a crash.
      progress: say when a run is done.
      report: what says so.
      **train_options: arguments of `metarec_jax.train` for all strategies.

    Raises:
      DataError: the folder holds a comparison on another protocol or other data.
      ValueError: no strategy, no split, one twice, or a strategy with the name of a baseline.
    """
    seeds = list(range(splits)) if isinstance(splits, int) else [int(s) for s in splits]
    named = {n: {"strategy": n} for n in strategies} if not isinstance(strategies, Mapping) else dict(strategies)
    if not named or len(named) < len(strategies) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("give at least one strategy and one split, and none twice")
    if taken := [n for n in named if n in BASELINES]:
        raise ValueError(f"{taken[0]!r} is the name of a baseline; call the strategy otherwise")
    protocol = ColdUsers() if protocol is None else protocol
    setting = describe(data, protocol, seeds=seeds, support=support, candidates=candidates)
    where = None if folder is None else _open(Path(folder), setting, protocol.target, _segments(data))
    runs: dict[tuple[str, int], Run] = {}
    failed: dict[tuple[str, int], str] = {}
    for name, options in named.items():
        for seed in seeds:
            if where and (found := _read(where, name, seed)):
                runs[name, seed] = found
            else:
                try:
                    fresh = _run(data, name, {**train_options, **options}, protocol, seed, support, candidates)
                except FloatingPointError as error:
                    failed[name, seed] = str(error)
                    if where:
                        write_whole(where / FAILED, json.dumps([[*key, why] for key, why in failed.items()]).encode())
                    continue
                for learner, run in fresh.items():
                    runs.setdefault((learner, seed), run)
                    if where:
                        _write(where, learner, seed, run)
                if progress:
                    report(f"{name}, split {seed}: {fresh[name].cost['train_s']:.0f} s")
            for baseline in BASELINES:
                if where and (baseline, seed) not in runs and (found := _read(where, baseline, seed)):
                    runs[baseline, seed] = found
        jax.clear_caches()  # the next strategy shares no program
    return Comparison(setting, protocol.target, runs, failed, _segments(data))


def load(folder: str | Path) -> Comparison:
    """The comparison that `compare(..., folder=...)` wrote.

    Raises:
      DataError: no comparison there, or a damaged one.
    """
    folder = Path(folder)
    try:
        head = json.loads((folder / SETTING).read_text())
        with np.load(folder / "segments.npz", allow_pickle=False) as file:
            segments = dict(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no comparison, or a damaged one ({error}); see metarec compare -h") from error
    runs = {}
    for path in sorted(folder.glob("run-*.npz"), key=lambda p: p.stat().st_mtime):
        learner, seed, run = _read_file(path)
        if seed in head["setting"]["seeds"]:
            runs[learner, seed] = run
    failed = json.loads((folder / FAILED).read_text()) if (folder / FAILED).exists() else []
    failed = {(name, seed): why for name, seed, why in failed if (name, seed) not in runs}
    return Comparison(head["setting"], head["kind"], runs, failed, segments)


def _run(
    data: Dataset,
    name: str,
    options: Mapping[str, Any],
    protocol: Protocol,
    seed: int,
    support: Sequence[int | None],
    candidates: Among,
) -> dict[str, Run]:
    """The runs of a strategy and of the baselines."""
    start = time.perf_counter()
    trained = train(data, seed=seed, protocol=protocol, **{"progress": False, **options})
    seconds = time.perf_counter() - start
    test = protocol.split(data, seed).test
    found = [evaluate_scores(trained, support=size, candidates=candidates) for size in support]
    own = next(learner for learner in found[0] if learner not in BASELINES)
    judged = draw(test, trained.target, candidates, query=protocol.query)
    milliseconds, size = adaptation_cost(trained)
    cost = {"train_s": seconds, "epochs": len(trained.history), "adapt_ms": milliseconds, "bytes": size}
    lengths = test.lengths - (judged.interaction >= 0).sum(1)
    return {
        (name if learner == own else learner): Run(
            np.stack([scores[learner].scores for scores in found]),
            found[0][learner].target,
            found[0][learner].mask,
            test.users,
            judged.item,
            lengths,
            cost if learner == own else {},
            trained.history if learner == own else [],
        )
        for learner in found[0]
    }


def _segments(data: Dataset) -> dict[str, np.ndarray]:
    """Labels of user and item rows to tell results apart by: how active, how popular, how old, and categories."""
    first = np.full(len(data.items), np.iinfo(np.int64).max)
    np.minimum.at(first, data.item, data.timestamp)
    found = {
        "user/activity": _thirds(np.bincount(data.user, minlength=len(data.users)), "few", "some", "many"),
        "item/popularity": _thirds(np.bincount(data.item, minlength=len(data.items)), "tail", "middle", "head"),
    }
    if data.timestamp.any():
        found["item/age"] = _thirds(first, "old", "middle", "new")
    for field in data.user_fields:
        if field.kind == "categorical" and field.vocabulary is not None:
            names = np.concatenate([["unknown"], field.vocabulary.ids.astype(str)])
            found[f"user/{field.name}"] = names[data.user_features[field.name]]
    return found


def _thirds(values: np.ndarray, low: str, middle: str, high: str) -> np.ndarray:
    """Labels by thirds of the values of rows 1 and up; row 0, the unknown, is in none."""
    cuts = np.quantile(values[1:], [1 / 3, 2 / 3])
    labels = np.array([low, middle, high])[np.searchsorted(cuts, values)]
    labels[0] = ""
    return labels


def _open(folder: Path, setting: dict[str, Any], kind: str, segments: dict[str, np.ndarray]) -> Path:
    """The folder, with its head; one of another setting is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    same = {k: v for k, v in setting.items() if k not in ("seeds", "hash")}  # more splits may be added
    if (folder / SETTING).exists():
        before = json.loads((folder / SETTING).read_text())["setting"]
        if {k: v for k, v in before.items() if k not in ("seeds", "hash")} != same:
            raise DataError(f"{folder} holds a comparison of another kind, {in_words(before)}; give another folder")
    write_whole(folder / "segments.npz", _packed(**segments))
    write_whole(folder / SETTING, json.dumps({"setting": setting, "kind": kind}, indent=1).encode())
    return folder


def _packed(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _path(folder: Path, learner: str, seed: int) -> Path:
    safe = "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in learner)
    return folder / f"run-{safe}-{seed}.npz"


def _write(folder: Path, learner: str, seed: int, run: Run) -> None:
    head = json.dumps({"learner": learner, "seed": seed, "cost": run.cost, "history": run.history})
    arrays = {k: getattr(run, k) for k in ("scores", "target", "mask", "users", "items", "lengths")}
    write_whole(_path(folder, learner, seed), _packed(head=np.array(head), **arrays))


def _read(folder: Path, learner: str, seed: int) -> Run | None:
    path = _path(folder, learner, seed)
    return _read_file(path)[2] if path.exists() else None


def _read_file(path: Path) -> tuple[str, int, Run]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it, and compare again") from error
    head = json.loads(str(arrays.pop("head")))
    return head["learner"], head["seed"], Run(**arrays, cost=head["cost"], history=head["history"])
