"""Models: write a trained model and its stock to a folder, and read them."""

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metarec_jax.errors import ModelFileError
from metarec_jax.inference.predictor import Predictor
from metarec_jax.models import MODELS, Model
from metarec_jax.state import saving
from metarec_jax.strategies import RANKING, RATING, STRATEGIES, Strategy
from metarec_jax.strategies.wrappers.labels import shifts_of_labels
from metarec_jax.strategies.wrappers.ranked import TABLES
from metarec_jax.strategies.wrappers.reweight import reweighted
from metarec_jax.strategies.wrappers.stack import MEMBERS
from metarec_jax.tasks.protocols import PROTOCOLS
from metarec_jax.tasks.target import Target
from metarec_jax.training.build import build
from metarec_jax.training.trained import Trained

_reweighted = lru_cache(maxsize=64)(reweighted)  # one value per strategy, so that `jit` finds its programs again
RATER = "rater"  # subfolder of a ranking's rating model


def save(predictor: Predictor, path: str | Path) -> None:
    """Write a model as a folder of JSON and safetensors files.

    An existing model is replaced once the new one is complete.

    Raises:
      ModelFileError: `path` exists and is not a model.
    """
    trained, rater = predictor.trained, predictor.rater
    config = {
        "recipe": trained.recipe,
        "target": asdict(trained.target),
        "protocol": {"name": type(trained.protocol).__name__} | asdict(trained.protocol),
        "seed": trained.seed,
        "limits": trained.limits,
        "history": trained.history,
        "refitted": trained.refitted,
    }
    parts = {} if rater is None else {RATER: lambda folder: save(rater, folder)}
    saving.write(path, config, trained.catalogue, trained.params, predictor.stock, parts)


def load(
    path: str | Path,
    strategy: Callable[..., Strategy] | None = None,
    model: Callable[..., Model] | None = None,
) -> tuple[Predictor, str]:
    """Load a folder that `save` wrote; return the predictor and the model's version.

    Args:
      path: the folder.
      strategy, model: see `metarec_jax.load`.

    Raises:
      ModelFileError: no model, a damaged one, one of another version, or one that needs `strategy` or `model`.
    """
    config, catalogue, stock, arrays = saving.read(path)
    levels = config["target"].get("levels")
    recipe, target = config["recipe"], Target(**config["target"] | {"levels": levels and tuple(levels)})
    built = build(**_choices(recipe, strategy, model, arrays, path), data=catalogue, target=target)
    built = _reweighted(built) if recipe.get("reweighted") else built
    if target.levels is not None:
        arrays |= shifts_of_labels(arrays, target.encode(np.array(target.levels)))
    params = saving.restore_params(arrays, jax.eval_shape(built.init, jax.random.key(0)), path)
    if any(name.startswith(f"params[{TABLES!r}]") for name in arrays):
        params = {**params, TABLES: saving.restore_tree(arrays, f"params[{TABLES!r}]", path)}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["protocol"].items()}
    protocol = PROTOCOLS[settings.pop("name", "ColdUsers")](**settings)
    rater_checksum, rater = config.get("parts", {}).get(RATER), None
    if rater_checksum is not None:
        rater, version = load(Path(path) / RATER)
        if not rater_checksum.startswith(version):
            raise ModelFileError(f"{path}: it was replaced while it was read; load it again")
    limits = tuple(config["limits"])
    trained_rater = None if rater is None else rater.trained
    trained = Trained(
        built, params, catalogue, target, protocol, config["seed"], recipe, limits, config["history"], trained_rater,
        refitted=config.get("refitted", False),
    )  # fmt: skip
    return Predictor(trained, stock, rater), config["version"]


def _choices(recipe: dict[str, Any], strategy: Any, model: Any, arrays: Any, path: str | Path) -> dict[str, Any]:
    """Return strategy and model with their options, as `build` takes them."""
    chosen: dict[str, Any] = {}
    known: list[Any] = [("strategy", strategy, STRATEGIES | RANKING | RATING), ("model", model, MODELS)]
    for what, function, names in known:
        name = recipe[what]["name"]
        if function is None and name not in names:
            raise ModelFileError(
                f"{path}: its {what} is {name or 'a function of the caller, or had options that JSON cannot hold'}; "
                f"load it with load(path, {what}=...)"
            )
        options = recipe[what]["options"] if function is None else None
        if function is None and name == "stack" and "members" not in (options or {}):  # models saved by older versions
            weights = [key for key in arrays if key.startswith("params['weights']")]
            options = {**(options or {}), "members": list(MEMBERS)[: len(weights)]}
        if function is None and name == "stack":
            options = {"novelty": 0.0, **(options or {})}  # older versions had none
        chosen |= {what: function or name, f"{what}_options": options}
    return chosen
