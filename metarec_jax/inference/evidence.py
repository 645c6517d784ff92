"""Evidence: which items to ask a new user about, the ones whose answers personalise a strategy the most (MeLU)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core._loop import Explicit, Factored, settled
from metarec_jax.core.fastweights import Adapted
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.batching import features
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples, Params

BATCH = 512  # interactions adapted to at once


def evidence(
    strategy: Strategy, params: Params, histories: Histories, target: Target, *, users: int = 32, seed: int = 0
) -> np.ndarray:
    """How much an answer about each item tells, `[items]`; 0 for items that nobody has rated.

        value_i = n_i * mean_{u rated i} |w(u, i) - theta|

    n_i is the item's popularity, the number of its ratings, and w(u, i) are the adapted parameters of a user of whom
    only that one rating is known, a Frobenius norm over all of them. Lee et al. take the norm of one inner gradient,
    which this is, times the step size, for one inner step of one size; as it stands it also weighs parameters by what
    their learned step sizes make of them, and is defined for strategies without a gradient step.

    Args:
      strategy, params: trained; `adapt` must return numbers about the user and not just the history.
      histories: training users.
      target: ratings to targets.
      users: a mean is taken over at most so many users, drawn at random.
      seed: of the draw.

    Raises:
      ValueError: the strategy adapts nothing.

    References:
      Lee et al., MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation, KDD 2019, section 3.3.
    """
    data = histories.data
    drawn = np.random.default_rng(seed).permutation(histories.index)
    drawn = drawn[np.argsort(data.item[drawn], kind="stable")]
    popularity = np.bincount(data.item[drawn], minlength=len(data.items))
    place = np.arange(len(drawn)) - (np.cumsum(popularity) - popularity)[data.item[drawn]]  # of a rating in its item's
    drawn = drawn[place < users]
    item, norms = data.item[drawn], []
    for i in range(0, len(drawn), BATCH):
        index = np.resize(drawn[i : i + BATCH], BATCH)  # repeats fill the last batch: one shape, compiled once
        found = features(data, data.user[index], data.item[index][:, None])
        found["order"] = np.zeros((BATCH, 1), data.order.dtype)
        values: Any = target.grade(data.rating[index])[:, None]
        known: Any = np.ones_like(values)
        norms.append(np.asarray(change(strategy, params, Examples(found, values, known)))[: len(drawn) - i])
    total = np.bincount(item, np.concatenate(norms), minlength=len(data.items))
    return popularity * total / np.maximum(np.bincount(item, minlength=len(data.items)), 1)


@partial(jax.jit, static_argnums=0)
def change(strategy: Strategy, params: Params, support: Examples) -> jax.Array:
    """`[users]` Frobenius norm of what the support set changes in each user's adapted values.

    Raises:
      ValueError: the strategy adapts nothing.
    """
    key = jax.random.key(0)
    nothing = support._replace(mask=jnp.zeros_like(support.mask))
    pairs = [
        (new, old)
        for new, old in zip(
            *(_parts(strategy.adapt(params, examples, key)) for examples in (support, nothing)), strict=True
        )
        if not isinstance(new, Examples) and jnp.issubdtype(jnp.result_type(jax.tree.leaves(new)[-1]), jnp.inexact)
    ]
    if not any(leaf.size for new, _ in pairs for leaf in jax.tree.leaves(new)):
        raise ValueError(
            "this strategy adapts nothing (it may read the history as it is), so that no answer changes it; "
            "ask a strategy that adapts, for instance melu or ridge"
        )
    return jnp.sqrt(sum(_squares(new, old) for new, old in pairs))


def _parts(adapted: Any) -> list[Any]:
    """Arrays and the engine's forms of them; the support set, where a strategy keeps it, is one part."""
    adapted = jax.tree.map(
        lambda x: settled(x) if isinstance(x, Adapted) else x, adapted, is_leaf=lambda x: isinstance(x, Adapted)
    )
    return jax.tree.leaves(adapted, is_leaf=lambda x: isinstance(x, Examples | Explicit | Factored))


def _squares(new: Any, old: Any) -> jax.Array:
    """`[users]` squared Frobenius norm of the difference of two parts."""
    if isinstance(new, Factored):  # |X'D|^2 = <X X', D D'>; without a history the term is 0
        x, d = new.inputs, new.outputs
        gram = x[..., :, None] == x[..., None, :] if new.axes is None else jnp.einsum("...if,...jf->...ij", x, x)
        each = gram * jnp.einsum("...io,...jo->...ij", d, d)
    else:
        new, old = (x.value if isinstance(x, Explicit) else x for x in (new, old))
        each = jnp.square(new - old)
    return each.reshape(len(each), -1).sum(-1)
