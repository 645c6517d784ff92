"""Functions that return a `Recommender`: by training, by loading a folder, or from another recommender."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec

from metarec_jax.data.dataset import Dataset
from metarec_jax.inference.predictor import Predictor
from metarec_jax.models import Model
from metarec_jax.recommender import Recommender
from metarec_jax.state import models
from metarec_jax.state.events import Store
from metarec_jax.strategies import Strategy
from metarec_jax.training import robust
from metarec_jax.training import train as training
from metarec_jax.training.trained import Trained

P = ParamSpec("P")


def load(
    path: str | Path,
    *,
    strategy: Callable[..., Strategy] | None = None,
    model: Callable[..., Model] | None = None,
    users: str | Path | Store | None = None,
    half_life: float | None = None,
) -> Recommender:
    """Load a recommender from a folder that `Recommender.save` wrote.

    Args:
      path: the folder.
      users, half_life: see `Recommender.with_users` (default: an empty store in memory).
      strategy, model: the functions that were passed to `train`; required if they were passed as functions, not by
        name. For a name with options that JSON cannot hold: its function with these options bound
        (`functools.partial`).

    Raises:
      ModelFileError: no model, a damaged one, one of another version, or one that needs `strategy` or `model`.
    """
    predictor, version = models.load(path, strategy, model)
    loaded = Recommender(predictor.trained, predictor, version=version)
    if users is None and half_life is None:
        return loaded
    return loaded.with_users(":memory:" if users is None else users, half_life)


def _ready(make: Callable[P, Trained]) -> Callable[P, Recommender]:
    """Wrap `make` to return a `Recommender`, with its signature and documentation."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Recommender:
        return Recommender(make(*args, **kwargs))

    made.__signature__ = signature(make).replace(return_annotation=Recommender)  # type: ignore[attr-defined]
    return made


train = _ready(training.train)


@wraps(robust.reweight)
def reweight(recommender: Recommender, data: Dataset | None = None, **options: Any) -> Recommender:
    trained = robust.reweight(recommender.trained, data, **options)
    return replace(recommender, trained=trained, predictor=Predictor(trained, recommender.stock))
