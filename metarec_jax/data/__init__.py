"""Data: read, check, encode, split into tasks, and batch."""

from metarec_jax.data import cleaning
from metarec_jax.data.batches import Batch, batches, bucket_sizes, features
from metarec_jax.data.by_item import by_item
from metarec_jax.data.by_key import by_key
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fetch import load
from metarec_jax.data.fields import Field
from metarec_jax.data.negatives import with_negatives
from metarec_jax.data.normalise import centre_users, rescale
from metarec_jax.data.open_bandit import LoggedFeedback, open_bandit
from metarec_jax.data.protocols import Scenario, TimeSplit
from metarec_jax.data.recency import with_recency
from metarec_jax.data.sampler import sampler
from metarec_jax.data.splits import ColdUsers, Histories, Split
from metarec_jax.data.statistics import ItemStatistics
from metarec_jax.data.stream import Prepared, prepare
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tables import from_tables, read_table
from metarec_jax.data.target import Target
from metarec_jax.data.vocabulary import Vocabulary

__all__ = [
    "Batch", "ColdUsers", "Dataset", "Field", "Histories", "ItemStatistics", "LoggedFeedback", "Prepared", "Scenario",
    "Split", "Target", "TimeSplit", "Vocabulary", "batches", "bucket_sizes", "by_item", "by_key", "centre_users",
    "cleaning", "features", "from_tables", "load", "open_bandit", "prepare", "read_table", "rescale", "sampler",
    "synthetic", "with_negatives", "with_recency",
]  # fmt: skip
