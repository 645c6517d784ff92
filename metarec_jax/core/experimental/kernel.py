"""Inner loop in one Pallas kernel: adapt a block of users on chip and score their queries. Not used by default.

The rows of a few users are stacked into one matrix, wide enough for tensor cores. Weight updates stay factored,
`x W' = x W - lr (x X^T) D` as in `fastweights`, with `x X^T` masked to 0 between rows of different users. Factored
steps need `2 n (in + out)` numbers per user, which the second-order gradient stores anyway; per-user 64 x 64 weights
would add 16 KB per step. The backward pass adapts each block again.

Counted for 256-64-64, n = 20, q = 10, float32, three users per program (64 + 32 rows), meta-gradient in the parameters:

    bytes per user, for any K, in KB
      stacking, in XLA     30.7 read, 32.8 written (XLA may fuse it with the ops that compute the features)
      forward              32.8 read, 0.04 written; only the inputs are stored for the backward pass
      backward             32.8 read, 8.2 written (gradient at the first layer's outputs), 7.0 (parts of small leaves)
      sums over users      48.0 read
      total                192, hence 12.9 M users/s at 2.49 TB/s; 129 and 19.3 M if stacking is fused
      weights              56 from L2: 84 per program, forward and backward
    arithmetic per user, in MFLOP: products as executed, including other users' rows and padding
      K = 1                7.5 (6.2 by the formula of throughput.floor), hence 48 M users/s at 356 TFLOP/s
      K = 5                69 (26), hence 5.2 M: above the first layer, pairs of steps grow as K squared
    fast memory per program, in KB
      one strip            80 for the features and weights, 48 for the sums
      K = 1                about 100 of activations and gradients: fits an H100's 227 of shared memory
      K = 5                about 900 (one user: 350), more than its shared memory and registers together (483).
                           A TPU's VMEM (v5e: 128 MB) holds either; `block` can then be larger

So K = 1 is bound by memory traffic and K = 5 by arithmetic, in theory. Measured on an H100 through Triton, K = 1 runs
at 1.9 million users/s; `fastweights`, many small XLA kernels, runs at 5.8 (benchmarks/RESULTS.md). Hence it is off.

Lowering, without a device: Triton and Mosaic TPU accept both kernels (jax 0.10.2 and 0.12, K = 1 and 5). Mosaic GPU
does not; pass `compiler_params` of `jax.experimental.pallas.triton` to select Triton, which jax 0.11 deprecates. Full
compilation with jax 0.12 succeeds for a TPU v5e with K = 1 and 5, and for an H100 with K = 1 (three users per program)
and K = 2 (one user). On an H100, K = 2 with three users is rejected: it needs 487 KB of shared memory. K = 3 (one user)
and K = 5 did not finish compiling within minutes. So use one or two steps there.

Matrix sides are padded to powers of two, at least 16, as Triton requires; padding is exact. Products use the ambient
precision: TF32 on a GPU and bfloat16 on a TPU, unless under `jax.default_matmul_precision("highest")`. A user whose
loop meets a non-finite number corrupts the others of its block, as it would any mean over users.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import pallas as pl

from metarec_jax.types import Examples, PointwiseLoss

__all__ = ["inner_loop"]

Dense = tuple[jax.Array, jax.Array]  # w [in, out], b [out]
Rest = tuple[jax.Array, ...]  # b [1, out], step sizes of w and b [1, 1]
Layer = tuple[jax.Array, Rest]  # w [in, out]

TILE = 16  # minimum matrix side for tensor cores
STRIP = 128  # feature columns read at a time: the lanes of a TPU
ROWS = 64  # target number of support rows in a block


class _Settings(NamedTuple):
    """Static settings of the kernel."""

    activation: Callable[[jax.Array], jax.Array]
    loss: PointwiseLoss
    steps: int
    support: int  # examples per user
    query: int
    widths: tuple[int, ...]  # of the hidden layers, before padding
    interpret: Any
    compiler_params: Any


def inner_loop(
    activation: Callable[[jax.Array], jax.Array],
    params: Sequence[Dense],
    support: Examples,
    query: jax.Array,
    *,
    loss: PointwiseLoss = optax.losses.squared_error,
    step_size: Any = 0.1,
    steps: int = 1,
    block: int | None = None,
    interpret: Any = False,
    compiler_params: Any = None,
) -> jax.Array:
    """Adapt a dense tower to each user by SGD and score the queries, in one kernel.

        w_0 = params;  w_{k+1} = w_k - step_size * grad L_support(w_k);  scores = tower(w_steps, query)

    Equals `inner.adapt` followed by `inner.predict`. Differentiable once, in reverse mode, in `params`, `step_size`,
    both features and the targets, with all second-order terms. Users without support examples keep the shared
    parameters exactly; padding changes nothing.

    Args:
      activation: elementwise, between the layers. Neither it nor `loss` may close over traced values.
      params: layers `(w [in, out], b [out])`, first to last; the last is linear, with one output.
      support: features `[users, examples, in]`, target and mask `[users, examples]`; a mask above 0 counts as 1.
      query: features `[users, q, in]`.
      loss: elementwise loss of scores and targets; its mean over a user's unmasked examples is minimised.
      step_size: a scalar, or a pytree prefix of `params` with a scalar for each leaf.
      steps: number of inner steps; the kernel's code grows with its square.
      block: users whose rows are stacked into one matrix (default: about 64 support rows).
      interpret: of `pallas_call`; True runs the kernel as ordinary JAX, the only way on a CPU.
      compiler_params: of `pallas_call`, backend-specific, such as the number of warps.

    Returns:
      Scores `[users, q]`.

    Raises:
      ValueError: shapes do not match, the batch is empty, or `steps` or `block` is out of range.

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    """
    layers = [(jnp.asarray(w), jnp.asarray(b)) for w, b in params]
    features, target, mask, query = (jnp.asarray(a) for a in (support.features, support.target, support.mask, query))
    _check(layers, features, target, mask, query, steps, block)
    (users, n, _), q = features.shape, query.shape[1]
    block = block or max(1, ROWS // max(n, q))
    kept = mask > 0
    share = kept / jnp.maximum(kept.sum(1, keepdims=True), 1)  # weight of each example in its user's mean loss
    settings = _Settings(
        activation, loss, steps, n, q, tuple(w.shape[1] for w, _ in layers[:-1]), interpret, compiler_params
    )
    inputs = jnp.where(kept[..., None], features, 0.0), target[..., None], share[..., None], query
    sizes = jax.tree.leaves(jax.tree.map(lambda s, sub: jax.tree.map(lambda _: s, sub), step_size, params))
    scores = _fused(
        settings, _padded_layers(layers, sizes), *(_stacked(a.astype(layers[0][0].dtype), block) for a in inputs)
    )
    return scores[:, : block * q].reshape(-1, q)[:users]


# --- layout of the kernel's inputs


def _check(
    layers: list[Dense],
    features: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    query: jax.Array,
    steps: int,
    block: int | None,
) -> None:
    if not layers:
        raise ValueError("params must hold at least one layer (w, b)")
    width = features.shape[-1] if features.ndim else 0
    for i, (w, b) in enumerate(layers):
        if w.ndim != 2 or w.shape[0] != width or b.shape != w.shape[1:]:
            raise ValueError(f"layer {i} must be w [{width}, out] and b [out], got {w.shape} and {b.shape}")
        width = w.shape[1]
    if width != 1:
        raise ValueError(f"the last layer must have one output, got {width}")
    if features.ndim != 3 or 0 in features.shape:
        raise ValueError(f"support features must be [users, examples, in], none of them 0, got {features.shape}")
    if target.shape != features.shape[:2] or mask.shape != features.shape[:2]:
        raise ValueError(f"target and mask must be {features.shape[:2]}, got {target.shape} and {mask.shape}")
    if query.ndim != 3 or query.shape[::2] != features.shape[::2] or query.shape[1] == 0:
        raise ValueError(f"query must be [{features.shape[0]}, q, {features.shape[2]}], got {query.shape}")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    if block is not None and block < 1:
        raise ValueError(f"block must be 1 or more, got {block}")


def _side(size: int) -> int:
    """Return the padded size of a matrix side: Triton needs powers of two, tensor cores at least 16."""
    return max(TILE, pl.next_power_of_2(size))


def _pad(array: jax.Array, *sizes: int) -> jax.Array:
    """Pad the end of each axis with zeros to `sizes`."""
    return jnp.pad(array, [(0, size - have) for size, have in zip(sizes, array.shape, strict=True)])


def _padded_layers(layers: list[Dense], sizes: list[Any]) -> list[Layer]:
    """Pad the layers and attach the step sizes of their leaves."""
    padded = []
    for i, (w, b) in enumerate(layers):
        pair = [jnp.asarray(s, w.dtype) for s in sizes[2 * i : 2 * i + 2]]
        if any(s.size != 1 for s in pair):
            raise ValueError(f"step sizes must be scalars, one for each leaf, got {[s.shape for s in pair]}")
        rows, columns = map(_side, w.shape)
        padded.append((_pad(w, rows, columns), (_pad(b[None], 1, columns), *(s.reshape(1, 1) for s in pair))))
    return padded


def _stacked(array: jax.Array, block: int) -> jax.Array:
    """Stack the examples of each block: `[users, examples, width]` to padded `[blocks, rows, width]`."""
    users, examples, width = array.shape
    blocks = -(-users // block)
    stacked = _pad(array, blocks * block, examples, width).reshape(blocks, block * examples, width)
    return _pad(stacked, blocks, _side(block * examples), width if width == 1 else _side(width))


# --- one block of users: plain JAX on matrices, called by the kernels


def _products(x: jax.Array, query: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    """Compute the feature products of the loop: `x w`, `x x^T`, `query w`, `query x^T`, each a sum over strips."""
    return jnp.dot(x, w), _gram(x, x), jnp.dot(query, w), _gram(query, x)


def _block(
    settings: _Settings,
    share: jax.Array,
    products: Sequence[jax.Array],
    rest: Rest,
    upper: list[Layer],
    target: jax.Array,
) -> jax.Array:
    """Compute the adapted scores `[query rows, 1]` of one block's users from their feature `_products`."""
    shared, gram, query_shared, query_gram = products
    (bias, *sizes), kept, (rows, query_rows) = rest, share > 0, query_gram.shape[::-1]
    same = _same_user(rows, settings.support, rows, settings.support)
    query_same = _same_user(query_rows, settings.query, rows, settings.support)
    shared, kernel = shared + bias, _kernel(gram, sizes, same)  # the first layer's inputs stay the same in all steps
    moved = jnp.zeros_like(shared)  # sum over the steps of the gradient at the first layer's outputs
    past: list[list[tuple[jax.Array, jax.Array]]] = [[] for _ in upper]

    def losses(first: jax.Array, past: Any, probes: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        scores, inputs = _upper(settings, upper, first + probes[0], past, same, probes[1:])
        return settings.loss(jnp.where(kept, scores, 0.0), jnp.where(kept, target, 0.0)), inputs

    probes = [jnp.zeros((rows, b.shape[1]), shared.dtype) for b, *_ in (rest, *(r for _, r in upper))]
    for step in range(settings.steps):
        first = shared - jnp.dot(kernel, moved) if step else shared
        _, pull, inputs = jax.vjp(partial(losses, first, past), probes, has_aux=True)
        ((gradient, *gradients),) = pull(share)
        moved = moved + gradient
        past = [[*steps, pair] for steps, pair in zip(past, zip(inputs, gradients, strict=True), strict=True)]
    first = query_shared + bias
    if settings.steps:
        first = first - jnp.dot(_kernel(query_gram, sizes, query_same), moved)
    return _upper(settings, upper, first, past, query_same, [None] * len(past))[0]


def _upper(
    settings: _Settings,
    layers: list[Layer],
    hidden: jax.Array,
    past: Sequence[Sequence[tuple[jax.Array, jax.Array]]],
    same: jax.Array,
    probes: Sequence[jax.Array | None],
) -> tuple[jax.Array, list[jax.Array]]:
    """Compute scores `[rows, 1]` from the first layer's outputs; also return the inputs of the upper layers.

    Args:
      past: per upper layer, the inputs and output gradients `[support rows, ...]` of the steps so far.
      same: `[rows, support rows]` whether two rows belong to the same user.
      probes: zeros added to the upper layers' outputs, to take gradients there.
    """
    inputs = []
    for (w, (b, *sizes)), steps, width, probe in zip(layers, past, settings.widths, probes, strict=True):
        hidden = settings.activation(hidden)
        if width < hidden.shape[1]:  # activation(0) need not be 0
            hidden = jnp.where(_index(hidden.shape, 1) < width, hidden, 0.0)
        inputs.append(hidden)
        out = jnp.dot(hidden, w) + b
        for old, gradient in steps:
            out = out - jnp.dot(_kernel(_gram(hidden, old), sizes, same), gradient)
        hidden = out if probe is None else out + probe
    return jnp.where(_index(hidden.shape, 1) == 0, hidden, 0.0).sum(1, keepdims=True), inputs


def _gram(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def _kernel(gram: jax.Array, sizes: list[jax.Array], same: jax.Array) -> jax.Array:
    """Compute the tangent kernel of a layer: `step_w gram + step_b` within a user, 0 between users."""
    w_size, b_size = sizes
    return jnp.where(same, w_size * gram + b_size, 0.0)


def _index(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _same_user(rows: int, each: int, columns: int, other: int) -> jax.Array:
    """Return `[rows, columns]` whether a row and a column are one user's, with `each` rows and `other` columns each."""
    shape = (rows, columns)
    return jax.lax.div(_index(shape, 0), jnp.int32(each)) == jax.lax.div(_index(shape, 1), jnp.int32(other))


# --- the kernels and their reverse rule


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings: _Settings, layers: list[Layer], *blocks: jax.Array) -> jax.Array:
    """Compute scores `[blocks, query rows, 1]` from features, targets, shares and queries `[blocks, rows, width]`."""

    def kernel(layers: Any, blocks: Any, scores: Any) -> None:
        (weight, rest), *upper = layers
        x, target, share, query = blocks
        small: tuple[Any, Any] = jax.tree.map(lambda ref: ref[...], (rest, upper))
        scores[...] = _block(settings, share[...], _sum_products(x, query, weight), *small, target[...])

    x, *_, query = blocks
    return _call(settings, kernel, jax.ShapeDtypeStruct((*query.shape[:2], 1), x.dtype), layers, blocks)


def _forward(settings: _Settings, layers: list[Layer], *blocks: Any) -> tuple[jax.Array, Any]:
    """Save the inputs only. Features that need a gradient are saved twice: the tree structure marks them."""
    layers, values = jax.tree.map(lambda p: p.value, (layers, blocks), is_leaf=lambda a: hasattr(a, "perturbed"))
    wanted = [primal.value if primal.perturbed else None for primal in (blocks[0], blocks[-1])]
    return _fused(settings, layers, *values), (layers, values, wanted)


def _backward(settings: _Settings, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    """Adapt each block again and pull the gradient back, all on chip.

    The kernel returns each block's part of the small leaves' gradients and the gradient at the first layer's outputs.
    The large gradient of the first weights is then one product over all users.
    """
    layers, blocks, wanted = saved
    x, target, _, query = blocks
    (weight, rest), *upper = layers

    def kernel(layers: Any, blocks: Any, parts: Any, d_target: Any, at_outputs: Any, d_features: Any) -> None:
        (weight, rest), *upper = layers
        x, target, share, query, gradient = blocks
        small: tuple[Any, Any] = jax.tree.map(lambda ref: ref[...], (rest, upper))
        products = _sum_products(x, query, weight)
        _, pull = jax.vjp(partial(_block, settings, share[...]), products, *small, target[...])
        products, *values, d_target[...] = pull(gradient[...])
        for ref, value in zip(*map(jax.tree.leaves, ((parts, at_outputs), (values, products[::2]))), strict=True):
            ref[...] = value

        def strip(at: Any, carry: None) -> None:
            _, pull = jax.vjp(_products, x[:, at], query[:, at], weight[at])
            for ref, value in zip(d_features, pull(products), strict=False):
                if ref is not None:
                    ref[:, at] = value

        if jax.tree.leaves(d_features):
            _strips(x.shape[1], strip, None)

    def like(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(gradient), *a.shape), a.dtype)

    def outputs(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*a.shape[:2], weight.shape[1]), a.dtype)

    out = (
        jax.tree.map(like, [rest, upper]),
        jax.ShapeDtypeStruct(target.shape, target.dtype),
        (outputs(x), outputs(query)),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), wanted),
    )
    parts, d_target, at_outputs, (d_x, d_query) = _call(settings, kernel, out, layers, (*blocks, gradient))
    rest, upper = jax.tree.map(lambda a: a.sum(0), parts)
    d_weight = sum(jnp.tensordot(a, b, ((0, 1), (0, 1))) for a, b in zip((x, query), at_outputs, strict=True))
    return [(d_weight, rest), *upper], d_x, d_target, None, d_query


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _strips(width: int, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """Fold `body(columns, carry)` over strips of columns, in a loop so that no compiler holds all strips at once."""
    strip = min(width, STRIP)
    return jax.lax.fori_loop(
        0, width // strip, lambda i, c: body(pl.ds(pl.multiple_of(i * strip, strip), strip), c), start
    )


def _sum_products(x: Any, query: Any, weight: Any) -> tuple[jax.Array, ...]:
    """Compute `_products` of references, strip by strip."""
    rows, query_rows, out = x.shape[0], query.shape[0], weight.shape[1]

    def add(at: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, sums, _products(x[:, at], query[:, at], weight[at])))

    shapes = (rows, out), (rows, rows), (query_rows, out), (query_rows, rows)
    return _strips(x.shape[1], add, tuple(jnp.zeros(shape, x.dtype) for shape in shapes))


def _call(
    settings: _Settings, kernel: Callable[..., None], out: Any, layers: Any, blocks: tuple[jax.Array, ...]
) -> Any:
    """Run `kernel(layers, blocks, *out)`, one program per entry of the first axis of `blocks` and `out`."""

    def whole(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec(a.shape, lambda program: (0,) * a.ndim)

    def one_block(a: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *a.shape[1:]), lambda program: (program,) + (0,) * (a.ndim - 1))

    return pl.pallas_call(
        kernel,
        out,
        grid=(blocks[0].shape[0],),
        in_specs=(jax.tree.map(whole, layers), jax.tree.map(one_block, blocks)),
        out_specs=jax.tree.map(one_block, out),
        interpret=settings.interpret,
        compiler_params=settings.compiler_params,
    )(layers, blocks)
