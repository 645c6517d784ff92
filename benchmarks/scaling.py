"""Scaling over devices: work, memory and traffic of a meta-step at 1 to 8 virtual devices, and what follows for many.

    python benchmarks/scaling.py                    # all device counts; some minutes on two cores
    python benchmarks/scaling.py --users 4096 --items 100000

FLOPs, memory and bytes sent are those of the compiled program of one device, by XLA's own analysis; virtual devices
share the cores of this machine, so that seconds would say nothing. Of a chunked step, the FLOPs of one chunk count. Two
programs are compiled: tables replicated (`core.meta_step`), and tables and their optimiser states sharded by rows
(`core.sparse.meta_step`). The last table is a calculation from these figures, with its assumptions beside it; nothing
of it was measured.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from typing import Any

DEVICES = (1, 2, 4, 8)
WIDTH, SUPPORT, QUERY = 32, 20, 10
BYTES = {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "bf16": 2, "pred": 1}
COLLECTIVES = r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("


def sent(program: str) -> dict[str, int]:
    """Bytes of the results of a compiled program's collectives, by operation."""
    total: dict[str, int] = {}
    for shapes, operation in re.findall(COLLECTIVES, program):
        for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = 1
            for n in filter(None, size.split(",")):
                count *= int(n)
            total[operation] = total.get(operation, 0) + count * BYTES.get(dtype, 4)
    return total


def child(devices: int, users: int, items: int, chunk: int | None) -> None:
    """Compile both programs for so many devices; print their figures as JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import metarec_jax as mr
    from metarec_jax import core

    rng = np.random.default_rng(0)
    shapes = {"table": (items, WIDTH), "w1": (WIDTH, 64), "w2": (64, 64), "w3": (64,)}
    params = {name: rng.normal(size=shape).astype("f") / shape[-1] ** 0.5 for name, shape in shapes.items()}

    def apply(p: Any, x: Any) -> jax.Array:
        return jnp.tanh(jnp.tanh(p["table"][x["item_id"]] @ p["w1"]) @ p["w2"]) @ p["w3"]

    def loss(p: Any, task: Any, key: Any) -> Any:
        adapted = core.adapt(apply, p, task.support, optimizer=optax.sgd(0.1), steps=1)
        scores = core.predict(apply, p, adapted, task.query.features)
        return core.query_loss(scores, task.query, optax.losses.squared_error), {}

    def examples(n: int) -> mr.Examples:
        ids: Any = rng.integers(0, items, (users, n)).astype("i")
        target: Any = rng.normal(size=(users, n)).astype("f")
        return mr.Examples({"item_id": ids}, target, np.ones_like(target))

    task, adam = mr.Task(examples(SUPPORT), examples(QUERY)), optax.adam(1e-3)
    results: dict[str, Any] = {}
    layout = core.Layout(jax.make_mesh((devices,), ("users",)))
    dense = jax.jit(core.meta_step(loss, adam, chunk=chunk), donate_argnums=(0, 1))
    state = jax.eval_shape(adam.init, params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    results["replicated"] = dense.lower(layout.place(params), layout.place(state), layout.batch(task), None).compile()

    layout = core.Layout(jax.make_mesh((devices,), ("users",)), rows="users")
    init, step = core.sparse.meta_step(core.chunked(loss, chunk) if chunk else loss, adam, adam, {"item_id": "table"})
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, params))
    placed = {name: (layout.split if name == "table" else layout.place)(x) for name, x in params.items()}
    state = core.sparse.State(layout.place(state.rest), layout.split(state.tables))
    given = placed, state, layout.batch(task), None
    kept = jax.tree.map(lambda x: x.sharding, given[:2])
    results["by rows"] = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*kept, None)).lower(*given).compile()
    figures = {}
    for name, compiled in results.items():
        memory = compiled.memory_analysis()
        figures[name] = {
            "flops": compiled.cost_analysis()["flops"],
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "sent": sent(compiled.as_text()),
        }
    print(json.dumps(figures))


def measure(devices: int, users: int, items: int, chunk: int | None) -> dict[str, Any]:
    """Run `child` with so many virtual devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, __file__, "--child", str(devices), "--users", str(users), "--items", str(items)]
    command += ["--chunk", str(chunk)] if chunk else []
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def table(title: str, by_devices: dict[int, dict[str, Any]]) -> None:
    print(f"\n{title}\n\n| devices | Gflop | arguments, MB | temporaries, MB | sent, kB |\n|---|---|---|---|---|")
    for devices, figures in by_devices.items():
        bytes_sent = ", ".join(f"{op} {n / 1e3:.1f}" for op, n in sorted(figures["sent"].items())) or "nothing"
        sizes = " | ".join(f"{figures[name] / 1e6:.2f}" for name in ("arguments", "temporaries"))
        print(f"| {devices} | {figures['flops'] / 1e9:.3f} | {sizes} | {bytes_sent} |")


def many(flops_a_user: float, bytes_an_id: float, dense_bytes: int) -> None:
    """Print what a billion users would take, by calculation.

    Args:
      flops_a_user: FLOPs of a user's step.
      bytes_an_id: bytes that each device receives for an id of the whole batch, as compiled.
      dense_bytes: bytes of the parameters that are not tables.
    """
    people, catalogue, devices, batch = 1e9, 1e8, 256, 4096
    achieved, memory_rate, link, latency = 20e12, 2e12, 50e9, 20e-6
    ids = batch * (SUPPORT + QUERY)
    compute = batch * flops_a_user / achieved
    rows_read = 6 * ids * WIDTH * 4 / memory_rate  # row and two moments, read and written
    reduce = 2 * dense_bytes / link + 2 * latency
    exchanges = {
        "rows exchanged as compiled today: every device receives the rows of all": devices * ids * bytes_an_id / link,
        "rows exchanged all to all (not built): rows there, gradients back": 2 * ids * WIDTH * 4 / link + 2 * latency,
    }
    print(f"\n| calculated: {people:.0e} users, {catalogue:.0e} items, {devices} accelerators | |\n|---|---|")
    print(f"| table and two moments, {WIDTH} wide, a device | {3 * catalogue * WIDTH * 4 / devices / 1e9:.2f} GB |")
    steps = people / (devices * batch)
    for what, exchange in exchanges.items():
        parts = {"compute": compute, "rows in memory": rows_read, "rows sent": exchange, "all-reduce": reduce}
        step = sum(parts.values())
        each = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in parts.items())
        print(f"| {what} | step of {batch:,} users a device {step * 1e3:.1f} ms ({each}); epoch {steps * step:.0f} s |")
    print(
        f"\nAssumed of a device: {achieved / 1e12:.0f} Tflop/s achieved (an H100 ran the engine at 9 % of 410), "
        f"{memory_rate / 1e12:.0f} TB/s of memory, {link / 1e9:.0f} GB/s and {latency * 1e6:.0f} us a message on its "
        "link; ids spread evenly over the rows; nothing overlaps; the input keeps up; no device fails."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1024, help="users a step, over all devices")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.users, given.items, given.chunk)
    for chunk in (None, given.users // 4):
        figures = {n: measure(n, given.users, given.items, chunk) for n in DEVICES}
        chunks = f", chunks of {chunk} users" if chunk else ""
        for name, where in (("replicated", "replicated"), ("by rows", "sharded by rows")):
            what = f"A step of {given.users:,} users, {given.items:,} items {WIDTH} wide, tables {where}{chunks}"
            table(what + ", for each device:", {n: by[name] for n, by in figures.items()})
        if chunk is None:
            one, most = figures[1]["by rows"], figures[DEVICES[-1]]["by rows"]
            bytes_an_id = sum(most["sent"].values()) / (given.users * (SUPPORT + QUERY))
            many(one["flops"] / given.users, bytes_an_id, 4 * (WIDTH * 64 + 64 * 64 + 64))


if __name__ == "__main__":
    main()
