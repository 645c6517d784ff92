"""Layout: which device holds which part of a batch of users and of the parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metarec_jax.types import Params


def _all_have(value: str) -> bool:
    """Whether every process passes the same value."""
    digest = np.frombuffer(sha256(value.encode()).digest(), np.uint32)
    return not np.ptp(multihost_utils.process_allgather(digest), axis=0).any()


@partial(jax.jit, static_argnums=1)
def _constrained(tree: Any, sharding: NamedSharding) -> Any:
    """Constrain all arrays to one sharding; of the module, so that it is compiled once for each shape."""
    return jax.lax.with_sharding_constraint(tree, sharding)


@dataclass(frozen=True)
class Layout:
    """Users sharded over one axis of a mesh; parameters replicated, or large tables sharded by rows.

    The mesh may span several processes (`jax.distributed.initialize`). Each of them then calls every method with the
    same arguments, and `batch` with the whole batch, of which it keeps the users of its devices.

    Attributes:
      mesh: the devices, with axes of any type; None: the default device.
      users: name of the axis over which users are sharded.
      rows: name of the axis over which `split` shards tables, which may be `users`; None: they are replicated.

    Raises:
      TypeError: `mesh` is not a mesh.
      ValueError: the mesh has no such axis.

    Example:
      >>> layout = mr.core.Layout(jax.make_mesh((1,), ("users",)))
      >>> tuple(layout.batch({"mask": np.ones((3, 5))})["mask"].sharding.spec)
      ('users',)
    """

    mesh: Mesh | None = None
    users: str = "users"
    rows: str | None = None

    def __post_init__(self) -> None:
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f'mesh: expected jax.make_mesh((jax.device_count(),), ("users",)), got {self.mesh!r}')
        for axis in filter(None, (self.users, self.rows)):
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"the mesh has no axis {axis!r}, its axes are {', '.join(map(repr, self.mesh.axis_names))}: "
                    f'jax.make_mesh((jax.device_count(),), ("{axis}",))'
                )
        automatic = (AxisType.Auto,) * len(self.mesh.axis_names)  # the compiler shards what strategies compute
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=automatic))

    @property
    def spans_processes(self) -> bool:
        """Whether the devices belong to several processes."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress: one of them does."""
        return self.mesh is None or jax.process_index() == min(d.process_index for d in self.mesh.devices.flat)

    def agree(self, setting: Mapping[str, Any]) -> None:
        """Raise an error on every process unless all call this with the same values.

        Args:
          setting: what must be equal, as JSON values.

        Raises:
          ValueError: some of it differs; the message names it.
        """
        if not self.spans_processes:
            return
        names = sorted(setting)
        if not _all_have(json.dumps(names)):
            different = ["the kind of training"]
        else:  # each name is a collective call, made by all processes in the same order
            different = [n for n in names if not _all_have(json.dumps(setting[n], sort_keys=True, default=str))]
        if different:
            raise ValueError(
                f"the processes of this training differ in {', '.join(different)}; start all of them with the same "
                "arguments, data and versions"
            )

    def place(self, tree: Params) -> Params:
        """Copy host arrays to every device."""
        return jax.device_put(tree) if self.mesh is None else self._put(tree, PartitionSpec())

    def split(self, tree: Params) -> Params:
        """Shard host arrays `[rows, ...]`, such as item tables and their optimiser states, over the axis `rows`.

        Raises:
          ValueError: the rows of an array do not divide by the size of the axis.
        """
        if self.mesh is None or self.rows is None:
            return self.place(tree)
        devices = self.mesh.shape[self.rows]
        if wrong := [s for s in map(np.shape, jax.tree.leaves(tree)) if not s or s[0] % devices]:
            raise ValueError(f"rows must be a multiple of {devices}, the size of {self.rows!r}; pad arrays {wrong}")
        return self._put(tree, PartitionSpec(self.rows))

    def batch(self, tree: Any) -> Any:
        """Shard host arrays `[users, ...]`; users are padded with zeros to a multiple of the devices."""
        if self.mesh is None:
            return tree
        devices = self.mesh.shape[self.users]

        def padded(x: Any) -> np.ndarray:
            x = np.asarray(x)
            missing = -len(x) % devices
            return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]) if missing else x

        return self._put(jax.tree.map(padded, tree), PartitionSpec(self.users))

    def shared(self, tree: Params) -> Params:
        """Constrain arrays, where they are traced, to be the same on every device."""
        if self.mesh is None:
            return tree
        return _constrained(tree, NamedSharding(self.mesh, PartitionSpec()))

    def gather(self, tree: Any) -> Any:
        """Return arrays on the host, whole on every process."""
        if self.mesh is None:
            return jax.device_get(tree)
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def whole(x: Any) -> np.ndarray:
            elsewhere = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
            return np.asarray(_constrained(x, replicated) if elsewhere else x)

        return jax.tree.map(whole, tree)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, spec)

        def put(x: Any) -> jax.Array:
            if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(put(jax.random.key_data(x)))
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, tree)


ONE_DEVICE = Layout()
