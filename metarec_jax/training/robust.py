"""Robust: learn how far a trained recommender should trust each rating of a user."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from metarec_jax._progress import epochs_bar
from metarec_jax.data.dataset import Dataset
from metarec_jax.strategies.wrappers.ensemble import given
from metarec_jax.strategies.wrappers.reweight import reweighted
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.training.loop import fit
from metarec_jax.training.trained import Trained


def reweight(
    recommender: Trained,
    data: Dataset | None = None,
    *,
    noise: float = 0.2,
    epochs: int = 60,
    learning_rate: float = 2e-2,
    progress: bool = True,
    **fit_options: Any,
) -> Trained:
    """Learn weights for the ratings that a recommender adapts to, from noisy support sets.

    Only the small network of `metarec_jax.strategies.reweighted` is trained; the recommender's parameters are fixed.
    The gradient of the loss on clean queries passes through the adaptation to noisy support sets.

    Args:
      recommender: the trained model.
      data: the training dataset; required for a loaded model only.
      noise: share of support ratings replaced by random ones in training, in [0, 1).
      epochs: passes over the training users.
      learning_rate: learning rate of Adam.
      progress: show a progress bar.
      **fit_options: keyword arguments of `metarec_jax.training.fit`.

    Raises:
      DataError: a loaded recommender without `data`, or data that do not match the training.
      ValueError: `noise` out of range; a ranking; a recommender that is reweighted already; or a strategy whose
        gradient does not reach the weights (fomaml, reptile, fine-tuning, networks that read the history).

    References:
      Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018.
      Shu et al., Meta-Weight-Net, NeurIPS 2019.
    """
    if not 0 <= noise < 1:
        raise ValueError(f"noise is a share, at least 0 and below 1; got {noise}")
    if recommender.recipe.get("reweighted"):
        raise ValueError("this recommender weighs its ratings already; reweight the original one")
    if recommender.target.kind == "ranking":
        raise ValueError('reweight does not support rankings; train with objective="click" or "rating"')
    split, target = recommender.split(data, "reweight(recommender, data)"), recommender.target
    robust = reweighted(given(recommender.strategy, recommender.params))
    initial = robust.init(jax.random.key(recommender.seed))
    with epochs_bar(progress, epochs, target.kind) as report:
        fitted = fit(
            robust,
            split,
            target,
            query=recommender.protocol.query,
            optimizer=optax.adam(learning_rate),
            epochs=epochs,
            min_epochs=epochs - 1,  # too few parameters to overfit: no early stopping
            noise=noise,
            statistics=ItemStatistics.fit(split.train, target),
            seed=recommender.seed,
            params=initial,
            report=report,
            **fit_options,
        )
    pairs = zip(jax.tree.leaves(initial), jax.tree.leaves(fitted.params), strict=True)
    if learning_rate and all(np.allclose(*pair, rtol=1e-4, atol=1e-7) for pair in pairs):
        raise ValueError(
            "the rating weights were not learned: in this strategy no gradient passes from a query to the weights "
            "of the support set; use alpaca, ridge or maml"
        )
    return replace(
        recommender,
        strategy=reweighted(recommender.strategy),
        params={**fitted.params, "strategy": recommender.params},
        recipe=recommender.recipe | {"reweighted": {"noise": noise, "epochs": epochs}},
        history=[*recommender.history, *fitted.history],
        plan=None,
    )
