"""Meta-learning strategies: each a function with the field's name that returns a `Strategy`.

To add one, write its file and list it in `STRATEGIES`: training, evaluation, the command line and the generic tests
then cover it.
"""

from collections.abc import Callable

from metarec_jax.strategies.ensemble import ensemble
from metarec_jax.strategies.gradient import anil, fomaml, maml, melu
from metarec_jax.strategies.history import with_history
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

DEFAULT_MODEL = {  # name in `metarec_jax.models.MODELS` where it is not "mlp"
    "ridge": "linear",
}

__all__ = [
    "DEFAULT_MODEL",
    "STRATEGIES",
    "Strategy",
    "anil",
    "ensemble",
    "fomaml",
    "maml",
    "melu",
    "reptile",
    "ridge",
    "with_history",
]
