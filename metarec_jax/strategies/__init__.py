"""Meta-learning strategies: functions with the names used in the literature, each of which returns a `Strategy`.

The functions are public as `metarec_jax.maml` and so on; a module here is named after its family. To add a strategy,
write its file and list it in `registry.py`: training, evaluation, the command line and the generic tests then cover it.
"""

from metarec_jax._moved import moved
from metarec_jax.strategies import registry
from metarec_jax.strategies.registry import DEFAULT_MODEL, RANKING, RATING, STRATEGIES
from metarec_jax.strategies.strategy import Strategy

__all__ = ["DEFAULT_MODEL", "RANKING", "RATING", "STRATEGIES", "Strategy"]

__getattr__ = moved(__name__, {name: f"metarec_jax.{name}" for name in registry.__all__})
