"""Evidence: rank items by how much a new user's rating of them personalises a strategy (MeLU)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core._loop import Explicit, Factored, settled
from metarec_jax.core.fastweights import Adapted
from metarec_jax.data.schema import ORDER
from metarec_jax.errors import OptionError
from metarec_jax.strategies.strategy import Strategy
from metarec_jax.tasks.batching import features
from metarec_jax.tasks.splits import Histories
from metarec_jax.tasks.target import Target
from metarec_jax.types import Examples, Params

BATCH = 512  # interactions per adaptation batch


def evidence(
    strategy: Strategy, params: Params, histories: Histories, target: Target, *, users: int = 32, seed: int = 0
) -> np.ndarray:
    """Compute the evidence value of each item, `[items]`; 0 for items without ratings.

        value_i = n_i * mean_{u rated i} |w(u, i) - theta|

    n_i is the item's number of ratings. w(u, i) are the parameters adapted to that single rating of user u; the norm is
    the Frobenius norm over all of them. With one inner step of a single step size this is the step size times the
    gradient norm of Lee et al. In general it also reflects learned step sizes, and it is defined for strategies without
    gradient steps.

    Args:
      strategy, params: trained; `adapt` must return numbers that depend on the user, not only the history.
      histories: training users.
      target: maps ratings to targets.
      users: maximum number of users in each item's mean, drawn at random.
      seed: seed of the draw.

    Raises:
      OptionError: the strategy adapts nothing.

    References:
      Lee et al., MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation, KDD 2019, section 3.3.
    """
    data = histories.data
    drawn = np.random.default_rng(seed).permutation(histories.index)
    drawn = drawn[np.argsort(data.item[drawn], kind="stable")]
    popularity = np.bincount(data.item[drawn], minlength=len(data.items))
    rank_in_item = np.arange(len(drawn)) - (np.cumsum(popularity) - popularity)[data.item[drawn]]
    drawn = drawn[rank_in_item < users]
    item, norms = data.item[drawn], []
    for i in range(0, len(drawn), BATCH):
        index = np.resize(drawn[i : i + BATCH], BATCH)  # the last batch is padded by repeats, to compile once
        inputs = features(data, data.user[index], data.item[index][:, None])
        inputs[ORDER] = np.zeros((BATCH, 1), data.order.dtype)
        values: Any = target.grade(data.rating[index])[:, None]
        known: Any = np.ones_like(values)
        norms.append(np.asarray(change(strategy, params, Examples(inputs, values, known)))[: len(drawn) - i])
    total = np.bincount(item, np.concatenate(norms), minlength=len(data.items))
    return popularity * total / np.maximum(np.bincount(item, minlength=len(data.items)), 1)


@partial(jax.jit, static_argnums=0)
def change(strategy: Strategy, params: Params, support: Examples) -> jax.Array:
    """Compute the Frobenius norm `[users]` of the change in adapted values caused by the support set.

    Raises:
      OptionError: the strategy adapts nothing.
    """
    key = jax.random.key(0)
    empty = support._replace(mask=jnp.zeros_like(support.mask))
    pairs = [
        (new, old)
        for new, old in zip(
            *(_parts(strategy.adapt(params, examples, key)) for examples in (support, empty)), strict=True
        )
        if not isinstance(new, Examples) and jnp.issubdtype(jnp.result_type(jax.tree.leaves(new)[-1]), jnp.inexact)
    ]
    if not any(leaf.size for new, _ in pairs for leaf in jax.tree.leaves(new)):
        raise OptionError(
            "this strategy adapts nothing (it may read the history directly), so no item is informative; "
            "use a strategy that adapts, for instance melu or ridge"
        )
    return jnp.sqrt(sum(_squares(new, old) for new, old in pairs))


def _parts(adapted: Any) -> list[Any]:
    """Return the arrays and factored forms in adapted values; a stored support set counts as one part."""
    adapted = jax.tree.map(
        lambda x: settled(x) if isinstance(x, Adapted) else x, adapted, is_leaf=lambda x: isinstance(x, Adapted)
    )
    return jax.tree.leaves(adapted, is_leaf=lambda x: isinstance(x, Examples | Explicit | Factored))


def _squares(new: Any, old: Any) -> jax.Array:
    """Return the squared Frobenius norm `[users]` of the difference of two parts."""
    if isinstance(new, Factored):  # |X'D|^2 = <X X', D D'>; without a history the term is 0
        x, d = new.inputs, new.outputs
        gram = x[..., :, None] == x[..., None, :] if new.axes is None else jnp.einsum("...if,...jf->...ij", x, x)
        squares = gram * jnp.einsum("...io,...jo->...ij", d, d)
    else:
        new, old = (x.value if isinstance(x, Explicit) else x for x in (new, old))
        squares = jnp.square(new - old)
    return squares.reshape(len(squares), -1).sum(-1)
