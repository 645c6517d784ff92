"""The outer loop: meta-loss over a batch of users, and the meta-step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core._spmd import varying
from metarec_jax.types import Examples, Params, PointwiseLoss, Task, masked_mean, mean_loss

Loss = Callable[[Params, Task, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def query_loss(scores: jax.Array, query: Examples, loss: PointwiseLoss) -> jax.Array:
    """Compute the mean over users of their mean query loss; users without query examples are left out.

    Args:
      scores: `[users, examples]`.
      query: `Examples` with arrays `[users, examples, ...]`.
      loss: elementwise loss of scores and targets.

    Example:
      The squared errors of the first user are 1 and 9, the second has no query:

      >>> query = mr.Examples(None, jnp.zeros((2, 2)), jnp.array([[1.0, 1.0], [0.0, 0.0]]))
      >>> scores = jnp.array([[1.0, 3.0], [7.0, 7.0]])
      >>> float(mr.core.query_loss(scores, query, lambda score, target: (score - target) ** 2))
      5.0
    """
    per_user = jax.vmap(partial(mean_loss, loss))(scores, query)
    return masked_mean(per_user, jnp.any(query.mask > 0, axis=-1))


def meta_step(loss: Loss, optimizer: optax.GradientTransformation, *, chunk: int | None = None) -> Callable[..., Any]:
    """Build a meta-training step as a pure function. Jit it and donate its first two arguments.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, the loss of a strategy. Its gradient is the meta-gradient.
      optimizer: any optax transformation.
      chunk: users differentiated at a time, to bound memory; see `chunked`.

    Returns:
      `step(params, state, task, key) -> (params, state, aux)`. The first `state` is `optimizer.init(params)`; `aux` is
      that of the loss, with the scalar "loss" added.

    Raises:
      ValueError: `chunk` is less than 1.

    Example:
      `loss` is that of a strategy; here the shared weight w is fitted to the query targets without adaptation. With
      w = 0 and the target 2, the gradient is -4:

      >>> import optax
      >>> loss = lambda w, task, key: (((w - task.query.target) ** 2).mean(), {})
      >>> step = jax.jit(mr.core.meta_step(loss, optax.sgd(0.1)))
      >>> examples = mr.Examples(jnp.ones((1, 1)), jnp.array([[2.0]]), jnp.ones((1, 1)))
      >>> w, state, aux = step(jnp.zeros(()), optax.sgd(0.1).init(0.0), mr.Task(examples, examples), jax.random.key(0))
      >>> float(aux["loss"]), round(float(w), 3)
      (4.0, 0.4)
    """

    if chunk is not None:
        loss = chunked(loss, chunk)

    def step(params: Params, state: Any, task: Task, key: jax.Array) -> tuple[Params, Any, dict[str, jax.Array]]:
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, task, key)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, {**aux, "loss": value}

    return step


def chunked(loss: Loss, chunk: int) -> Loss:
    """Evaluate a meta-loss in chunks of users: same value and gradient, bounded memory.

    The value and gradient of a chunk are computed together, so nothing is computed twice and no activation outlives
    its chunk. Small chunks also fit into a CPU's cache. Users without query examples are left out, as in `query_loss`.
    Differentiable once, in `params` only; `aux` has no gradient.

    Args:
      loss: `loss(params, task, key) -> (scalar, aux)`, a mean over the users with query examples.
      chunk: users per chunk; the last one is padded with users without examples.

    Returns:
      A loss of the same form that splits `key` over the chunks. In `aux`, scalar floats are averaged as the loss is,
      scalar integers and bools are summed, and arrays `[users, ...]` are concatenated.

    Raises:
      ValueError: `chunk` is less than 1.

    Example:
      The loss of four users, at most two at a time, with the targets 0 to 3:

      >>> loss = lambda w, task, key: (((w - task.query.target) ** 2).mean(), {})
      >>> examples = mr.Examples(jnp.ones((4, 1)), jnp.arange(4.0)[:, None], jnp.ones((4, 1)))
      >>> value, aux = mr.core.chunked(loss, 2)(jnp.zeros(()), mr.Task(examples, examples), jax.random.key(0))
      >>> float(value)  # (0 + 1 + 4 + 9) / 4
      3.5
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")

    def whole(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        users, task = task.query.mask.shape[0], jax.lax.stop_gradient(task)
        if users <= chunk:
            value, aux = loss(params, task, key)
            return value, jax.lax.stop_gradient(aux)
        parts = pieces(task, chunk)
        counts = jnp.any(parts.query.mask > 0, axis=-1).sum(-1)
        share = counts / jnp.maximum(counts.sum(), 1)
        inputs = (parts, None if key is None else jax.random.split(key, len(counts)), share)

        def total(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            def piece(value: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
                task, key, share = inputs
                part, aux = loss(params, task, key)
                return value + _weigh(share, part), aux

            value, aux = jax.lax.scan(piece, varying(jnp.zeros(()), share), inputs)
            return value, jax.tree.map(partial(_join, share, users), aux)

        def forward(params: Params) -> tuple[Any, Params]:
            def piece(sums: Any, inputs: Any) -> tuple[Any, Any]:
                task, key, share = inputs
                (part, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, task, key)
                return jax.tree.map(lambda sum, new: sum + _weigh(share, new), sums, (part, gradient)), aux

            zero = varying((jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), share)
            (value, gradient), aux = jax.lax.scan(piece, zero, inputs)
            return (value, jax.tree.map(partial(_join, share, users), aux)), gradient

        rule = jax.custom_vjp(total)
        rule.defvjp(forward, lambda gradient, bar: (jax.tree.map(lambda g: (bar[0] * g).astype(g.dtype), gradient),))
        return rule(params)

    return whole


def _weigh(share: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(share > 0, share * value, 0).astype(value.dtype)


def _join(share: jax.Array, users: int, value: jax.Array) -> jax.Array:
    """Combine the chunks' auxiliary outputs `[chunks, ...]`."""
    if value.ndim > 1:
        return joined(value, users)
    return jnp.where(share > 0, share * value, 0).sum() if jnp.issubdtype(value.dtype, jnp.inexact) else value.sum()


def pieces(batch: Any, chunk: int) -> Any:
    """Reshape arrays `[users, ...]` to `[chunks, chunk, ...]`; zeros (mask 0) are added to fill the chunks.

    Users of a chunk are a stride apart: if users are sharded over devices, so is each chunk.
    """
    users = jax.tree.leaves(batch)[0].shape[0]
    missing = -users % chunk

    def cut(a: jax.Array) -> jax.Array:
        full = a if not missing else jnp.concatenate([a, jnp.zeros((missing, *a.shape[1:]), a.dtype)])
        return full.reshape(chunk, -1, *a.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def joined(parts: Any, users: int) -> Any:
    """Invert `pieces`: reshape arrays `[chunks, chunk, ...]` to `[users, ...]`."""
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:])[:users], parts)
