"""Training: strategy construction, training loop, checkpoints, transfer between datasets."""

from metarec_jax.training.loop import Fitted, default_optimizer, fit

__all__ = ["Fitted", "default_optimizer", "fit"]
