"""Comparison of strategies and baselines on the same tasks over several splits, with all scores saved."""

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarec_jax._files import write_whole
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import ITEM, USER
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
      scores: `[sizes, users, query]` click probabilities or ratings for each support size.
      target, mask: `[users, query]`.
      users: `[users]` user rows of the dataset.
      items: `[users, query]` item rows of the candidates.
      lengths: `[users]` available support examples of each user.
      cost: for a strategy `train_s`, `epochs`, `adapt_ms` (a user) and `bytes` (of a user's adapted values); empty for
        a baseline.
      history: training log, one dict an epoch.
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
    """Results of `compare`, the input of `metarec_jax.evaluation.intervals` and `.reports`.

    Attributes:
      setting: what was measured, with its hash (`metarec_jax.evaluation.protocol.describe`).
      kind: "click" or "rating".
      runs: runs by learner and seed, including baselines.
      failed: reasons of failed trainings, by learner and seed.
      segments: labels of user rows (`user/NAME`) and item rows (`item/NAME`).
    """

    setting: dict[str, Any]
    kind: str
    runs: dict[tuple[str, int], Run]
    failed: dict[tuple[str, int], str]
    segments: dict[str, np.ndarray]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the splits."""
        return self.setting["seeds"]

    @property
    def learners(self) -> list[str]:
        """Learners with a run on every split: strategies in the given order, then baselines."""
        names = dict.fromkeys(name for name, _ in self.runs)
        complete = [n for n in names if all((n, seed) in self.runs for seed in self.seeds)]
        return [n for n in complete if n not in BASELINES] + [n for n in BASELINES if n in complete]

    def scores(self, learner: str, seed: int, support: int | None = None) -> Scores:
        """Return the scores of one run, `[users, query]`, with at most `support` examples of each user."""
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
    """Train each strategy on every split; score the same test users with each support size.

    Args:
      data: the dataset.
      strategies: names in `metarec_jax.STRATEGIES`, or your own names with arguments of `metarec_jax.train`, such as
        `{"wide ridge": {"strategy": "ridge", "model_options": {"width": 32}}}`.
      splits: number of splits (seeds 0 and up), or the seeds.
      protocol: the split into training, validation and test users (default `ColdUsers()`).
      support: largest support sizes; None for all.
      candidates: the items among which queries are ranked, see `metarec_jax.Recommender.evaluate`.
      folder: save each run there when it finishes; saved runs are not repeated, so an interrupted comparison resumes.
      progress: report each finished run.
      report: called with the progress messages.
      **train_options: arguments of `metarec_jax.train` for all strategies.

    Raises:
      DataError: the folder holds a comparison on another protocol or other data.
      ValueError: there is no strategy or no split, a duplicate, or a strategy named like a baseline.
    """
    seeds = list(range(splits)) if isinstance(splits, int) else [int(s) for s in splits]
    options_of = {n: {"strategy": n} for n in strategies} if not isinstance(strategies, Mapping) else dict(strategies)
    if not options_of or len(options_of) < len(strategies) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            "give at least one strategy and one split, and none twice; "
            f"got strategies {list(strategies)}, seeds {seeds}"
        )
    if taken := [n for n in options_of if n in BASELINES]:
        raise ValueError(f"{taken[0]!r} is the name of a baseline; give the strategy another name")
    protocol = ColdUsers() if protocol is None else protocol
    if protocol.target == "ranking":
        raise ValueError(
            f"compare is for clicks and ratings; {type(protocol).__name__} judges rankings (see rankings())"
        )
    setting = describe(data, protocol, seeds=seeds, support=support, candidates=candidates)
    saved_in = None if folder is None else _open(Path(folder), setting, protocol.target, _segments(data))
    runs: dict[tuple[str, int], Run] = {}
    failed: dict[tuple[str, int], str] = {}
    for name, options in options_of.items():
        for seed in seeds:
            if saved_in and (saved := _read(saved_in, name, seed)):
                runs[name, seed] = saved
            else:
                try:
                    new_runs = _run(data, name, {**train_options, **options}, protocol, seed, support, candidates)
                except FloatingPointError as error:
                    failed[name, seed] = str(error)
                    if saved_in:
                        write_whole(
                            saved_in / FAILED, json.dumps([[*key, why] for key, why in failed.items()]).encode()
                        )
                    continue
                for learner, run in new_runs.items():
                    runs.setdefault((learner, seed), run)
                    if saved_in:
                        _write(saved_in, learner, seed, run)
                if progress:
                    report(f"{name}, split {seed}: {new_runs[name].cost['train_s']:.0f} s")
            for baseline in BASELINES:
                if saved_in and (baseline, seed) not in runs and (saved := _read(saved_in, baseline, seed)):
                    runs[baseline, seed] = saved
    return Comparison(setting, protocol.target, runs, failed, _segments(data))


def load(folder: str | Path) -> Comparison:
    """Load the comparison saved by `compare(..., folder=...)`.

    Raises:
      DataError: there is no comparison, or it is damaged.
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
    """Train a strategy on one split; return its run and those of the baselines."""
    start = time.perf_counter()
    trained = train(data, seed=seed, protocol=protocol, **{"progress": False, **options})
    seconds = time.perf_counter() - start
    test = protocol.split(data, seed).test
    by_size = [evaluate_scores(trained, support=size, candidates=candidates) for size in support]
    strategy_name = next(learner for learner in by_size[0] if learner not in BASELINES)
    chosen = draw(test, trained.target, candidates, query=protocol.query)
    milliseconds, size = adaptation_cost(trained)
    cost = {"train_s": seconds, "epochs": len(trained.history), "adapt_ms": milliseconds, "bytes": size}
    lengths = test.lengths - (chosen.interaction >= 0).sum(1)
    return {
        (name if learner == strategy_name else learner): Run(
            np.stack([scores[learner].scores for scores in by_size]),
            by_size[0][learner].target,
            by_size[0][learner].mask,
            test.users,
            chosen.item,
            lengths,
            cost if learner == strategy_name else {},
            trained.history if learner == strategy_name else [],
        )
        for learner in by_size[0]
    }


def _segments(data: Dataset) -> dict[str, np.ndarray]:
    """Label user and item rows by activity, popularity, age and categorical user fields."""
    first = np.full(len(data.items), np.iinfo(np.int64).max)
    np.minimum.at(first, data.item, data.timestamp)
    segments = {
        USER + "activity": _thirds(np.bincount(data.user, minlength=len(data.users)), "few", "some", "many"),
        ITEM + "popularity": _thirds(np.bincount(data.item, minlength=len(data.items)), "tail", "middle", "head"),
    }
    if data.timestamp.any():
        segments[ITEM + "age"] = _thirds(first, "old", "middle", "new")
    for field in data.user_fields:
        if field.kind == "categorical" and field.vocabulary is not None:
            names = np.concatenate([["unknown"], field.vocabulary.ids.astype(str)])
            segments[USER + field.name] = names[data.user_features[field.name]]
    return segments


def _thirds(values: np.ndarray, low: str, middle: str, high: str) -> np.ndarray:
    """Label the values of rows 1 and up by thirds; row 0, the unknown, gets no label."""
    cuts = np.quantile(values[1:], [1 / 3, 2 / 3])
    labels = np.array([low, middle, high])[np.searchsorted(cuts, values)]
    labels[0] = ""
    return labels


def _open(folder: Path, setting: dict[str, Any], kind: str, segments: dict[str, np.ndarray]) -> Path:
    """Create the folder and write its setting; raise `DataError` if it holds a comparison on another setting."""
    folder.mkdir(parents=True, exist_ok=True)
    comparable = {k: v for k, v in setting.items() if k not in ("seeds", "hash")}  # splits may be added
    if (folder / SETTING).exists():
        before = json.loads((folder / SETTING).read_text())["setting"]
        if {k: v for k, v in before.items() if k not in ("seeds", "hash")} != comparable:
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
        raise DataError(f"{path}: damaged ({error}); delete it and compare again") from error
    head = json.loads(str(arrays.pop("head")))
    return head["learner"], head["seed"], Run(**arrays, cost=head["cost"], history=head["history"])
