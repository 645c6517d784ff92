"""Trained: the immutable result of a training."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import fields_of
from metarec_jax.errors import DataError
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.protocols import Protocol
from metarec_jax.tasks.splits import Split
from metarec_jax.tasks.target import Target
from metarec_jax.types import Params


@dataclass(frozen=True, eq=False)
class Trained:
    """A strategy with its meta-trained parameters and its training catalogue.

    Attributes:
      strategy: the strategy's pure functions.
      params: meta-trained parameters.
      catalogue: the dataset; without interactions if the model was loaded.
      target: maps ratings to targets.
      protocol: how users were split.
      seed: seed of the split.
      recipe: names and options of strategy and model, as saved.
      limits: lowest and highest rating of the training users.
      history: training log, one dict per epoch.
      rater: for a ranking, the model of expected ratings, trained and tested on the same users.
      epoch: the epoch whose parameters were kept; -1 if all are fitted in closed form.
      refitted: whether the validation and test users trained too.
      plan: the arguments of the training, for `refit`; None unless this process trained the model.
    """

    strategy: Strategy
    params: Params
    catalogue: Dataset
    target: Target
    protocol: Protocol
    seed: int
    recipe: dict[str, Any]
    limits: tuple[float, float]
    history: list[dict[str, float]] = field(default_factory=list)
    rater: "Trained | None" = None
    epoch: int = -1
    refitted: bool = False
    plan: Any = field(default=None, repr=False)

    @property
    def name(self) -> str | None:
        """Name of the strategy; None for a function of the caller."""
        return self.recipe["strategy"]["name"]

    def split(self, data: Dataset | None = None, call: str = "split(data)") -> Split:
        """Return the training, validation and test split of the training.

        Args:
          data: the training dataset; required for a loaded model only.
          call: the caller's signature with `data`, for the error message.

        Raises:
          DataError: a loaded model without `data`, or data with other items or fields.
        """
        if data is None and not len(self.catalogue.rating):
            raise DataError(f"a loaded model holds no interactions: {call} with the dataset it was trained on")
        return self.protocol.split(self.catalogue if data is None else self._as_trained(data), self.seed)

    def _as_trained(self, data: Dataset) -> Dataset:
        """Return `data` with the item features of the training; validate its items and fields."""
        known_fields, new_fields = (
            {n: (f.kind, f.size, f.vocabulary and f.vocabulary.ids.tolist()) for n, f in fields_of(d).items()}
            for d in (self.catalogue, data)
        )
        contexts = [{f.name for f in d.context_fields} for d in (self.catalogue, data)]
        same_fields = contexts[0] == contexts[1] and all(
            known_fields.get(name) == field for name, field in new_fields.items()
        )
        if not np.array_equal(self.catalogue.items.ids, data.items.ids) or not same_fields:
            raise DataError(
                f"{data.name} does not have the items and fields of the training data ({self.catalogue.name}); "
                "evaluate it on the same dataset, or train a new model"
            )
        return replace(data, item_fields=self.catalogue.item_fields, item_features=self.catalogue.item_features)
