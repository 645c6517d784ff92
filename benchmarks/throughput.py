"""Users per second through a second-order meta-gradient and through serving: engine, peers, limit.

Run `python benchmarks/throughput.py`; `--help` lists the options. Without PyTorch its rows are skipped. On a GPU where
both do not fit, each library keeping the memory that it once had, run `--libraries jax` and `--libraries torch`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.pallas import triton
from rich.console import Console
from rich.table import Table

from metarec_jax.core import fastweights, inner, outer
from metarec_jax.core.experimental import kernel
from metarec_jax.types import Examples, Task

try:
    import torch
except ImportError:
    torch = None

SUPPORT, QUERY, CANDIDATES, RATE = 20, 10, 100, 0.01
USERS = {  # tower: users on a CPU, on an accelerator
    "256-64-64": (1024, 32768),
    "512-256-128": (128, 4096),
    "1024-1024-512": (32, 4096),
    "2048-2048-1024": (8, 1024),
}
squared = optax.losses.squared_error


class Timing(NamedTuple):
    """Seconds of each repeat, for so many users; peak memory in bytes where the compiler tells."""

    seconds: list[float]
    users: int
    memory: float | None

    @property
    def rate(self) -> float:
        return self.users / statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{self.users / max(self.seconds):,.0f} to {self.users / min(self.seconds):,.0f}"


Row = tuple[str, Callable[[], Timing]]  # a system, and what measures it


def arrays(sizes: list[int], users: int, rows: dict[str, int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters of a tower with a linear head, and features and targets for each of the `rows`."""
    r = np.random.default_rng(0)
    params = {}
    for i, (a, b) in enumerate(zip(sizes, [*sizes[1:], 1], strict=True)):
        params[f"w{i}"] = (r.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32)
        params[f"b{i}"] = np.zeros(b, np.float32)
    draw = partial(r.standard_normal, dtype=np.float32)
    return params, {name: (draw((users, n, sizes[0])), draw((users, n))) for name, n in rows.items()}


def tower(params: dict[str, Any], x: Any, relu: Callable[[Any], Any] = jax.nn.relu) -> Any:
    """Scores `[examples]` of one user; the same code for JAX and PyTorch arrays."""
    last = len(params) // 2 - 1
    for i in range(last):
        x = relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return (x @ params[f"w{last}"] + params[f"b{last}"])[..., 0]


def weights(params: dict[str, np.ndarray]) -> int:
    return sum(w.size for name, w in params.items() if name.startswith("w"))


def floor(params: dict[str, np.ndarray], steps: int, ceilings: tuple[float, float]) -> float:
    """Users per second that the device could reach: the slower of its arithmetic and its traffic.

    Arithmetic (12 n K + 6 q) P for n support, q query examples and P weights; traffic, inputs read once.
    A layer whose input stays the same over the steps needs less, so a share can pass 100 %.
    """
    flops = (12 * SUPPORT * steps + 6 * QUERY) * weights(params)
    traffic = 4 * (SUPPORT + QUERY) * params["w0"].shape[0]
    return 1 / max(flops / ceilings[0], traffic / ceilings[1])


def clock(run: Callable[[], Any], users: int, repeats: int, memory: float | None = None) -> Timing:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Timing(seconds, users, memory)


def compiled(function: Callable[..., Any], args: tuple[Any, ...], users: int, repeats: int) -> Timing:
    program = jax.jit(function).lower(*args).compile()
    memory = program.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else None
    return clock(lambda: jax.block_until_ready(program(*args)), users, repeats, total)


def measure_ceilings(repeats: int) -> tuple[float, float]:
    """Float32 arithmetic of one large matrix product in FLOP/s, and copying in bytes read per second."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((side, side))
    product = compiled(jnp.matmul, (square, square), 1, repeats)
    long = jnp.ones(side * side * 16)
    copy = compiled(lambda a: a + 1, (long,), 1, repeats)
    return 2 * side**3 / min(product.seconds), 2 * long.nbytes / min(copy.seconds)


# --- JAX rows


def meta_loss(engine: Any, steps: int, params: Any, task: Task, key: Any = None) -> tuple[jax.Array, dict]:
    adapted = engine.adapt(tower, params, task.support, loss=squared, optimizer=optax.sgd(RATE), steps=steps)
    return outer.query_loss(engine.predict(tower, params, adapted, task.query.features), task.query, squared), {}


def on_chip_loss(steps: int, params: Any, task: Task) -> jax.Array:
    backend = jax.default_backend()
    through = triton.CompilerParams(num_warps=4) if backend == "gpu" else None  # else jax takes Mosaic, see `kernel`
    layers = [(params[f"w{i}"], params[f"b{i}"]) for i in range(len(params) // 2)]
    options = {"loss": squared, "step_size": RATE, "steps": steps, "interpret": backend == "cpu"}
    scores = kernel.inner_loop(
        jax.nn.relu, layers, task.support, task.query.features, compiler_params=through, **options
    )
    return outer.query_loss(scores, task.query, squared)


def serve(engine: Any, steps: int, params: Any, support: Examples, candidates: jax.Array) -> jax.Array:
    adapted = engine.adapt(tower, params, support, loss=squared, optimizer=optax.sgd(RATE), steps=steps)
    return engine.predict(tower, params, adapted, candidates)


def jax_rows(params: Any, data: Any, steps: int, args: argparse.Namespace) -> Iterator[Row]:
    params = jax.tree.map(jnp.asarray, params)
    task = Task(
        *(Examples(jnp.asarray(x), jnp.asarray(y), jnp.ones(y.shape)) for x, y in (data["support"], data["query"]))
    )
    users = task.query.mask.shape[0]

    def timed(engine: Any, chunk: int) -> Timing:
        loss = partial(meta_loss, engine, steps)
        gradient = jax.value_and_grad(outer.chunked(loss, chunk) if chunk else loss, has_aux=True)
        return compiled(lambda p, t: gradient(p, t, None), (params, task), users, args.repeats)

    yield "plain JAX vmap", partial(timed, inner, 0)
    if args.both:
        yield "plain JAX vmap in chunks", partial(timed, inner, args.chunk or users)
    yield "this engine", partial(timed, fastweights, args.chunk)
    if args.kernel:
        gradient = jax.value_and_grad(partial(on_chip_loss, steps))
        yield "this engine, on chip", partial(compiled, gradient, (params, task), users, args.repeats)


def jax_serving(params: Any, data: Any, steps: int, args: argparse.Namespace) -> Iterator[Row]:
    params = jax.tree.map(jnp.asarray, params)
    x, y = map(jnp.asarray, data["support"])
    support, candidates = Examples(x, y, jnp.ones(y.shape)), jnp.asarray(data["candidates"][0])
    for name, engine in (("plain JAX vmap", inner), ("this engine", fastweights)):
        inputs = (params, support, candidates)
        yield name, partial(compiled, partial(serve, engine, steps), inputs, len(x), args.repeats)


# --- PyTorch rows


def torch_adapt(params: dict[str, Any], x: Any, y: Any, steps: int) -> dict[str, Any]:
    def loss(fast: dict[str, Any]) -> Any:
        return ((tower(fast, x, torch.relu) - y) ** 2).mean()

    for _ in range(steps):
        gradient = torch.func.grad(loss)(params)
        params = {name: w - RATE * gradient[name] for name, w in params.items()}
    return params


def torch_rows(params: Any, data: Any, steps: int, args: argparse.Namespace) -> Iterator[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX multiplies there
    place = partial(torch.as_tensor, device=device)
    shared, batch = (
        {n: place(w) for n, w in params.items()},
        [place(a) for pair in ("support", "query") for a in data[pair]],
    )
    users = len(batch[0])

    def user_loss(params: Any, x: Any, y: Any, xq: Any, yq: Any) -> Any:
        fast = torch_adapt(params, x, y, steps)
        return ((tower(fast, xq, torch.relu) - yq) ** 2).mean()

    def batch_loss(params: Any, *batch: Any) -> Any:
        return torch.func.vmap(partial(user_loss, params))(*batch).mean()

    def finished(function: Callable[..., Any], *inputs: Any) -> None:
        function(shared, *inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(function: Callable[..., Any], batch: list[Any]) -> Timing:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timing = clock(lambda: finished(function, *batch), users, args.repeats)
        return timing._replace(memory=torch.cuda.max_memory_allocated() if device == "cuda" else None)

    gradient = torch.func.grad_and_value(batch_loss)
    yield "torch.func vmap", partial(timed, gradient, batch)
    if args.compile:
        yield "torch.func vmap, compiled", lambda: timed(torch.compile(gradient), batch)
    few, single = min(users, 8), torch.func.grad_and_value(user_loss)

    def one_by_one() -> None:
        for i in range(few):
            finished(single, *(a[i] for a in batch))

    yield "one user after another", partial(clock, one_by_one, few, args.repeats)


# --- report


def measured(rows: Iterator[Row]) -> Iterator[tuple[str, Timing | Exception]]:
    """Each system's timing, or why it has none: out of memory or no compiler for torch.compile is a result too."""
    try:
        for name, measure in rows:
            try:
                yield name, measure()
            except Exception as error:
                yield name, error
    except Exception as error:
        yield "all that follow", error


def add_rows(
    table: Table, label: str, rows: Iterator[Row], limit: float | None, base: float | None = None
) -> float | None:
    """Measures and adds a system a row, with its ratio to `base` (default: the first).

    Returns:
      Users a second that the ratios are to; None where there is no base and the first system failed.
    """
    for place, (name, timing) in enumerate(measured(rows)):
        if isinstance(timing, Exception):
            why = f"{type(timing).__name__}: {str(timing)[:60].splitlines()[0] if str(timing) else ''}"
            print(f"{table.title}, {label}: {name}: {why}", file=sys.stderr, flush=True)
            table.add_row(label, name, why)
            continue
        if base is None and place == 0:
            base = timing.rate
        memory = "" if timing.memory is None else f"{timing.memory / 1e6:,.0f}"
        share = [] if limit is None else [f"{timing.rate / limit:.0%}"]
        ratio = "" if base is None else f"{timing.rate / base:.2f}"
        told = f"{name} {timing.rate:,.0f} users/s ({timing.spread}), {memory or '-'} MB"
        print(f"{table.title}, {label}: {told}", file=sys.stderr, flush=True)
        table.add_row(label, name, f"{timing.rate:,.0f}", timing.spread, ratio, memory, *share)
    return base


def arguments() -> argparse.Namespace:
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", nargs="+", default=list(USERS), help="layer widths, as in 256-64-64")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 3, 5], help="inner steps")
    parser.add_argument("--users", type=int, help="users in a batch (default: by tower and device)")
    parser.add_argument("--repeats", type=int, default=3 if cpu else 10)
    parser.add_argument("--chunk", type=int, default=32 if cpu else 0, help="users at a time in this engine; 0: all")
    parser.add_argument("--kernel", action="store_true", help="show the Pallas kernel too (interpreted on a CPU)")
    parser.add_argument("--both", action="store_true", help="show plain JAX in the same chunks too")
    parser.add_argument("--libraries", nargs="+", choices=["jax", "torch"], default=["jax", "torch"])
    parser.add_argument("--serving", action=argparse.BooleanOptionalAction, default=True, help="the second table")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=not cpu, help="torch.compile row")
    parser.add_argument("--quick", action="store_true", help="the narrowest tower, one step, few users")
    args = parser.parse_args()
    if args.quick:
        args.towers, args.steps, args.users, args.repeats = (
            args.towers[:1],
            args.steps[:1],
            args.users or 256,
            3,
        )
    return args


def main() -> None:
    args, console = arguments(), Console(width=140)
    ceilings = measure_ceilings(args.repeats)
    device = jax.devices()[0]
    console.print(
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}, "
        f"torch {torch.__version__ if torch else 'absent: its rows are skipped'}. "
        f"Measured ceilings: {ceilings[0] / 1e9:,.0f} GFLOP/s, {ceilings[1] / 1e9:,.1f} GB/s. "
        f"{SUPPORT} support and {QUERY} query examples a user; medians of {args.repeats} runs."
    )
    training = Table(
        "tower, users, K", "system", "users/s", "spread", "ratio", "MB", "of the floor", title="Meta-gradient"
    )
    serving = Table(
        "tower, users, K",
        "system",
        "users/s",
        "spread",
        "ratio",
        "MB",
        title=f"Adapt and score {CANDIDATES} candidates",
    )
    for name in args.towers:
        sizes = [int(width) for width in name.split("-")]
        users = args.users or USERS.get(name, (128, 4096))[device.platform != "cpu"]
        params, data = arrays(sizes, users, {"support": SUPPORT, "query": QUERY, "candidates": CANDIDATES})
        for steps in args.steps:
            label = f"{name}, {users:,}, {steps}"
            limit = floor(params, steps, ceilings)
            base = None
            if "jax" in args.libraries:
                base = add_rows(training, label, jax_rows(params, data, steps, args), limit)
            if torch and "torch" in args.libraries:
                add_rows(training, label, torch_rows(params, data, steps, args), limit, base)
            if args.serving and "jax" in args.libraries:
                add_rows(serving, label, jax_serving(params, data, steps, args), None)
    console.print(training, *([serving] if args.serving else []))


if __name__ == "__main__":
    main()
