"""Processes: join those that a launcher started (SLURM, Open MPI, Kubernetes, a shell) into one mesh of users."""

import jax
from jax.sharding import Mesh

TIMEOUT = 120  # seconds


def start(
    address: str | None = None, count: int | None = None, rank: int | None = None, timeout: int = TIMEOUT
) -> Mesh:
    """Join all processes and return a mesh of all their devices, with users sharded over them.

    Call it in each process before anything else of JAX. Each process then makes the same calls with the same data:
    `mr.train(data, mesh=mesh)`. Each draws the same global batches and keeps the users of its own devices, so that the
    result does not depend on the number of processes.

    Args:
      address: "host:port" of the process with rank 0.
      count: number of processes.
      rank: number of this process, from 0. Under SLURM, Open MPI and on Cloud TPUs, all three may be omitted; JAX then
        reads them from the environment.
      timeout: seconds to wait for the other processes at the start, and for one that stops answering later; then JAX
        ends all processes.

    Raises:
      ValueError: only some of `address`, `count` and `rank`, or none without a launcher that JAX knows; a rank that is
        not below `count`.
      RuntimeError: JAX ran before, or joined another number of processes.

    Example:
      Two processes on one machine, each started with its rank as an argument:

          mesh = mr.distributed.start("localhost:1234", 2, int(sys.argv[1]))
          recommender = mr.train(mr.data.load("ml-100k"), mesh=mesh)
          if jax.process_index() == 0:
              recommender.save("model")
    """
    given = (address, count, rank)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ValueError(f"give all of address, count and rank, or none, got {address=}, {count=}, {rank=}")
    if count is not None and rank is not None and not 0 <= rank < count:
        raise ValueError(f"rank is from 0 to count - 1, got rank {rank} of {count}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if count != 1:
        try:
            jax.distributed.initialize(
                address, count, rank, initialization_timeout=timeout, heartbeat_timeout_seconds=timeout
            )
        except ValueError as error:
            if address is not None:
                raise
            raise ValueError(
                'no launcher that JAX knows started this process: mr.distributed.start("host:port", count, rank)'
            ) from error
    if count is not None and jax.process_count() != count:
        raise RuntimeError(
            f"{count} processes were to join, JAX counts {jax.process_count()}: this backend trains each process alone"
        )
    return jax.make_mesh((jax.device_count(),), ("users",))
