"""In-context adaptation: the support set is the model's input, and nothing is fitted to it."""

import jax
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.history import with_history
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.tasks import Examples, Features, Params, PointwiseLoss, Task


def in_context(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, dense: float = 0.0) -> Strategy:
    """A model that has learned to learn: it reads the support set and answers, without any gradient step.

        score(x) = f(x; support);   meta-loss = L_query + dense * L_support

    A user's adapted values are the support set itself. In L_support every support example is scored from the others
    that the model lets it read (by a causal one, the earlier), which are as many lessons as the user has interactions.

    Args:
      model: one with `history`, as `transformer`, `hstu` and `gru`.
      loss: elementwise loss of scores and targets.
      dense: weight of the support loss.

    Raises:
      ValueError: the model reads no history, or `dense` is negative.

    References:
      Garnelo et al., Conditional Neural Processes, ICML 2018 (prediction as a function of the support set).
      Müller et al., Transformers Can Do Bayesian Inference, ICLR 2022, section 3 (the meta-loss).
    """
    if not model.history:
        raise ValueError(
            'in_context needs a model that reads the history: "transformer", "hstu" or "gru" of metarec_jax.models, '
            "or Model(..., history=True)"
        )
    if dense < 0:
        raise ValueError(f"dense must be 0 or more, got {dense}")
    truth = as_truth(loss)

    def init(key: jax.Array) -> Params:
        return {"model": model.init(key)}

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return ()

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return model.apply(params["model"], features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = query_loss(predict(params, (), task.query.features), task.query, loss)
        if dense:
            value += dense * query_loss(predict(params, (), task.support.features), truth(task.support), loss)
        return value, {}

    return with_history(Strategy(init, adapt, predict, meta_loss, contrast=False))
