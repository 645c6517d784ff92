"""Jaxpr analysis: which leaves a model uses only as layer weights or tables, and which updates are linear.

Leaves of the first kind whose optimiser updates are linear in the gradients can stay factored.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core as jex

from metarec_jax.core._spmd import spec
from metarec_jax.types import Apply, Features, Params

_INLINED = ("jit", "pjit", "closed_call", "core_call")  # calls equivalent to their body
_REMAT = ("checkpoint", "remat", "remat2")  # inlined only if an adapted weight enters, to reach its product
_LINEAR_UNARY = ("neg", "convert_element_type", "reshape", "broadcast_in_dim", "squeeze", "copy", "copy_p")


class Op(NamedTuple):
    """One primitive of a program; inputs are value numbers or literals, outputs value numbers."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]

    def __call__(self, *values: Any) -> Sequence[Any]:
        with self.eqn.ctx.manager:
            results = self.eqn.primitive.bind(*values, **self.eqn.primitive.get_bind_params(self.eqn.params))
        return results if self.eqn.primitive.multiple_results else (results,)


class Program(NamedTuple):
    """A function as a flat list of primitives over numbered values.

    Attributes:
      ops: primitives in order of evaluation.
      consts: value number -> array that the function closes over.
      inputs: value numbers of the leaves of each argument.
      outputs: value numbers or literals.
      tree: tree structure of the result.
      shapes: value number -> shape and dtype.
    """

    ops: list[Op]
    consts: dict[int, Any]
    inputs: list[list[int]]
    outputs: list[Any]
    tree: Any
    shapes: dict[int, Any]

    def read(self, atom: Any, env: dict[int, Any]) -> Any:
        """Return the value of a value number or literal."""
        return env[atom] if isinstance(atom, int) else atom.val

    def run(self, ops: Sequence[int], env: dict[int, Any], replaced: dict[int, Callable[..., Any]]) -> None:
        """Evaluate the ops at these positions into `env`; `replaced` maps positions to substitute functions."""
        for position in ops:
            op = self.ops[position]
            values = [self.read(atom, env) for atom in op.inputs]
            results = (replaced[position](*values),) if position in replaced else op(*values)
            env.update(zip(op.outputs, results, strict=True))

    def result(self, env: dict[int, Any]) -> Any:
        """Return the function's result from the evaluated `env`."""
        return jax.tree.unflatten(self.tree, [self.read(atom, env) for atom in self.outputs])

    def dependents(self, sources: Sequence[int]) -> set[int]:
        """Return all values that depend on one of the `sources`, including these."""
        reached = set(sources)
        for op in self.ops:
            if any(isinstance(atom, int) and atom in reached for atom in op.inputs):
                reached.update(op.outputs)
        return reached


def trace(function: Callable[..., Any], *args: Any, opened: Sequence[int] = ()) -> Program:
    """Trace `function(*args)` to a `Program`.

    Args:
      function: a pure function.
      args: pytrees of arrays or `ShapeDtypeStruct`.
      opened: numbers of leaves of the first argument. Rematerialised blocks that one of them enters are inlined, as
        all other calls are.
    """
    leaves, structure = jax.tree.flatten(args)
    result: list[Any] = []

    def flat(*flat_args: Any) -> list[Any]:
        out, tree = jax.tree.flatten(function(*jax.tree.unflatten(structure, flat_args)))
        result.append(tree)
        return out

    closed = jax.make_jaxpr(flat)(*leaves)
    program = Program([], {}, [], [], result[0], {})

    def new(variable: Any) -> int:
        number = len(program.shapes)
        program.shapes[number] = variable.aval
        return number

    names: dict[Any, Any] = {}
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        names[variable] = new(variable)
        program.consts[names[variable]] = value
    numbers = iter([new(variable) for variable in closed.jaxpr.invars])
    names.update(zip(closed.jaxpr.invars, range(len(program.consts), len(program.shapes)), strict=True))
    for arg in args:
        program.inputs.append([next(numbers) for _ in jax.tree.leaves(arg)])
    inside = {program.inputs[0][i] for i in opened}
    program.outputs.extend(_inline(closed.jaxpr, names, program, new, inside))
    return program


def _inline(jaxpr: Any, names: dict[Any, Any], program: Program, new: Callable, opened: set[int]) -> list[Any]:
    """Append the equations of `jaxpr` to the program; return its outputs as value numbers or literals."""

    def atom(variable: Any) -> Any:
        return variable if isinstance(variable, jex.Literal) else names[variable]

    for eqn in jaxpr.eqns:
        inputs = tuple(atom(v) for v in eqn.invars)
        name = eqn.primitive.name
        if name in _INLINED or (name in _REMAT and any(isinstance(a, int) and a in opened for a in inputs)):
            body = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            consts = getattr(body, "consts", ())
            body = getattr(body, "jaxpr", body)
            inner = dict(zip(body.invars, inputs, strict=True))
            for variable, value in zip(body.constvars, consts, strict=True):
                inner[variable] = new(variable)
                program.consts[inner[variable]] = value
            names.update(zip(eqn.outvars, _inline(body, inner, program, new, opened), strict=True))
            continue
        outputs = tuple(new(v) for v in eqn.outvars)
        names.update(zip(eqn.outvars, outputs, strict=True))
        program.ops.append(Op(eqn, inputs, outputs))
    return [atom(v) for v in jaxpr.outvars]


class Site(NamedTuple):
    """One use of an adapted leaf, as the weight of a dense layer or as an embedding table.

    Attributes:
      leaf: number of the leaf among the parameters.
      operand: value number of the layer's input, or of the indices.
      position: position of the leaf among the op's two operands, 0 or 1.
      axes: the leaf's axes that the layer contracts, ascending; None for a table.
      contract: the input's contracted axes, in the order of `axes`.
      fixed: whether the operand depends on no adapted leaf, so that it is the same at every inner step.
      rows: number of rows of one user's operand (examples, times tokens).
      width, outputs: input and output width of the layer; for a table, its number of rows and their width.
      clip: whether out-of-range indices are clipped to the table.
    """

    leaf: int
    operand: int
    position: int
    axes: tuple[int, ...] | None
    contract: tuple[int, ...]
    fixed: bool
    rows: int
    width: int
    outputs: int
    clip: bool

    def inputs(self, operand: jax.Array) -> jax.Array:
        """Reshape the operand to `[rows, in]`, or return the row numbers `[rows]` of a look-up."""
        if self.axes is None:
            flat = operand.reshape(-1)
            inside = (flat >= 0) & (flat < self.width)
            return jnp.clip(flat, 0, self.width - 1) if self.clip else jnp.where(inside, flat, self.width)
        last = range(operand.ndim - len(self.contract), operand.ndim)
        return jnp.moveaxis(operand, self.contract, tuple(last)).reshape(self.rows, self.width)

    def flat(self, output: jax.Array) -> jax.Array:
        """Reshape the layer's output, or its gradient, to `[rows, out]`."""
        if self.axes is not None and self.position == 0:
            return output.reshape(self.outputs, self.rows).T
        return output.reshape(self.rows, self.outputs)

    def unflat(self, flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Reshape `[rows, out]` to the shape of the layer's output."""
        return (flat.T if self.axes is not None and self.position == 0 else flat).reshape(shape)

    def gram(self, inputs: jax.Array, basis: jax.Array, precision: Any) -> jax.Array:
        """Compute `inputs basis^T`, `[rows, rank]`; for a table, 1 where both are the same row number."""
        if self.axes is None:
            return ((inputs[:, None] == basis) & (inputs < self.width)[:, None]).astype(jnp.float32)
        return jnp.matmul(inputs, basis.T, precision=precision)


class Roles(NamedTuple):
    """How a program uses its adapted leaves.

    Attributes:
      sites: op position -> its site, for leaves that are used only at sites of one kind.
      reasons: leaf -> why it needs explicit per-user values.
    """

    sites: dict[int, Site]
    reasons: dict[int, str]


def model(apply: Apply, params: Params, features: Features, adapted: Sequence[int]) -> Program:
    """Trace `apply` for one user's `features`; `adapted` holds the numbers of the adapted leaves."""
    shapes = jax.tree.map(lambda a: spec(a, jnp.shape(a)), (params, features))
    return trace(apply, *shapes, opened=adapted)


def roles(program: Program, adapted: Sequence[int]) -> Roles:
    """Find the adapted leaves that are used only as a layer's weight or only as a table."""
    number = {program.inputs[0][leaf]: leaf for leaf in adapted}
    moving = program.dependents(list(number))
    uses_of: dict[int, list[tuple[int, Site]]] = {leaf: [] for leaf in adapted}
    reasons: dict[int, str] = {
        number[a]: "it is returned" for a in program.outputs if isinstance(a, int) and a in number
    }
    for at, op in enumerate(program.ops):
        for position, atom in enumerate(op.inputs):
            if not isinstance(atom, int) or atom not in number:
                continue
            leaf = number[atom]
            partners = [a for a in op.inputs if isinstance(a, int) and a in number]
            site = _site(program, op, position, leaf, moving) if len(partners) == 1 else None
            if site is None:
                reasons[leaf] = f"it enters `{op.eqn.primitive.name}`, not as the weight of a matrix product"
            else:
                uses_of[leaf].append((at, site))
    sites: dict[int, Site] = {}
    for leaf, uses in uses_of.items():
        if len({site.axes for _, site in uses}) > 1:
            reasons[leaf] = "it is used in two ways"
        elif not uses:
            reasons.setdefault(leaf, "it is not used")
        if leaf not in reasons:
            sites.update(uses)
    return Roles(sites, reasons)


def _site(program: Program, op: Op, position: int, leaf: int, moving: set[int]) -> Site | None:
    """Return the site if the op is a dense layer or a look-up of the leaf, else None."""
    other = op.inputs[1 - position] if len(op.inputs) == 2 else None
    if not isinstance(other, int) or other == op.inputs[position]:
        return None
    shape = program.shapes[op.inputs[position]].shape
    fixed, size = other not in moving, math.prod(program.shapes[other].shape)
    if op.eqn.primitive.name == "dot_general":
        contract, batch = op.eqn.params["dimension_numbers"]
        if batch[0] or not contract[0] or not math.prod(shape):
            return None
        pairs = sorted(zip(contract[position], contract[1 - position], strict=True))
        axes, input_axes = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
        width = math.prod(shape[a] for a in axes)
        outputs = math.prod(shape) // width
        return Site(leaf, other, position, axes, input_axes, fixed, size // width, width, outputs, False)
    if op.eqn.primitive.name == "gather" and position == 0 and _is_lookup(op, program, shape):
        clip = op.eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP
        return Site(leaf, other, position, None, (), fixed, size, shape[0], math.prod(shape[1:]), clip)
    return None


def _is_lookup(op: Op, program: Program, shape: tuple[int, ...]) -> bool:
    """Return whether a gather reads whole rows of a table: `table[indices]`."""
    numbers, indices = op.eqn.params["dimension_numbers"], program.shapes[op.inputs[1]]
    rank = len(op.eqn.outvars[0].aval.shape)
    return (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and indices.shape[-1:] == (1,)
        and tuple(op.eqn.params["slice_sizes"]) == (1, *shape[1:])
        and tuple(numbers.offset_dims) == tuple(range(rank - len(shape) + 1, rank))
    )


class Linearity(NamedTuple):
    """How an optimiser updates one leaf.

    Attributes:
      own: whether its updates depend on no other leaf.
      linear: whether its updates are linear in the gradients.
    """

    own: bool
    linear: bool


def linearity(optimizer: optax.GradientTransformation, params: Params, steps: int) -> list[Linearity]:
    """Test whether each leaf's updates are `sum_j c_kj g_j` with `c` independent of gradients and parameters.

    Traces `steps` optimiser steps. Between a gradient and an update the jaxpr may have only sums, and products with
    values that depend on no gradient or parameter. A few steps are enough, since all run the same code.
    """
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1,) * jnp.ndim(w), jnp.result_type(w)), params)

    def updates(start: Params, gradients: list[Params]) -> list[Params]:
        state, out = optimizer.init(start), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, start)
            out.append(update)
        return out

    program = trace(updates, shapes, [shapes] * steps)
    start_leaves, gradients = program.inputs
    count = len(start_leaves)
    kinds: dict[int, tuple[bool, frozenset[int]]] = {n: (False, frozenset([i])) for i, n in enumerate(start_leaves)}
    kinds.update({n: (True, frozenset([i % count])) for i, n in enumerate(gradients)})
    for op in program.ops:
        kind = _kind(op, [_atom_kind(atom, kinds) for atom in op.inputs])
        kinds.update({n: kind for n in op.outputs})
    results = [Linearity(True, True)] * count
    for i, atom in enumerate(program.outputs):
        linear, leaves = _atom_kind(atom, kinds) or (True, frozenset())
        before, own = results[i % count], leaves <= {i % count}
        same = isinstance(atom, int) and program.shapes[atom].shape == program.shapes[start_leaves[i % count]].shape
        results[i % count] = Linearity(before.own and own, before.linear and own and linear and (same or not leaves))
    if all(not result.linear for result in results):
        return results
    actual = jax.tree.map(lambda w: jax.ShapeDtypeStruct(jnp.shape(w), jnp.result_type(w)), params)
    at_size = trace(updates, actual, [actual] * steps)
    if _numbers(at_size) != _numbers(program):  # a rule that depends on shapes, such as scaling by fan-in
        return [result._replace(linear=False) for result in results]
    return results


def _numbers(program: Program) -> list[Any]:
    """Return the scalar literals of a program, in order."""
    return [float(a.val) for op in program.ops for a in op.inputs if isinstance(a, jex.Literal) and not jnp.ndim(a.val)]


# A value's kind is None for a constant, else (whether it is linear in the gradients, the leaves it depends on).
_ZERO = (True, frozenset[int]())


def _atom_kind(atom: Any, kinds: dict[int, Any]) -> Any:
    if isinstance(atom, int):
        return kinds.get(atom)
    value = atom.val
    return (
        _ZERO if jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.floating) and value == 0 else None
    )


def _kind(op: Op, kinds: list[Any]) -> Any:
    """Return the kind of an op's outputs from those of its inputs."""
    name = op.eqn.primitive.name
    moving = [k for k in kinds if k is not None and k != _ZERO]
    leaves = frozenset().union(*(k[1] for k in moving))
    linear = all(k[0] for k in moving)
    additive = name in ("add", "sub", "add_any") or (name == "select_n" and kinds[0] is None)
    if name in _LINEAR_UNARY and len(kinds) == 1:
        same = jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.floating)
        return kinds[0] if same or not moving else (False, leaves)
    if additive:
        terms = kinds[1:] if name == "select_n" else kinds
        if not moving:
            return _ZERO if all(k == _ZERO for k in terms) else None
        return (linear and all(k is not None for k in terms), leaves)
    if name == "mul" and (kinds[0] is None or kinds[1] is None or _ZERO in kinds):
        return _ZERO if _ZERO in kinds else ((linear, leaves) if moving else None)
    if name == "div" and kinds[1] is None:
        return kinds[0]
    return (False, leaves) if moving else None
