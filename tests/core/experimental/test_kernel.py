"""The on-chip loop gives what the plain form gives, in value and full meta-gradient, in interpret mode."""

import importlib
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax.core import inner
from metarec_jax.core.experimental.kernel import inner_loop
from metarec_jax.types import Examples

USERS, SUPPORT, QUERY = 5, 6, 3
SIZES = (5, 7, 4, 1)
fused = partial(inner_loop, interpret=True)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def problem(seed: int = 0, sizes: tuple[int, ...] = SIZES, users: int = USERS) -> tuple[Any, Examples, jax.Array]:
    """A tower, ragged support examples of which the second user has none, and query features."""
    r = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(r.standard_normal(shape), jnp.float32)

    params = [(draw(a, b) / a**0.5, 0.1 * draw(b)) for a, b in pairwise(sizes)]
    mask = (r.random((users, SUPPORT)) < 0.8).astype(np.float32)
    mask[1] = 0
    support = Examples(draw(users, SUPPORT, sizes[0]), jnp.asarray(r.random((users, SUPPORT)), jnp.float32), mask)
    return params, support, draw(users, QUERY, sizes[0])


def tower(activation: Any, params: Any, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = activation(x @ w + b)
    return (x @ params[-1][0] + params[-1][1])[..., 0]


def plain(activation: Any, params: Any, support: Examples, query: jax.Array, *, loss: Any, step_size: Any, steps: int):
    apply = partial(tower, activation)
    options = {"loss": loss, "step_size": step_size, "steps": steps, "optimizer": optax.sgd(1.0)}
    return inner.predict(apply, params, inner.adapt(apply, params, support, **options), query)


def results(loop: Any, activation: Any, params: Any, support: Examples, query: jax.Array, step_size: Any, **options):
    """Scores, and the gradient of a curved function of them in everything that is differentiable."""

    def judged(params, step_size, features, target, query):
        given = support._replace(features=features, target=target)
        scores = loop(activation, params, given, query, step_size=step_size, **options)
        return jnp.sin(scores).sum(), scores

    given = (params, step_size, support.features, support.target, query)
    (_, scores), gradient = jax.jit(jax.value_and_grad(judged, argnums=tuple(range(5)), has_aux=True))(*given)
    return scores, gradient


def agree(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()) + 1e-12)


@pytest.mark.parametrize(
    ("steps", "activation", "loss", "sizes"),
    [
        pytest.param(1, jax.nn.relu, optax.losses.huber_loss, SIZES, marks=pytest.mark.grid),
        (2, jax.nn.sigmoid, optax.losses.sigmoid_binary_cross_entropy, SIZES),  # sigmoid(0) in the padding
        (3, jnp.tanh, optax.losses.sigmoid_binary_cross_entropy, (5, 7, 1)),
        pytest.param(4, jax.nn.silu, optax.losses.squared_error, (5, 7, 1), marks=pytest.mark.grid),
        pytest.param(5, jax.nn.relu, optax.losses.squared_error, (5, 7, 1), marks=pytest.mark.grid),
        pytest.param(2, jnp.tanh, optax.losses.squared_error, (5, 1), marks=pytest.mark.grid),
        (1, jnp.tanh, optax.losses.squared_error, (140, 3, 1)),  # two strips
    ],
)
def test_scores_and_meta_gradients_are_the_plain_forms(steps, activation, loss, sizes):
    params, support, query = problem(sizes=sizes)
    step_size = [(jnp.float32(0.1 + 0.05 * i), jnp.float32(0.3 - 0.05 * i)) for i in range(len(params))]
    given = {"steps": steps, "loss": loss}
    expected = results(plain, activation, params, support, query, step_size, **given)
    agree(results(fused, activation, params, support, query, step_size, **given, block=2), expected)


@pytest.mark.parametrize("block", [1, 3, None])
def test_the_block_changes_nothing(block):
    params, support, query = problem()
    expected = plain(jnp.tanh, params, support, query, loss=optax.losses.squared_error, step_size=0.1, steps=2)
    agree(fused(jnp.tanh, params, support, query, steps=2, block=block), expected)


def test_a_user_without_support_keeps_the_shared_parameters():
    params, support, query = problem()
    score = partial(fused, jnp.tanh, params, support, query)
    np.testing.assert_array_equal(score(steps=3)[1], score(steps=0)[1])
    agree(score(steps=0), tower(jnp.tanh, params, query))


def test_what_the_mask_hides_reaches_neither_scores_nor_gradients():
    params, support, query = problem(sizes=(5, 7, 1))
    hidden = support.mask == 0
    spoiled = Examples(
        jnp.where(hidden[..., None], jnp.nan, support.features),
        jnp.where(hidden, jnp.inf, support.target),
        support.mask,
    )
    judge = partial(results, fused, jnp.tanh, params, query=query, step_size=jnp.float32(0.1), block=2)
    agree(judge(support=spoiled), judge(support=support))


def test_only_asked_gradients_are_computed():
    params, support, query = problem()

    def outputs(function: Any, given: Any) -> int:
        text = str(jax.make_jaxpr(jax.grad(lambda a: function(a).sum()))(given))
        return text.count(f"{USERS},16,16]")

    shared = partial(fused, jnp.tanh, support=support, block=1)
    assert outputs(partial(shared, query=query), params) < outputs(lambda q: shared(params, query=q), query)


def test_the_backward_pass_keeps_only_its_inputs():
    params, support, query = problem()
    _, pull = jax.vjp(lambda p: fused(jnp.tanh, p, support, query, steps=3, block=1), params)
    stacked = {(USERS, 16, width) for width in (1, 16)}
    kept = [a.shape for a in jax.tree.leaves(pull) if hasattr(a, "shape") and a.shape[:1] == (USERS,) and a.ndim == 3]
    assert kept
    assert set(kept) <= stacked


@pytest.mark.parametrize("target", ["tpu_custom_call", "__gpu$xla.gpu.triton"])
def test_it_lowers_without_a_device(target):
    gpu = "gpu" in target
    if gpu and jax.__version_info__ >= (0, 11):
        pytest.skip("the Triton lowering of Pallas is deprecated there and asks for a device")
    params, support, query = problem()
    score = partial(inner_loop, jnp.tanh, support=support, query=query, steps=2, compiler_params=triton(gpu))
    exported = jax.export.export(
        jax.jit(jax.value_and_grad(lambda p: score(p).sum())),
        platforms=["cuda" if gpu else "tpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
    )(params)
    assert exported.mlir_module().count(f"@{target}(") == 2  # forward, backward


def triton(wanted: bool) -> Any:
    return importlib.import_module("jax.experimental.pallas.triton").CompilerParams(num_warps=8) if wanted else None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": []}, "at least one layer"),
        ({"params": [(jnp.ones((5, 2)), jnp.ones(2))]}, "one output"),
        ({"params": [(jnp.ones((4, 1)), jnp.ones(1))]}, r"layer 0 must be w \[5, out\]"),
        ({"query": jnp.ones((USERS, QUERY, 4))}, "query must be"),
        ({"query": jnp.ones((USERS, 0, 5))}, "query must be"),
        ({"support": Examples(jnp.ones((USERS, 2, 5)), jnp.ones((USERS, 3)), jnp.ones((USERS, 2)))}, "target and mask"),
        ({"support": Examples(jnp.ones((0, 2, 5)), jnp.ones((0, 2)), jnp.ones((0, 2)))}, "none of them 0"),
        ({"steps": -1}, "steps must be"),
        ({"block": 0}, "block must be"),
        ({"step_size": jnp.ones(2)}, "step sizes must be scalars"),
    ],
)
def test_bad_input_is_named(change, message):
    params, support, query = problem()
    with pytest.raises(ValueError, match=message):
        fused(jnp.tanh, **{"params": params, "support": support, "query": query, **change})
