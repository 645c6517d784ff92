"""Build: a strategy on its model, from names or functions."""

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

LOSSES = {  # of a user's own examples
    "click": optax.losses.sigmoid_binary_cross_entropy,
    "ranking": optax.losses.sigmoid_binary_cross_entropy,
    "rating": optax.losses.squared_error,
}
Options = Mapping[str, Any] | None
Labels = tuple[tuple[float, ...], tuple[float, ...]] | None  # knots of `with_labels` and the values there


def build(
    strategy: str | Callable[..., Strategy],
    strategy_options: Options,
    model: str | Callable[..., Model],
    model_options: Options,
    data: Dataset,
    target: Target,
) -> Strategy:
    """The strategy on its model, with labels where the target has levels and histories where the model reads them.

    What is chosen by name depends on the shapes of the fields alone: the same choices and shapes give the same value
    again, so that what `jit` has compiled for it serves the next training (another seed, another split) and a loaded
    model too.

    Args:
      strategy, model: names in `STRATEGIES` and `MODELS`, or functions as `metarec_jax.train` takes them.
      strategy_options, model_options: keyword arguments of the two.
      data: whose fields the model reads.
      target: what is predicted.

    Raises:
      ValueError: an unknown name.
    """
    known = STRATEGIES | RANKING | RATING
    make_strategy, make_model = _named(known, strategy, "strategy"), _named(MODELS, model, "model")
    fields, labels = fields_of(data), None
    if target.levels is not None:
        levels = np.array(target.levels)
        grades = np.round(target.grade(levels).astype(float), 6)  # another split may differ by rounding
        labels = tuple(grades.tolist()), tuple(target.encode(levels).tolist())
    try:
        options = json.dumps([dict(strategy_options or {}), dict(model_options or {})], sort_keys=True)
    except TypeError:  # an option that only the caller can compare
        options = None
    if options and isinstance(strategy, str) and isinstance(model, str):
        shapes = tuple((key, f.name, f.kind, f.size, f.width) for key, f in fields.items())
        return _once(make_strategy, make_model, options, shapes, target.kind, labels)
    makers = partial(make_strategy, **dict(strategy_options or {})), partial(make_model, **dict(model_options or {}))
    return _built(*makers, fields, target.kind, labels)


def default_model(strategy: str | Callable[..., Strategy]) -> str:
    """The name of the network that a strategy has unless another is chosen: that of its name, or of the function in
    `STRATEGIES` that it is or binds arguments of by `functools.partial`."""
    while isinstance(strategy, partial):
        strategy = strategy.func
    names = (
        [strategy]
        if isinstance(strategy, str)
        else [n for n, make in (STRATEGIES | RANKING | RATING).items() if make is strategy]
    )
    return next((DEFAULT_MODEL[n] for n in names if n in DEFAULT_MODEL), "mlp")


def recipe_of(strategy: Any, strategy_options: Options, model: Any, model_options: Options) -> dict[str, Any]:
    """How strategy and model were chosen, as JSON; a choice that has no name or no JSON form is None."""
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
    """`_built` from values that can be compared."""
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
    if kind == "ranking":  # a history holds what a user did, and no negatives
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
