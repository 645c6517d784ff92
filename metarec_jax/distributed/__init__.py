"""Distributed: join the processes of a training, whatever started them; the training is `train(..., mesh=...)`."""

from metarec_jax.distributed.processes import start

__all__ = ["start"]
