"""metarec_jax: recommenders that learn a new user from a few interactions, by meta-learning in JAX."""

from metarec_jax import core, data, evaluation, models, strategies
from metarec_jax.core import meta_step
from metarec_jax.data.splits import ColdUsers
from metarec_jax.errors import DataError, ModelFileError
from metarec_jax.evaluation import metrics
from metarec_jax.models import Model
from metarec_jax.recommender import Recommendation, Recommender, load, train
from metarec_jax.strategies import STRATEGIES, Strategy, anil, ensemble, fomaml, maml, melu, reptile, ridge
from metarec_jax.tasks import Examples, Task

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES", "ColdUsers", "DataError", "Examples", "Model", "ModelFileError", "Recommendation", "Recommender",
    "Strategy", "Task", "anil", "core", "data", "ensemble", "evaluation", "fomaml", "load", "maml", "melu", "meta_step",
    "metrics", "models", "reptile", "ridge", "strategies", "train",
]  # fmt: skip
