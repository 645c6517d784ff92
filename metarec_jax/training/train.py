"""Train: from a dataset to a trained model: protocol, split, target, network, training loop."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metarec_jax._progress import epochs_bar
from metarec_jax._progress import tensorboard as event_files
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.data.schema import fields_of
from metarec_jax.data.tables import from_tables
from metarec_jax.models import Model
from metarec_jax.strategies import RATING, STRATEGIES, Strategy
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.strategies.wrappers.stack import of_catalogue
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.protocols import Protocol, ratings_of
from metarec_jax.tasks.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.tasks.splits import ColdUsers, Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target
from metarec_jax.training.build import build, default_model, recipe_of
from metarec_jax.training.loop import EPOCHS, fit
from metarec_jax.training.trained import Trained
from metarec_jax.training.transfer import carry_over
from metarec_jax.types import Params

DEFAULT_STRATEGY = {"ranking": "stack", "click": "alpaca", "rating": "alpaca"}


def train(
    data: Dataset | Any,
    strategy: str | Callable[..., Strategy] | None = None,
    model: str | Callable[..., Model] | None = None,
    *,
    objective: str | Ranking | None = None,
    seed: int = 0,
    protocol: Protocol | None = None,
    graded: bool = True,
    ratings: str | None = "als",
    strategy_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    start: Any = None,
    shared: Collection[str] | None = None,
    progress: bool = True,
    tensorboard: str | Path | None = None,
    **fit_options: Any,
) -> Trained:
    """Meta-train a recommender on a dataset.

    Args:
      data: from `metarec_jax.data`; or a table as of `metarec_jax.data.from_tables`, with the columns user_id, item_id
        and, where there are any, rating and timestamp.
      strategy: a name in `metarec_jax.strategies.STRATEGIES` or `RANKING`, or a function `(model, loss=...) ->
        Strategy`; by default "stack" to rank and "alpaca" for clicks and ratings.
      model: a name in `metarec_jax.models.MODELS`, or a function `(fields) -> Model`; by default what
        `metarec_jax.strategies.DEFAULT_MODEL` says of the strategy, else "mlp".
      objective: "ranking", which item of the whole catalogue a user chooses, or a `Ranking` with settings of it;
        "click", the probability that a shown item is liked; "rating". Default: the protocol's target, and "ranking"
        without a protocol.
      seed: of the split, the parameters and the sampling; same seed, same machine: same model.
      protocol: which users train, validate and test (default: `StrongGeneralisation` to rank, else `ColdUsers`).
      graded: where clicks are made from ratings, learn what each rating of a support set tells of the user, and show
        the mean rating of an item beside its share of clicks; else a rating counts as a click or none.
      ratings: of a ranking where the data hold ratings of several values, the name of the strategy that `predict`
        asks, trained on the same users with its own options as they are (`Recommender.rater`); None: no `predict`.
      strategy_options, model_options: keyword arguments of the two.
      start: a recommender trained on other data, to start from its parameters instead of random ones. Rows of tables
        are carried over where both know the raw value (an item id, a genre), layers where their shapes are the same.
      shared: with `start`, the fields whose raw values mean the same in both datasets, by the names of
        `metarec_jax.models.fields_of` (default: all that both have). Leave out "item_id" where the same number is
        another item.
      progress: show a progress bar.
      tensorboard: a folder for event files with each epoch's loss and validation metrics.
      **fit_options: other keyword arguments of `metarec_jax.training.fit`, for instance `epochs`, `optimizer` or
        `checkpoint`; what is predicted and the query size are the protocol's.

    Raises:
      DataError: the dataset has too few users for the protocol; all ratings of the training users are clicks, or none.
      ValueError: an unknown name; `start` was trained for another target, or with another strategy or model; `shared`
        without `start`.
      TypeError: `data` is a name; `start` is no recommender; an argument that the protocol has, or that nothing has.
      FloatingPointError: the loss is no longer finite.
      ModelFileError: `checkpoint` is damaged or of another training.
      ModuleNotFoundError: `tensorboard` needs a package that is missing.
    """
    for name in ("target", "query"):
        if name in fit_options:
            raise TypeError(f"`{name}` is the protocol's: train(..., protocol=mr.ColdUsers({name}=...))")
    if isinstance(data, str | Path):
        raise TypeError(f"train takes a dataset or a table, not a name: mr.data.load({str(data)!r})")
    if not isinstance(data, Dataset):
        data = from_tables(data)
    protocol, ranking = _asked(objective, protocol)
    if ranking is not None:
        fit_options["objective"] = ranking
    if ratings is not None and ratings not in STRATEGIES | RATING:
        raise ValueError(f"ratings: {ratings!r} is unknown; choose from {', '.join(RATING | STRATEGIES)}, or None")
    if strategy is None:
        strategy = DEFAULT_STRATEGY[protocol.target]
    model = default_model(strategy) if model is None else model
    split = protocol.split(data, seed)
    target = Target.fit(protocol, split.train, graded)
    statistics = ItemStatistics.fit(split.train, target)
    extended = statistics.extend(data)
    split = Split(*(replace(part, data=extended) for part in split))
    if progress:
        print(_who_trains(split, protocol))
    if strategy == "stack":
        own = dict(strategy_options or {})
        items = fields_of(extended)["item_id"].size
        strategy_options = own | of_catalogue(items, own.get("members"), own.get("options"))
    recipe = recipe_of(strategy, strategy_options, model, model_options)
    built = build(strategy, strategy_options, model, model_options, extended, target)
    if start is None and shared is not None:
        raise ValueError("`shared` names fields that are shared with the data of `start`: give both or none")
    if start is not None:
        fit_options["params"] = _started(start, built, target, extended, seed, shared)
    reports = [fit_options.pop("report", None)]
    progress = progress and bool(jax.tree.leaves(jax.eval_shape(built.init, jax.random.key(0))))  # there are epochs
    with (
        epochs_bar(progress, fit_options.get("epochs") or EPOCHS[target.kind], target.kind) as bar,
        event_files(tensorboard) as events,
    ):
        reports += [bar, events]

        def report(epoch: int, entry: dict[str, float]) -> None:
            for each in filter(None, reports):
                each(epoch, entry)

        fitted = fit(
            built,
            split,
            target,
            query=protocol.query,
            statistics=statistics,
            seed=seed,
            report=report,
            told={**recipe, "data": fingerprint(extended)} if fit_options.get("checkpoint") else None,
            **fit_options,
        )
    rater = None
    if target.kind == "ranking" and ratings is not None and np.ptp(data.rating) > 0:
        rater = train(data, ratings, seed=seed, protocol=ratings_of(protocol), progress=False)
    limits = _limits(split, target)
    return Trained(built, fitted.params, extended, target, protocol, seed, recipe, limits, fitted.history, rater)


def _started(
    start: Any, built: Strategy, target: Target, data: Dataset, seed: int, shared: Collection[str] | None
) -> Params:
    """Initial parameters with those of `start` carried over."""
    source = getattr(start, "trained", start)
    if not isinstance(source, Trained):
        raise TypeError(f"start must be a Recommender, got {type(start).__name__}; a saved one: mr.load(path)")
    if source.target.kind != target.kind:
        raise ValueError(f"start predicts a {source.target.kind}, this training a {target.kind}; use one target")
    fresh = jax.jit(built.init)(jax.random.key(seed))
    learned = {name: value for name, value in source.params.items() if name != TABLES}
    return carry_over(learned, fresh, fields_of(source.catalogue), fields_of(data), shared)


def _limits(split: Split, target: Target) -> tuple[float, float]:
    """Lowest and highest rating of the training users."""
    rating = split.train.data.rating[split.train.index]
    lowest, highest = float(rating.min()), float(rating.max())
    if target.kind == "ranking" and lowest >= target.threshold:
        lowest = target.threshold - 1  # a dismissal must not count as a positive
    return lowest, highest


def _who_trains(split: Split, protocol: Protocol) -> str:
    """What of a dataset a training uses, in words."""
    data = split.train.data
    used, sizes = len(np.unique(split.train.index)), [len(np.unique(part.users)) for part in split]
    left_out = len(data.users) - 1 - len(np.unique(np.concatenate([part.users for part in split])))
    name = type(protocol).__name__
    return (
        f"{name}: {sizes[0]:,} users train on {used:,} of {len(data.rating):,} interactions, {sizes[1]:,} validate, "
        f"{sizes[2]:,} test" + (f"; {left_out:,} users have too few interactions for {name}" if left_out else "")
    )


def _asked(objective: str | Ranking | None, protocol: Protocol | None) -> tuple[Protocol, Ranking | None]:
    """The protocol and the ranking objective that are meant; None of the latter for clicks and ratings."""
    kind = "ranking" if isinstance(objective, Ranking) else objective
    if kind not in (None, "ranking", "click", "rating"):
        raise ValueError(f'objective is "ranking", "click", "rating" or a Ranking, got {objective!r}')
    if protocol is None:
        protocol = StrongGeneralisation() if kind in (None, "ranking") else ColdUsers(target=kind)  # type: ignore[arg-type]
    elif kind is not None and kind != protocol.target:
        if isinstance(protocol, StrongGeneralisation | NextItem):
            raise ValueError(f'{type(protocol).__name__} judges rankings; objective="{kind}" needs another protocol')
        protocol = replace(protocol, target=kind)  # type: ignore[arg-type]
    if protocol.target != "ranking":
        return protocol, None
    return protocol, objective if isinstance(objective, Ranking) else Ranking()
