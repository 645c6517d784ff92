"""In-context adaptation: the support set is the model's input, and nothing is fitted to it."""

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.strategies.wrappers.history import with_history
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task


def in_context(model: Model, *, loss: PointwiseLoss = optax.losses.squared_error, dense: float = 0.0) -> Strategy:
    """A model that has learned to learn: it reads the support set and answers, without any gradient step.

        score(x) = f(x; support);   meta-loss = L_query + dense * L_support

    A user's adapted values are the support set itself, or, of a model with `states` (`transformer(fields, tied=True)`),
    the last state: scores are then its products with the items' vectors, and to rank, every place of an ordered history
    is a lesson (`Strategy.prefixes`), as in SASRec. In L_support every support example is scored from the others
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
      Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, section III.
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

    reading = with_history(Strategy(init, adapt, predict, meta_loss, contrast=False))
    if model.states is None or model.vectors is None:
        return reading
    states, vectors = model.states, model.vectors

    def last_state(params: Params, support: Examples, key: jax.Array) -> Adapted:
        count = (support.mask > 0).sum(1)
        return states(params["model"], support, None)[jnp.arange(len(count)), count]

    def product(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return jnp.einsum("uw,unw->un", adapted, vectors(params["model"], features))

    return reading._replace(
        adapt=last_state,
        predict=product,
        labelled=True,  # tokens are bent by the grades themselves
        items=lambda params, features: vectors(params["model"], features),
        score=lambda params, adapted, side: adapted @ side.T,
        prefixes=lambda params, support, key: states(params["model"], support, key),
    )
