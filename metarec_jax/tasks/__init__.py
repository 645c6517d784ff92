"""Tasks: splits into training, validation and test users, and batches of their tasks."""

from metarec_jax.tasks.batching import Batch, batches, bucket_sizes, features
from metarec_jax.tasks.objective import Ranking
from metarec_jax.tasks.protocols import Scenario, TimeSplit
from metarec_jax.tasks.ranking_protocols import NextItem, StrongGeneralisation
from metarec_jax.tasks.sampling import sampler
from metarec_jax.tasks.splits import ColdUsers, Histories, Split
from metarec_jax.tasks.statistics import ItemStatistics
from metarec_jax.tasks.target import Target

__all__ = [
    "Batch", "ColdUsers", "Histories", "ItemStatistics", "NextItem", "Ranking", "Scenario", "Split",
    "StrongGeneralisation", "Target", "TimeSplit", "batches", "bucket_sizes", "features", "sampler",
]  # fmt: skip
