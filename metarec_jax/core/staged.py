"""Staging: split a function into a part that does not depend on the user, computed once, and the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metarec_jax.core._trace import trace


class Staged(NamedTuple):
    """A function `f(shared, items, user)` in two stages; the second reads the results of the first.

    Attributes:
      first: `first(shared, items) -> (shared_values, item_values)`, two lists of arrays that do not depend on `user`:
        those computed from `shared` alone, and those that depend on `items`.
      second: `second(shared_values, item_values, user)` equals `f(shared, items, user)`.
      widest: number of elements of the largest array that `second` computes.
    """

    first: Callable[[Any, Any], tuple[list[jax.Array], list[jax.Array]]]
    second: Callable[[list[jax.Array], list[jax.Array], Any], Any]
    widest: int


def staged(function: Callable[[Any, Any, Any], Any], shared: Any, items: Any, user: Any) -> Staged:
    """Split `function(shared, items, user)` at the last values that do not depend on `user`.

    The split is read from the jaxpr, so the item tower of a network need not be declared. Both stages support `jit` and
    `vmap`, for the shapes given here.

    Args:
      function: a pure function.
      shared, items, user: its arguments, pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    program = trace(function, shared, items, user)
    shared_inputs, item_inputs, user_inputs = program.inputs
    by_user, by_items = program.dependents(user_inputs), program.dependents(item_inputs)
    early = [i for i, op in enumerate(program.ops) if not by_user.intersection(op.outputs)]
    late = [i for i, op in enumerate(program.ops) if by_user.intersection(op.outputs)]
    read = [atom for i in late for atom in program.ops[i].inputs] + program.outputs
    needed = sorted({atom for atom in read if isinstance(atom, int) and atom not in by_user})
    from_shared, from_items = ([n for n in needed if (n in by_items) is wanted] for wanted in (False, True))

    def first(shared: Any, items: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        env = dict(program.consts)
        env.update(zip(shared_inputs + item_inputs, jax.tree.leaves((shared, items)), strict=True))
        program.run(early, env, {})
        return [env[n] for n in from_shared], [env[n] for n in from_items]

    def second(values: list[jax.Array], item_values: list[jax.Array], user: Any) -> Any:
        env = dict(zip(from_shared + from_items, [*values, *item_values], strict=True))
        env.update(zip(user_inputs, jax.tree.leaves(user), strict=True))
        program.run(late, env, {})
        return program.result(env)

    sizes = [program.shapes[n].size for i in late for n in program.ops[i].outputs if n in program.shapes]
    return Staged(first, second, max(sizes, default=1))
