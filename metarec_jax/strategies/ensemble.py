"""Deep ensemble: several members of one strategy, trained jointly from different initial parameters, averaged."""

import jax
import jax.numpy as jnp

from metarec_jax.strategies.strategy import Adapted, Strategy
from metarec_jax.tasks import Examples, Features, Params, Task


def ensemble(strategy: Strategy, members: int = 4) -> Strategy:
    """`members` independently initialised copies of a strategy, run as one program by `vmap`.

    Every member adapts to the user by itself; the ensemble's score is the mean of the members' scores. Each member is
    trained on its own loss, so that members stay diverse (Lakshminarayanan et al., NeurIPS 2017, section 2.4).

    Args:
      strategy: what each member does.
      members: how many; parameters and adapted values get a leading axis `[members]` and `[users, members]`.
    """
    if members < 1:
        raise ValueError(f"an ensemble needs at least one member, got {members}")

    def init(key: jax.Array) -> Params:
        return jax.vmap(strategy.init)(jax.random.split(key, members))

    def adapt(params: Params, support: Examples, key: jax.Array) -> Adapted:
        keys = jax.random.split(key, members)
        return jax.vmap(strategy.adapt, (0, None, 0), out_axes=1)(params, support, keys)

    def predict(params: Params, adapted: Adapted, features: Features) -> jax.Array:
        return jax.vmap(strategy.predict, (0, 1, None))(params, adapted, features).mean(0)

    def loss(params: Params, task: Task, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        # the sum, not the mean: each member then gets the gradient that it would get alone
        values, aux = jax.vmap(strategy.loss, (0, None, 0))(params, task, jax.random.split(key, members))
        total = values.sum()
        return total + jax.lax.stop_gradient(values.mean() - total), jax.tree.map(pooled, aux)

    def pooled(aux: jax.Array) -> jax.Array:
        """Counts are summed over members, other values averaged."""
        return aux.mean(0) if jnp.issubdtype(aux.dtype, jnp.inexact) else aux.sum(0)

    return Strategy(init, adapt, predict, loss)
