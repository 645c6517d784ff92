"""Training on a mesh: as on one device, with no array of all users sent, in one process and in two."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.core import Layout

DEVICES = r"""
import os, re, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
import jax, numpy as np
import metarec_jax as mr
from metarec_jax.training import loop

name, objective = sys.argv[1].split(":")
data = mr.data.synthetic(users=60, items=50, ratings_per_user=(12, 25))
mesh = jax.make_mesh((8,), ("users",))
options = dict(objective=objective, epochs=2, batch_size=40, progress=False, ratings=None)  # 40 is no other size
step, programs = loop._step, []

def seen(*args, **kwargs):
    if not programs and kwargs["layout"].mesh is not None:
        programs.append(step.lower(*args, **kwargs).compile().as_text())
    return step(*args, **kwargs)

loop._step = seen
one, eight = mr.train(data, name, **options), mr.train(data, name, mesh=mesh, **options)
for a, b in zip(one.history, eight.history, strict=True):
    np.testing.assert_allclose(list(b.values()), list(a.values()), rtol=5e-5, atol=1e-6)
for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
    assert np.size(a) == 0 or np.abs(a - b).max() <= 0.02 * max(np.abs(a).max(), 1e-3)  # Adam divides by small numbers
if programs:
    sent = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", programs[0])
    sizes = [size.split(",") for line in sent for size in re.findall(r"\w+\[([\d,]*)\]", line)]
    assert sizes, "nothing was sent, so that nothing was sharded"
    assert not [s for s in sizes if "40" in s], sizes  # an array of all users
print("equal")
"""

FAMILIES = (  # one strategy of each file that has collectives of its own to fear
    "stack:ranking maml:ranking in_context:ranking alpaca:click prototypes:click cnp:click mamo:click imaml:click "
    "reptile:click metaemb:click ensemble:click limaml:click gated:click als:rating transitions:ranking "
    "softmax_ridge:ranking item_knn:ranking"
)


@pytest.mark.parametrize(
    "choice", ["ials:ranking", *(pytest.param(n, marks=pytest.mark.grid) for n in FAMILIES.split())]
)
def test_eight_devices_train_as_one(choice):
    ran = subprocess.run(
        [sys.executable, "-c", DEVICES, choice], capture_output=True, text=True, timeout=400, check=False
    )
    assert ran.stdout.endswith("equal\n"), ran.stderr[-3000:]


PROCESSES = r"""
import os, sys
rank, count, port, seed = map(int, sys.argv[1:])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
import metarec_jax as mr
mesh = mr.distributed.start(f"localhost:{port}", count, rank)
data = mr.data.synthetic(users=60, items=50, ratings_per_user=(12, 25), seed=seed)
try:
    trained = mr.train(data, "ridge", objective="click", epochs=2, batch_size=32, progress=False, mesh=mesh)
    print(sorted(trained.history[-1].items()))
except ValueError as error:
    print("refused:", error)
"""


def _processes(count: int, seeds: tuple[int, ...]) -> list[str]:
    """Run a training in `count` processes with four devices in all; return the last line of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(rank), str(count), str(port), str(seeds[rank])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), [error[-3000:] for _, error in outputs]
    return [output.splitlines()[-1] for output, _ in outputs]


def test_two_processes_train_as_one():
    assert _processes(2, (0, 0)) == _processes(1, (0,)) * 2


def test_processes_with_other_data_are_refused_by_all():
    lines = _processes(2, (0, 1))
    assert all(line.startswith("refused: the processes of this training differ in data") for line in lines), lines


def test_a_mesh_without_the_axis_is_refused():
    with pytest.raises(ValueError, match="no axis 'users', its axes are 'batch'"):
        mr.train(mr.data.synthetic(users=30, items=20, ratings_per_user=(12, 15)), mesh=jax.make_mesh((1,), ("batch",)))


def test_what_is_no_mesh_and_half_an_address_are_refused():
    with pytest.raises(TypeError, match=r"mesh: expected jax\.make_mesh"):
        Layout(8)
    with pytest.raises(ValueError, match="all of address, count and rank"):
        mr.distributed.start("localhost:1")
    with pytest.raises(ValueError, match="rank 5 of 2"):
        mr.distributed.start("localhost:1", 2, 5)


def test_a_layout_pads_users_and_returns_host_arrays():
    layout = Layout(jax.make_mesh((1,), ("users",)))
    batch = {"mask": np.ones((3, 2), np.float32)}
    assert isinstance(layout.gather(layout.batch(batch))["mask"], np.ndarray)
    np.testing.assert_array_equal(layout.gather(layout.batch(batch))["mask"], batch["mask"])
    key = jax.random.key(3)
    np.testing.assert_array_equal(jax.random.key_data(layout.place(key)), jax.random.key_data(key))
