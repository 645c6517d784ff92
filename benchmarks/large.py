"""A large Transformer adapts to a whole batch of users, and no user's weights are ever formed.

    python benchmarks/large.py                 # 50 M parameters, 256 users; needs 10 GB
    python benchmarks/large.py --small         # the same on a small scale

One second-order MeLU meta-gradient: every layer of the Transformer adapts to each user (the item table is shared), and
the query loss is differentiated through the adaptation. Prints what the compiler and the operating system say of memory
beside what copies of the weights would take, and checks the gradient of a few users against the form with copies.
"""

import argparse
import resource
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metarec_jax as mr
from metarec_jax.data.fields import Field

GB, FEW = 1e9, 4
LOSS = optax.losses.sigmoid_binary_cross_entropy


def task(rng: np.random.Generator, users: int, support: int, query: int, items: int) -> mr.Task:
    """Random clicks of so many users."""

    def examples(count: int, first: int) -> mr.Examples:
        order = np.broadcast_to(np.arange(first, first + count, dtype=np.int32), (users, count))
        features = {"item_id": rng.integers(1, items, (users, count)).astype(np.int32), "order": order}
        target = (rng.random((users, count)) < 0.5).astype(np.float32)
        return mr.Examples(features, target, np.ones((users, count), np.float32))

    return jax.tree.map(jnp.asarray, mr.Task(examples(support, 0), examples(query, support)))


def compiled(model: mr.Model, form: str, batch: mr.Task) -> tuple[Any, Any]:
    """A strategy that adapts the Transformer's layers and the head, and its compiled meta-gradient."""
    options = {"loss": LOSS, "inner": optax.sgd(0.001), "steps": 1, "groups": ("decision", "head")}
    strategy = mr.with_history(mr.maml(model, form=form, **options))
    params = jax.eval_shape(strategy.init, jax.random.key(0))
    loss = partial(strategy.loss, key=jax.random.key(0))
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return strategy, gradient.lower(params, batch).compile()


def peak(program: Any) -> float:
    """Bytes that a compiled program needs at once: parameters, data, results and all between."""
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--support", type=int, default=5)
    parser.add_argument("--query", type=int, default=5)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--small", action="store_true", help="width 128, 2 layers, 32 users")
    given = parser.parse_args()
    if given.small:
        given.width, given.layers, given.users = 128, 2, 32
    fields = {"item_id": Field("item_id", "categorical", given.items, 1)}
    model = mr.models.transformer(fields, width=given.width, layers=given.layers, heads=given.width // 64)
    batch = task(np.random.default_rng(0), given.users, given.support, given.query, given.items)
    strategy, program = compiled(model, "auto", batch)
    _, plain = compiled(model, "plain", batch)
    params = jax.jit(strategy.init)(jax.random.key(0))
    head = params["model"]["head"]  # starts as zeros, through which no gradient would reach the layers below
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape) / given.width
    groups = jax.tree.leaves(model.groups(params["model"]))
    sizes = [leaf.size for leaf in jax.tree.leaves(params["model"])]
    own = sum(size for size, group in zip(sizes, groups, strict=True) if group != "embedding")
    copies = 4 * own * given.users
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"Transformer: width {given.width}, {given.layers} layers, {sum(sizes) / 1e6:.1f} M parameters")
    print(f"{own / 1e6:.1f} M of them adapt to each of {given.users} users, {given.support} support examples\n")
    start = time.perf_counter()
    (value, aux), gradient = jax.block_until_ready(program(params, batch))
    seconds = time.perf_counter() - start
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert int(aux["failed"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    print(f"copies of the adapting weights alone      {copies / GB:8.2f} GB")
    print(f"plain form, by the compiler               {peak(plain) / GB:8.2f} GB")
    print(f"this engine, by the compiler              {peak(program) / GB:8.2f} GB")
    print(f"this engine, largest resident memory      {rss / GB:8.2f} GB")
    print(f"one meta-gradient, all users at once      {seconds:8.2f} s     (loss {value:.4f})")
    few = jax.tree.map(lambda a: a[:FEW], batch)
    (_, found), (_, expected) = (compiled(model, form, few)[1](params, few) for form in ("auto", "plain"))
    gap = optax.global_norm(jax.tree.map(jnp.subtract, found, expected)) / optax.global_norm(expected)
    print(f"distance to the plain form's gradient     {gap:8.1e}    of its length, {FEW} users")


if __name__ == "__main__":
    main()
