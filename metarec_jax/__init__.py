"""metarec_jax: recommenders that learn a new user from a few interactions, by meta-learning in JAX."""

from metarec_jax import core, data, evaluation, models, strategies
from metarec_jax.core import meta_step
from metarec_jax.data.protocols import Scenario, TimeSplit
from metarec_jax.data.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.data.splits import ColdUsers
from metarec_jax.errors import DataError, ModelFileError, StoreError
from metarec_jax.evaluation import metrics
from metarec_jax.models import Model
from metarec_jax.recommender import Recommendation, Recommender, UncertainRecommendation, load, train
from metarec_jax.robust import reweight
from metarec_jax.store import Event, RedisStore, SqliteStore, Store
from metarec_jax.strategies import *  # noqa: F403
from metarec_jax.tasks import Examples, History, Task

__version__ = "0.1.0"

__all__ = [
    "ColdUsers", "DataError", "Event", "Examples", "History", "Model", "ModelFileError", "NextItem", "Recommendation",
    "Recommender", "RedisStore", "Scenario", "SqliteStore", "Store", "StoreError", "StrongGeneralisation", "Task",
    "TimeSplit", "UncertainRecommendation", "core", "data", "evaluation", "load", "meta_step", "metrics", "models",
    "reweight", "strategies", "train",
]  # fmt: skip
__all__ += strategies.__all__
