"""Data: read, validate, clean and encode interactions, users and items."""

from metarec_jax._moved import moved
from metarec_jax.data import cleaning
from metarec_jax.data.bandit_feedback import LoggedFeedback, open_bandit
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fetch import load
from metarec_jax.data.fields import Field
from metarec_jax.data.negatives import with_negatives
from metarec_jax.data.normalise import centre_users, rescale
from metarec_jax.data.prepared import Prepared
from metarec_jax.data.recency import with_recency
from metarec_jax.data.regroup import by_item, by_key
from metarec_jax.data.simulation import synthetic
from metarec_jax.data.stream import prepare
from metarec_jax.data.tables import from_tables, read_table
from metarec_jax.data.vocabulary import Vocabulary

__all__ = [
    "Dataset", "Field", "LoggedFeedback", "Prepared", "Vocabulary", "by_item", "by_key", "centre_users", "cleaning",
    "from_tables", "load", "open_bandit", "prepare", "read_table", "rescale", "synthetic", "with_negatives",
    "with_recency",
]  # fmt: skip

__getattr__ = moved(
    __name__,
    {
        name: f"metarec_jax.tasks.{name}"
        for name in (
            "Batch", "ColdUsers", "Histories", "ItemStatistics", "Scenario", "Split", "Target", "TimeSplit", "batches",
            "bucket_sizes", "features", "sampler",
        )
    },
)  # fmt: skip
