"""Staged: a function split by what its values depend on, so that the part that stays the same is computed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metarec_jax.core._trace import trace


class Staged(NamedTuple):
    """`f(shared, items, user)` in two stages, of which the second reads what the first has computed.

    Attributes:
      first: `first(shared, items) -> (of shared, of items)`: all that no value of `user` enters, as two lists of
        arrays: those computed from `shared` alone, and those that `items` enters.
      second: `second(of shared, of items, user)` is `f(shared, items, user)`.
      widest: values of the largest array that `second` computes.
    """

    first: Callable[[Any, Any], tuple[list[jax.Array], list[jax.Array]]]
    second: Callable[[list[jax.Array], list[jax.Array], Any], Any]
    widest: int


def staged(function: Callable[[Any, Any, Any], Any], shared: Any, items: Any, user: Any) -> Staged:
    """Splits `function(shared, items, user)` at the last values that do not depend on `user`.

    Read from its jaxpr: nobody has to say which half of a network is the item tower. Both stages may be transformed
    by `jit` and `vmap`; shapes are those given here.

    Args:
      function: pure.
      shared, items, user: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    program = trace(function, shared, items, user)
    of_shared, of_items, of_user = program.inputs
    by_user, by_items = program.dependents(of_user), program.dependents(of_items)
    early = [i for i, op in enumerate(program.ops) if not by_user.intersection(op.outputs)]
    late = [i for i, op in enumerate(program.ops) if by_user.intersection(op.outputs)]
    read = [atom for i in late for atom in program.ops[i].inputs] + program.outputs
    needed = sorted({atom for atom in read if isinstance(atom, int) and atom not in by_user})
    fixed, tiled = ([n for n in needed if (n in by_items) is inside] for inside in (False, True))

    def first(shared: Any, items: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        env = dict(program.consts)
        env.update(zip(of_shared + of_items, jax.tree.leaves((shared, items)), strict=True))
        program.run(early, env, {})
        return [env[n] for n in fixed], [env[n] for n in tiled]

    def second(values: list[jax.Array], item_values: list[jax.Array], user: Any) -> Any:
        env = dict(zip(fixed + tiled, [*values, *item_values], strict=True))
        env.update(zip(of_user, jax.tree.leaves(user), strict=True))
        program.run(late, env, {})
        return program.result(env)

    sizes = [program.shapes[n].size for i in late for n in program.ops[i].outputs if n in program.shapes]
    return Staged(first, second, max(sizes, default=1))
