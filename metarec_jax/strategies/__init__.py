"""Meta-learning strategies: each a function with the field's name that returns a `Strategy`.

To add one, write its file and list it in `STRATEGIES`: training, evaluation, the command line and the generic tests
then cover it.
"""

from collections.abc import Callable

from metarec_jax.strategies.ensemble import ensemble
from metarec_jax.strategies.gradient import anil, fomaml, maml, melu
from metarec_jax.strategies.reptile import reptile
from metarec_jax.strategies.ridge import ridge
from metarec_jax.strategies.strategy import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "ridge": ridge,
    "maml": maml,
    "fomaml": fomaml,
    "reptile": reptile,
    "anil": anil,
    "melu": melu,
}

__all__ = ["STRATEGIES", "Strategy", "anil", "ensemble", "fomaml", "maml", "melu", "reptile", "ridge"]
