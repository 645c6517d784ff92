"""metarec_jax: recommenders that learn a new user from a few interactions, by meta-learning in JAX."""

from metarec_jax import core, data, distributed, evaluation, metrics, models, strategies, tasks
from metarec_jax.api import load, reweight, train
from metarec_jax.core import meta_step
from metarec_jax.errors import (
    DataError,
    IgnoredContextWarning,
    ModelFileError,
    OptionError,
    StoreError,
    UnknownItemWarning,
)
from metarec_jax.inference.recommendations import Recommendation, UncertainRecommendation
from metarec_jax.models import Model
from metarec_jax.recommender import Recommender
from metarec_jax.state.events import Event, Store
from metarec_jax.state.redis_store import RedisStore
from metarec_jax.state.sqlite_store import SqliteStore
from metarec_jax.strategies.registry import *  # noqa: F403
from metarec_jax.tasks.protocols import Scenario, TimeSplit
from metarec_jax.tasks.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.tasks.splits import ColdUsers
from metarec_jax.types import Examples, History, Task

__version__ = "0.1.0"

__all__ = [
    "ColdUsers", "DataError", "Event", "Examples", "History", "IgnoredContextWarning", "Model", "ModelFileError",
    "NextItem", "OptionError", "Recommendation", "Recommender", "RedisStore", "Scenario", "SqliteStore", "Store",
    "StoreError", "StrongGeneralisation", "Task", "TimeSplit", "UncertainRecommendation", "UnknownItemWarning", "core",
    "data", "distributed", "evaluation", "load", "meta_step", "metrics", "models", "reweight", "strategies", "tasks",
    "train",
]  # fmt: skip
__all__ += strategies.registry.__all__
