"""Meta-Embedding and GME: generate a new task's ID embedding from its attributes and adapt it to its interactions.

In the papers a task is a new item (`metarec_jax.data.by_item` makes such tasks); a task can equally be a user.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.models.model import Model
from metarec_jax.models.profile import constant, profile_of
from metarec_jax.strategies.decoder import adapt_context, decoder
from metarec_jax.strategies.gradient import default_inner
from metarec_jax.strategies.likelihood import as_truth
from metarec_jax.strategies.networks import matrix
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.types import Examples, Features, Params, PointwiseLoss, Task, current, masked_mean, mean_loss


class Generator(NamedTuple):
    """Makes a task's initial ID embedding: `init(key) -> params`, `apply(params, support) -> [users, size]`."""

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, Examples], jax.Array]


def metaemb(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    inner: optax.GradientTransformation | None = None,
    steps: int = 1,
    alpha: float = 0.1,
    size: int = 32,
    count: float = 0.0,
) -> Strategy:
    """Meta-Embedding: an ID embedding generated from a task's attributes z, trained to be good and to adapt fast.

        e_0 = tanh(W z),   e_1 = e_0 - a dL_support(e_0) / de,   loss = alpha L_support(e_0) + (1 - alpha) L_query(e_1)

    The embedding is read through `decoder`.

    Args:
      model: needs `embed` and `width`; its `profile` gives z (without one, all tasks start from the same embedding).
      loss: elementwise loss of scores and targets, inner and outer.
      inner: inner optimiser (default `default_inner(loss)`); a learned factor multiplies its updates.
      steps: gradient steps on the support.
      alpha: weight of the cold loss.
      size: width of the embedding.
      count: see `maml`.

    Raises:
      ValueError: the model lacks `embed` or `width`, or a number is out of range.

    Differs from the paper:
      - The model is trained together with the generator; the paper freezes a trained model.
      - The step size a is learned.
      - z has its own embeddings of the attributes.
      - There is no `faithful` form: the paper generates embeddings for a model that is already trained with IDs.

    References:
      Pan et al., Warm Up Cold-start Advertisements: Improving CTR Predictions via Learning to Learn ID Embeddings,
      SIGIR 2019.
    """
    encoder = model.profile or constant()

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return {"profile": encoder.init(a), "out": matrix(b, encoder.width, size)}

    def start(params: Params, support: Examples) -> jax.Array:
        return jnp.tanh(profile_of(encoder, params["profile"], support) @ params["out"])

    return from_generator(model, Generator(init, start), loss, inner, steps, alpha, size, count)


def gme(
    model: Model,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    existing: Mapping[str, jax.Array] | None = None,
    neighbours: int = 10,
    inner: optax.GradientTransformation | None = None,
    steps: int = 1,
    alpha: float = 0.1,
    size: int = 32,
    count: float = 0.0,
) -> Strategy:
    """Graph Meta Embedding from neighbour attributes (GME-A): `metaemb` on attributes refined by graph attention.

        c_i = leaky_relu(a . [V z, V z_i]),   e_0 = tanh(W elu(sum_i softmax(c)_i V z_i))

    i runs over the task itself and its neighbours: the `neighbours` existing tasks that share the most attributes
    (values of categorical and multi-valued fields). Without `existing` there is no graph.

    Args:
      model, loss, inner, steps, alpha, size, count: see `metaemb`.
      existing: attributes of the training tasks in the format of a batch, `{"user/genres": [tasks, ...], ...}`.
      neighbours: number of neighbours that a task attends to.

    Raises:
      ValueError: as `metaemb`; or `existing` without a profile in the model, or without an integer field.

    Differs from the paper:
      - Without `existing`, a task attends to `neighbours` learned prototypes of attributes instead of neighbours.
      - All differences of `metaemb`.

    References:
      Ouyang et al., Learning Graph Meta Embeddings for Cold-Start Ads in Click-Through Rate Prediction, SIGIR 2021,
      GME-A.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be 1 or more, got {neighbours}")
    if existing is not None and model.profile is None:
        raise ValueError("`existing` holds attributes, but the model has no `profile` to read them; give it one")
    codes = {} if existing is None else {n: x for n, x in existing.items() if jnp.issubdtype(x.dtype, jnp.integer)}
    if existing is not None and not codes:
        raise ValueError("`existing` needs an integer field: tasks are neighbours if they share a value of one")
    encoder = model.profile or constant()

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, 5)
        params = {
            "profile": encoder.init(keys[0]),
            "value": matrix(keys[1], encoder.width, size),
            "attention": matrix(keys[2], size, 2),
            "out": matrix(keys[3], size, size),
        }
        if existing is None:
            params["prototypes"] = 0.1 * jax.random.normal(keys[4], (neighbours, encoder.width))
        return params

    def near(params: Params, support: Examples) -> tuple[jax.Array, jax.Array]:
        """Return the attributes `[users, neighbours, width]` of neighbours, and a mask of those that exist."""
        if existing is None:
            shape = (support.mask.shape[0], *params["prototypes"].shape)
            return jnp.broadcast_to(params["prototypes"], shape), jnp.ones(shape[:2], bool)
        shared = shared_values(codes, support)
        count, index = jax.lax.top_k(shared, min(neighbours, shared.shape[1]))
        return encoder.apply(params["profile"], existing)[index], count > 0

    def start(params: Params, support: Examples) -> jax.Array:
        attributes = profile_of(encoder, params["profile"], support)[:, None]
        others, linked = near(params, support)
        value = jnp.concatenate([attributes, others], 1) @ params["value"]
        target, source = value[:, :1] @ params["attention"][:, 0], value @ params["attention"][:, 1]
        present = jnp.concatenate([jnp.ones_like(linked[:, :1]), linked], 1)  # the task itself is always there
        weight = jax.nn.softmax(jax.nn.leaky_relu(target + source, 0.2), where=present)
        return jnp.tanh(jax.nn.elu(jnp.einsum("un,unf->uf", weight, value)) @ params["out"])

    return from_generator(model, Generator(init, start), loss, inner, steps, alpha, size, count)


def from_generator(
    model: Model,
    generator: Generator,
    loss: PointwiseLoss,
    inner: optax.GradientTransformation | None,
    steps: int,
    alpha: float,
    size: int,
    count: float,
) -> Strategy:
    """Build `metaemb` with any generator of the initial embedding; `adapt` returns the warm embedding."""
    check(steps, size, alpha)
    score = decoder(model, size)
    inner, as_constants = default_inner(loss) if inner is None else inner, as_truth(loss)

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return {"decoder": score.init(a), "generator": generator.init(b), "log_step_size": jnp.zeros(())}

    def solve(params: Params, support: Examples) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the embeddings before and after the steps, and which users failed."""
        start = generator.apply(params["generator"], support)
        options = {"loss": loss, "optimizer": inner, "steps": steps, "count": count}
        options |= {"step_size": jnp.exp(params["log_step_size"])}
        return start, *adapt_context(score, params["decoder"], start, support, **options)

    def adapt(params: Params, support: Examples, key: jax.Array) -> jax.Array:
        return solve(params, support)[1]

    def predict(params: Params, embedding: jax.Array, features: Features) -> jax.Array:
        return score.apply(params["decoder"], embedding, features)

    def meta_loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        per_user = jax.vmap(partial(mean_loss, loss))
        start, embedding, failed = solve(params, task.support)
        cold = per_user(predict(params, start, task.support.features), as_constants(task.support))
        warm = per_user(predict(params, embedding, task.query.features), task.query)
        value = masked_mean(alpha * cold + (1 - alpha) * warm, jnp.any(task.query.mask > 0, axis=1))
        return value, {"failed": failed.sum(), "cold": masked_mean(cold, jnp.any(task.support.mask > 0, axis=1))}

    return Strategy(init, adapt, predict, meta_loss)


def shared_values(existing: Mapping[str, jax.Array], support: Examples) -> jax.Array:
    """Count the values of these integer fields that a user and an existing task share, `[users, tasks]`."""
    features = current(support.features)
    first = jnp.argmax(support.mask > 0, axis=1)  # a user's fields are in every real example; without one, in the first
    total = jnp.zeros((), jnp.int32)
    for name, codes in existing.items():
        user_codes = jax.vmap(jnp.take, (0, 0, None))(features[name], first, 0).reshape(len(first), 1, -1, 1)
        task_codes = jnp.asarray(codes).reshape(1, len(codes), 1, -1)
        total += ((user_codes == task_codes) & (task_codes > 0)).sum((2, 3))
    return total


def check(steps: int, size: int, alpha: float) -> None:
    """Validate the inner loop's numbers.

    Raises:
      ValueError: `steps` below 0, `size` below 1, or `alpha` outside [0, 1].
    """
    if steps < 0 or size < 1 or not 0 <= alpha <= 1:
        raise ValueError(f"need steps >= 0, size >= 1 and 0 <= alpha <= 1, got {steps=}, {size=}, {alpha=}")
