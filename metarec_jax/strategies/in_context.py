"""In-context adaptation: the model reads the support set as its input, and nothing is fitted to it."""

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
    """In-context learner: a model that reads the support set and predicts without any gradient step.

        score(x) = f(x; support);   meta-loss = L_query + dense * L_support

    The adapted value of a user is the support set itself. If the model has `states` (`transformer(fields, tied=True)`),
    it is the last state instead: scores are products of the state with item vectors, and when ranking, every position
    of an ordered history is a training example (`Strategy.prefixes`), as in SASRec.

    L_support scores every support example from the others that the model may read (the earlier ones, for a causal
    model). It gives as many training examples as the user has interactions.

    Args:
      model: one with `history`, such as `transformer`, `hstu` and `gru`.
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
    as_constants = as_truth(loss)

    def init(key: jax.Array) -> Params:
        return {"model": model.init(key)}

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        return ()

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return model.apply(params["model"], features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = query_loss(predict(params, (), task.query.features), task.query, loss)
        if dense:
            value += dense * query_loss(predict(params, (), task.support.features), as_constants(task.support), loss)
        return value, {}

    strategy = with_history(Strategy(init, adapt, predict, meta_loss, contrast=False))
    if model.states is None or model.vectors is None:
        return strategy
    states, vectors = model.states, model.vectors

    def last_state(params: Params, support: Examples, key: jax.Array) -> Adapted:
        count = (support.mask > 0).sum(1)
        return jnp.take_along_axis(states(params["model"], support, None), count[:, None, None], 1)[:, 0]

    def product(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return jnp.einsum("uw,unw->un", adapted, vectors(params["model"], features))

    return strategy._replace(
        adapt=last_state,
        predict=product,
        labelled=True,  # the tokens already depend on the grades
        items=lambda params, features: vectors(params["model"], features),
        score=lambda params, adapted, side: adapted @ side.T,
        prefixes=lambda params, support, key: states(params["model"], support, key),
    )
