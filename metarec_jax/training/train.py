"""Train: the path from a dataset to a trained model: protocol, split, target, network, training loop."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metarec_jax._progress import epochs_bar
from metarec_jax._progress import tensorboard as event_files
from metarec_jax.core import Layout
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.data.prepared import Prepared
from metarec_jax.data.schema import ITEM_ID, fields_of
from metarec_jax.data.tables import from_tables
from metarec_jax.errors import OptionError
from metarec_jax.models import Model
from metarec_jax.strategies import RATING, STRATEGIES, Strategy
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.strategies.wrappers.stack import of_catalogue
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.protocols import Protocol, ratings_of
from metarec_jax.tasks.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.tasks.splits import ColdUsers, Split, everything
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
      data: a dataset from `metarec_jax.data`, what `metarec_jax.data.prepare` returns, or a table as in
        `metarec_jax.data.from_tables`, with the columns user_id, item_id and optionally rating and timestamp.
      strategy: a name in `metarec_jax.strategies.STRATEGIES` or `RANKING`, or a function `(model, loss=...) ->
        Strategy` (default: "stack" for rankings, "alpaca" for clicks and ratings).
      model: a name in `metarec_jax.models.MODELS`, or a function `(fields) -> Model` (default: the strategy's entry in
        `metarec_jax.strategies.DEFAULT_MODEL`, else "mlp").
      objective: "ranking", which item of the whole catalogue a user chooses, or a `Ranking` with its settings; "click",
        the probability that a shown item is liked; "rating". Default: the protocol's target, or "ranking" without a
        protocol.
      seed: seed of the split, the parameters and the sampling. The same seed on the same machine gives the same model.
      protocol: which users train, validate and test (default: `StrongGeneralisation` for rankings, else `ColdUsers`).
      graded: where clicks are made from ratings, learn what each rating value in a support set tells about the user,
        and add an item's mean rating to its click rate as a feature. If False, a rating is only a click or none.
      ratings: of a ranking, the name of the strategy behind `predict` (`Recommender.rater`), trained on the same users
        with its default options. It needs data with several rating values. None: no `predict`.
      strategy_options, model_options: keyword arguments of the strategy and of the model.
      start: a recommender trained on other data, whose parameters replace the random initial ones. Rows of embedding
        tables are matched by raw value (an item id, a genre), layers by shape.
      shared: with `start`, the fields whose raw values mean the same in both datasets, by the names of
        `metarec_jax.models.fields_of` (default: all common fields). Leave out "item_id" if the same id is another item.
      progress: show a progress bar.
      tensorboard: folder for event files with the loss and the validation metrics of each epoch.
      **fit_options: other keyword arguments of `metarec_jax.training.fit`, such as `epochs`, `optimizer`, `checkpoint`
        or `mesh`. The protocol sets the target and the query size.

    Raises:
      DataError: too few users for the protocol; all ratings of the training users are clicks, or none is.
      ValueError: an unknown name; `start` has another target, strategy or model; `shared` without `start`.
      TypeError: `data` is a name; `start` is not a recommender; an unknown argument, or one that the protocol sets.
      FloatingPointError: the loss is not finite.
      ModelFileError: `checkpoint` is damaged or belongs to another training.
      ModuleNotFoundError: `tensorboard` needs a package that is missing.
    """
    for name in ("target", "query"):
        if name in fit_options:
            raise TypeError(f"`{name}` is set by the protocol: train(..., protocol=mr.ColdUsers({name}=...))")
    if isinstance(data, str | Path):
        raise TypeError(f"train takes a dataset or a table, not a name: mr.data.load({str(data)!r})")
    if ratings is not None and ratings not in STRATEGIES | RATING:
        raise ValueError(f"ratings: {ratings!r} is unknown; choose from {', '.join(RATING | STRATEGIES)}, or None")
    if start is None and shared is not None:
        raise ValueError("`shared` names fields in common with the data of `start`: give both or none")
    if isinstance(data, Prepared):
        data = data.dataset()
    if not isinstance(data, Dataset):
        data = from_tables(data)
    protocol, ranking = _resolve_objective(objective, protocol)
    if ranking is not None:
        fit_options["objective"] = ranking
    strategy = DEFAULT_STRATEGY[protocol.target] if strategy is None else strategy
    model = default_model(strategy) if model is None else model
    strategy_options, model_options = (o and copy.deepcopy(dict(o)) for o in (strategy_options, model_options))
    progress = progress and Layout(fit_options.get("mesh")).leads
    plan = Plan(
        data, strategy, strategy_options, model, model_options, protocol, seed, graded, start, shared, tensorboard,
        fit_options,
    )  # fmt: skip
    split = protocol.split(data, seed)
    if progress:
        print(_describe_split(split, protocol))
    trained = _trained(plan, split, progress)
    if trained.target.kind == "ranking" and ratings is not None and np.ptp(data.rating) > 0:
        mesh = fit_options.get("mesh")
        rater = train(data, ratings, seed=seed, protocol=ratings_of(protocol), progress=False, mesh=mesh)
        return replace(trained, rater=rater)
    return trained


def refit(trained: Trained, progress: bool = True) -> Trained:
    """Train again on the users of all parts of the split; see `metarec_jax.Recommender.refit`."""
    plan: Plan | None = trained.plan
    if plan is None:
        raise OptionError(
            "only the recommender that train returned can be refitted: a loaded, reweighted or refitted one does not "
            "hold its training; call refit before save"
        )
    split = plan.protocol.split(plan.data, plan.seed)
    whole = split._replace(train=everything(split))
    if progress:
        used, users = len(np.unique(whole.train.index)), len(np.unique(whole.train.users))
        print(f"refit: {users:,} users train on {used:,} interactions for {trained.epoch + 1} epochs")
    fitted = _trained(plan, whole, progress, trained.epoch)
    rater = None if trained.rater is None else refit(trained.rater, progress=False)
    return replace(fitted, history=trained.history, rater=rater, refitted=True, plan=None)


class Plan(NamedTuple):
    """The arguments of a training, after defaults are filled in; see `train`."""

    data: Dataset
    strategy: str | Callable[..., Strategy]
    strategy_options: Mapping[str, Any] | None
    model: str | Callable[..., Model]
    model_options: Mapping[str, Any] | None
    protocol: Protocol
    seed: int
    graded: bool
    start: Any
    shared: Collection[str] | None
    tensorboard: str | Path | None
    fit_options: dict[str, Any]


def _trained(plan: Plan, split: Split, progress: bool, last: int | None = None) -> Trained:
    """Train on `split.train`; with `last`, up to that epoch and without validation."""
    target = Target.fit(plan.protocol, split.train, plan.graded)
    statistics = ItemStatistics.fit(split.train, target)
    extended = statistics.extend(plan.data)
    split = Split(*(replace(part, data=extended) for part in split))
    strategy_options = plan.strategy_options
    if plan.strategy == "stack":
        given = dict(strategy_options or {})
        known = {name: given[name] for name in ("members", "options", "novelty") if name in given}
        strategy_options = given | of_catalogue(fields_of(extended)[ITEM_ID].size, **known)
    choice = plan.strategy, strategy_options, plan.model, plan.model_options
    recipe, built = recipe_of(*choice), build(*choice, extended, target)
    options = dict(plan.fit_options)
    if plan.start is not None:
        options["params"] = _initial_params(plan.start, built, target, extended, plan.seed, plan.shared)
    if options.get("checkpoint"):
        options["told"] = {**recipe, "data": fingerprint(extended)}
    if last is not None:
        options |= {"epochs": last + 1, "validate": False}
        if options.get("checkpoint"):
            options["checkpoint"] = f"{options['checkpoint']}.refit"
    has_epochs = bool(jax.tree.leaves(jax.eval_shape(built.init, jax.random.key(0))))
    epochs = EPOCHS[target.kind] if options.get("epochs") is None else options["epochs"]
    own = options.pop("report", None) if last is None else None
    with (
        epochs_bar(progress and has_epochs, epochs, target.kind) as bar,
        event_files(None if last is not None else plan.tensorboard) as events,
    ):

        def report(epoch: int, entry: dict[str, float]) -> None:
            for each in filter(None, (own, bar, events)):
                each(epoch, entry)

        fitted = fit(
            built, split, target, query=plan.protocol.query, statistics=statistics, seed=plan.seed, report=report,
            **options,
        )  # fmt: skip
    limits = _rating_limits(split, target)
    return Trained(
        built, fitted.params, extended, target, plan.protocol, plan.seed, recipe, limits, fitted.history,
        epoch=fitted.epoch, plan=plan,
    )  # fmt: skip


def _initial_params(
    start: Any, built: Strategy, target: Target, data: Dataset, seed: int, shared: Collection[str] | None
) -> Params:
    """Return initial parameters with those of `start` carried over."""
    source = getattr(start, "trained", start)
    if not isinstance(source, Trained):
        raise TypeError(f"start must be a Recommender, got {type(start).__name__}; a saved one: mr.load(path)")
    if source.target.kind != target.kind:
        raise ValueError(f"start predicts a {source.target.kind}, this training a {target.kind}; use one target")
    init_key, _ = jax.random.split(jax.random.key(seed))  # as `fit` does
    fresh = jax.jit(built.init)(init_key)
    learned = {name: value for name, value in source.params.items() if name != TABLES}
    return carry_over(learned, fresh, fields_of(source.catalogue), fields_of(data), shared)


def _rating_limits(split: Split, target: Target) -> tuple[float, float]:
    """Return the lowest and highest rating of the training users."""
    rating = split.train.data.rating[split.train.index]
    lowest, highest = float(rating.min()), float(rating.max())
    if target.kind == "ranking" and lowest >= target.threshold:
        lowest = target.threshold - 1  # a dismissal must not count as a positive
    return lowest, highest


def _describe_split(split: Split, protocol: Protocol) -> str:
    """Describe the split: users and interactions used, and users left out."""
    data = split.train.data
    used, sizes = len(np.unique(split.train.index)), [len(np.unique(part.users)) for part in split]
    left_out = len(data.users) - 1 - len(np.unique(np.concatenate([part.users for part in split])))
    name = type(protocol).__name__
    return (
        f"{name}: {sizes[0]:,} users train on {used:,} of {len(data.rating):,} interactions, {sizes[1]:,} validate, "
        f"{sizes[2]:,} test" + (f"; {left_out:,} users have too few interactions for {name}" if left_out else "")
    )


def _resolve_objective(objective: str | Ranking | None, protocol: Protocol | None) -> tuple[Protocol, Ranking | None]:
    """Resolve the protocol and the ranking objective; the latter is None for clicks and ratings."""
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
