"""Build: construct a strategy on its model, from names or functions."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import optax

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import fields_of
from metarec_jax.models import MODELS, Model
from metarec_jax.strategies import DEFAULT_MODEL, RANKING, RATING, STRATEGIES, Strategy
from metarec_jax.strategies.wrappers.history import with_history
from metarec_jax.strategies.wrappers.labels import with_labels
from metarec_jax.strategies.wrappers.ranked import ranked
from metarec_jax.tasks.target import Target

LOSSES = {  # per example
    "click": optax.losses.sigmoid_binary_cross_entropy,
    "ranking": optax.losses.sigmoid_binary_cross_entropy,
    "rating": optax.losses.squared_error,
}
Options = Mapping[str, Any] | None
Labels = tuple[tuple[float, ...], tuple[float, ...]] | None  # grades and their encoded targets, for `with_labels`


def build(
    strategy: str | Callable[..., Strategy],
    strategy_options: Options,
    model: str | Callable[..., Model],
    model_options: Options,
    data: Dataset,
    target: Target,
) -> Strategy:
    """Build a strategy on its model, with label encoding and history input where they apply.

    Choices by name are cached by their options and the shapes of the fields. Another training (another seed or split)
    or a loaded model therefore reuses what `jit` has compiled.

    Args:
      strategy, model: names in `STRATEGIES` and `MODELS`, or functions as in `metarec_jax.train`.
      strategy_options, model_options: keyword arguments of the strategy and of the model.
      data: dataset whose fields the model reads.
      target: what is predicted.

    Raises:
      ValueError: an unknown name.
    """
    known = STRATEGIES | RANKING | RATING
    make_strategy, make_model = _named(known, strategy, "strategy"), _named(MODELS, model, "model")
    fields, labels = fields_of(data), None
    if target.levels is not None:
        levels = np.array(target.levels)
        grades = np.round(target.grade(levels).astype(float), 6)  # rounding may differ between splits
        labels = tuple(grades.tolist()), tuple(target.encode(levels).tolist())
    try:
        options = json.dumps([dict(strategy_options or {}), dict(model_options or {})], sort_keys=True)
    except TypeError:  # not JSON, so that it cannot be a cache key
        options = None
    if options and isinstance(strategy, str) and isinstance(model, str):
        shapes = tuple((key, f.name, f.kind, f.size, f.width) for key, f in fields.items())
        return _once(make_strategy, make_model, options, shapes, target.kind, labels)
    makers = partial(make_strategy, **dict(strategy_options or {})), partial(make_model, **dict(model_options or {}))
    return _built(*makers, fields, target.kind, labels)


def default_model(strategy: str | Callable[..., Strategy]) -> str:
    """Return the name of a strategy's default network, "mlp" if it has no other.

    A function is looked up by its name in `STRATEGIES`, `RANKING` or `RATING`; `functools.partial` is unwrapped.
    """
    while isinstance(strategy, partial):
        strategy = strategy.func
    names = (
        [strategy]
        if isinstance(strategy, str)
        else [n for n, make in (STRATEGIES | RANKING | RATING).items() if make is strategy]
    )
    return next((DEFAULT_MODEL[n] for n in names if n in DEFAULT_MODEL), "mlp")


def recipe_of(strategy: Any, strategy_options: Options, model: Any, model_options: Options) -> dict[str, Any]:
    """Return the choice of strategy and model as JSON; None for a choice without a name or a JSON form."""
    return {"strategy": _part(strategy, strategy_options), "model": _part(model, model_options)}


def _part(choice: Any, options: Options) -> dict[str, Any]:
    options = dict(options or {})
    try:
        json.dumps(options)
    except TypeError:
        return {"name": None, "options": None}
    named = isinstance(choice, str)
    return {"name": choice if named else None, "options": options if named else None}


@lru_cache(maxsize=64)
def _once(
    strategy: Callable[..., Strategy],
    model: Callable[..., Model],
    options: str,
    shapes: tuple[tuple[str, str, str, int, int], ...],
    kind: str,
    labels: Labels,
) -> Strategy:
    """Call `_built` with hashable arguments, cached."""
    of_strategy, of_model = json.loads(options)
    fields = {key: Field(name, of_field, size, width) for key, name, of_field, size, width in shapes}
    return _built(partial(strategy, **of_strategy), partial(model, **of_model), fields, kind, labels)


def _built(
    strategy: Callable[..., Strategy],
    model: Callable[..., Model],
    fields: Mapping[str, Field],
    kind: str,
    labels: Labels,
) -> Strategy:
    network = model(fields)
    built = strategy(network, loss=LOSSES[kind])
    built = with_history(built) if network.history else built
    if kind == "ranking":  # a history holds interactions only, no negatives
        built = ranked(built._replace(contrast=built.contrast and not network.history))
    elif built.ranks:
        raise ValueError(f'a strategy that ranks cannot predict a {kind}: objective="ranking"')
    return built if labels is None or built.labelled else with_labels(built, *labels)


def _named(known: Mapping[str, Callable[..., Any]], choice: Any, what: str) -> Callable[..., Any]:
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(f"{what} {choice!r} is unknown; choose from {', '.join(known)}, or pass a function")
    return known[choice]
