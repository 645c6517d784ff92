"""Ensembles: strategies trained jointly, each on its own loss; their scores are averaged, weighted or gated."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import query_loss
from metarec_jax.models.model import Model
from metarec_jax.strategies.gradient import anil, melu
from metarec_jax.strategies.networks import matrix
from metarec_jax.strategies.ridge import ridge
from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.strategies.wrappers.members import copies, several
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, masked_mean, mean_loss

HIDDEN = 16  # width of the gate's one hidden layer


def ensemble(
    strategies: Strategy | Sequence[Strategy],
    members: int | None = None,
    *,
    weights: str = "uniform",
    loss: PointwiseLoss | None = None,
) -> Strategy:
    """Build an ensemble: members adapt separately, train on their own losses to stay diverse, and give one score.

        score(x) = sum_m g_m score_m(x),   g = (1/M, ..., 1/M), softmax(w) or softmax(gate(support set of user u))

    - "uniform": the mean (a deep ensemble).
    - "validation": one weight per member, fitted by `fit_weights` on users held out from training; equal before that.
    - "gate": weights per user (a mixture of experts). A small network reads the user's number of examples, the mean and
      variance of their targets, and each member's loss on them after adaptation. Meta-training fits it on the query
      examples; no gradient of the gate's loss reaches the members.

    Members may be ensembles, or `given` strategies, which are trained already. If every member has a `deviation`, the
    ensemble's is that of the mixture: its square is sum_m g_m (s_m^2 + score_m^2) - score^2.

    Args:
      strategies: one strategy, copied with different initial parameters and run as one program by `vmap`; or one
        strategy per member.
      members: number of copies of one strategy (default 4).
      weights: "uniform", "validation" or "gate".
      loss: elementwise loss of scores and targets; for the gate only.

    Raises:
      ValueError: no members, unknown `weights`, a gate without `loss`, or `members` together with a list of strategies.

    References:
      Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles, NeurIPS 2017,
      section 2.4.
      Breiman, Stacked regressions, Machine Learning 24, 1996.
      Jacobs et al., Adaptive Mixtures of Local Experts, Neural Computation 3, 1991.
    """
    if isinstance(strategies, Strategy):
        size = 4 if members is None else members
        group = copies(strategies, size)
    else:
        if members is not None:
            raise ValueError("`members` is the number of copies of one strategy; a list of them has its own length")
        size = len(strategies)
        group = several(strategies)
    if size < 1:
        raise ValueError(f"an ensemble needs at least one member, got {size}")
    if weights not in ("uniform", "validation", "gate"):
        raise ValueError(f'weights must be "uniform", "validation" or "gate", got {weights!r}')
    gated = weights == "gate"
    if gated and loss is None:
        raise ValueError("a gate is trained on the query examples: pass ensemble(..., weights='gate', loss=...)")

    def init(key: jax.Array) -> Params:
        of_members, of_gate = jax.random.split(key)
        weight_params = init_gate(of_gate, size) if gated else jnp.zeros(size) if weights == "validation" else {}
        return {"members": group.init(of_members), "weights": weight_params}

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        adapted = group.adapt(params["members"], support, key)
        if not gated:
            return {"members": adapted}
        scores = group.scores(params["members"], adapted, support.features)
        assert loss is not None
        return {"members": adapted, "gate": gate(params["weights"], scores, support, loss)}

    def shares(params: Params, adapted: Adapted) -> jax.Array:
        """Return the members' weights, `[users, members]` or `[1, members]`."""
        if gated:
            return adapted["gate"]
        return jax.nn.softmax(params["weights"] if weights == "validation" else jnp.zeros(size))[None]

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return averaged(shares(params, adapted), group.scores(params["members"], adapted["members"], features))

    def deviation(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        assert group.deviations is not None
        arguments, g = (params["members"], adapted["members"], features), shares(params, adapted)
        scores, deviations = group.scores(*arguments), group.deviations(*arguments)
        return jnp.sqrt(averaged(g, deviations**2 + (scores - averaged(g, scores)) ** 2))

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        of_members, of_gate = jax.random.split(key) if gated else (key, key)
        values, aux = group.loss(params["members"], task, of_members)
        # the gradient is that of the sum, not the mean, so that each member trains as it would alone
        total, value = values.sum(), jax.lax.stop_gradient(values.mean())
        if gated:
            assert loss is not None
            fixed = {**params, "members": jax.lax.stop_gradient(params["members"])}
            value = query_loss(
                predict(fixed, adapt(fixed, task.support, of_gate), task.query.features), task.query, loss
            )
        return value + total - jax.lax.stop_gradient(total), aux

    def sample(params: Params, adapted: Adapted, keys: jax.Array, strength: jax.Array) -> Adapted:
        assert group.sample is not None
        return {**adapted, "members": group.sample(params["members"], adapted["members"], keys, strength)}

    return Strategy(
        init,
        adapt,
        predict,
        meta_loss,
        deviation if group.deviations else None,
        group.labelled,
        sample=sample if group.sample else None,
    )


def averaged(shares: jax.Array, values: jax.Array) -> jax.Array:
    """Average `values` `[members, users, examples]` with weights `shares`, to `[users, examples]`."""
    return (shares.T[..., None] * values).sum(0)


def init_gate(key: jax.Array, members: int) -> Params:
    """Return the parameters of `gate`; the members' weights are equal at first."""
    inputs = 3 + members
    return {
        "layer": matrix(key, inputs, HIDDEN),
        "shift": jnp.zeros(HIDDEN),
        "out": jnp.zeros((HIDDEN, members)),
        "bias": jnp.zeros(members),
    }


def gate(params: Params, scores: jax.Array, support: Examples, loss: PointwiseLoss) -> jax.Array:
    """Return each user's weights of the members, `[users, members]`.

    Args:
      params: parameters of the gate.
      scores: `[members, users, examples]` the members' scores of the support examples after adaptation.
      support: the users' support sets.
      loss: elementwise loss of scores and targets.
    """
    losses = jax.vmap(jax.vmap(partial(mean_loss, loss)), (0, None))(scores, support).T
    weight, average = jnp.where(support.mask > 0, support.mask, 0.0), jax.vmap(masked_mean)
    count = weight.sum(1)
    mean = average(support.target, support.mask)
    variance = average((jnp.where(support.mask > 0, support.target, 0.0) - mean[:, None]) ** 2, support.mask)
    inputs = jnp.concatenate([jnp.stack([jnp.log1p(count), mean, variance], 1), losses], 1)
    return jax.nn.softmax(jnp.tanh(inputs @ params["layer"] + params["shift"]) @ params["out"] + params["bias"])


def fit_weights(
    strategy: Strategy, params: Params, tasks: Iterable[Task], *, loss: PointwiseLoss, steps: int = 300
) -> Params:
    """Fit the convex combination of members that minimises the query loss of `tasks`; return `params` with it.

        w = argmin_w mean_u L_query(sum_m softmax(w)_m score_m)

    The loss is convex in softmax(w) if `loss` is convex in the score. After training by `metarec_jax.train`:

        users = model.split().validation
        tasks = [batch.task for batch in batches(users, model.target, buckets=(128,))]  # of metarec_jax.tasks
        params = fit_weights(model.strategy, model.params, tasks, loss=loss)
        model = Recommender(dataclasses.replace(model.trained, params=params))

    Args:
      strategy: `ensemble(..., weights="validation")`.
      params: its trained parameters.
      tasks: task batches of users that the members were not trained on.
      loss: elementwise loss of scores and targets.
      steps: steps of Adam, each on all tasks.

    Raises:
      ValueError: `params` have no weights to fit.
    """
    if not hasattr(params.get("weights"), "shape"):
        raise ValueError('there are no weights to fit; make the strategy by ensemble(..., weights="validation")')
    size = len(params["weights"])
    one_member = jnp.where(jnp.eye(size, dtype=bool), 0.0, -jnp.inf)  # logits that select one member each

    @jax.jit
    def scored(task: Task) -> jax.Array:
        adapted = strategy.adapt(params, task.support, jax.random.key(0))

        def member(w: jax.Array) -> jax.Array:
            return strategy.predict({**params, "weights": w}, adapted, task.query.features)

        return jax.vmap(member, out_axes=-1)(one_member)

    parts = [(scored(task), task.query._replace(features=())) for task in tasks]

    def objective(w: jax.Array) -> jax.Array:
        losses = jnp.stack([query_loss(scores @ jax.nn.softmax(w), query, loss) for scores, query in parts])
        users = jnp.stack([jnp.any(query.mask > 0, axis=1).sum() for _, query in parts])
        return (losses * users).sum() / jnp.maximum(users.sum(), 1)

    optimizer = optax.adam(0.1)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = optimizer.update(jax.grad(objective)(w), state)
        return (w + updates, state), None

    start = jnp.zeros(size)
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), length=steps))()
    return {**params, "weights": w}


def given(strategy: Strategy, params: Params) -> Strategy:
    """Freeze `strategy` with trained `params`, as a member of an ensemble or, if it ranks, of a stack."""

    def bind(function: Any) -> Any:
        return function and (lambda _, *rest: function(params, *rest))

    return Strategy(
        init=lambda key: {},
        adapt=bind(strategy.adapt),
        predict=bind(strategy.predict),
        loss=bind(strategy.loss),
        deviation=bind(strategy.deviation),
        labelled=strategy.labelled,
        items=bind(strategy.items),
        score=bind(strategy.score),
        sample=bind(strategy.sample),
        ranks=strategy.ranks,
    )


def mixture(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    weights: str = "gate",
    count: float = 0.0,
) -> Strategy:
    """Build the `ensemble` of `ridge`, `anil` and `melu`, each with a copy of the model; weights per user by default.

    Args:
      model: needs `embed` and `groups`.
      loss: elementwise loss of scores and targets.
      weights: see `ensemble`.
      count: of `anil` and `melu`, see `maml`.
    """
    members = [ridge(model, loss=loss), *(make(model, loss=loss, count=count) for make in (anil, melu))]
    return ensemble(members, weights=weights, loss=loss)
