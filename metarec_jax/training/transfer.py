"""Transfer between datasets: parameters carried over by what their rows mean, not by where they stand."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary
from metarec_jax.types import Params


def carry_over(
    source: Params,
    fresh: Params,
    known: Mapping[str, Field],
    fields: Mapping[str, Field],
    shared: Collection[str] | None = None,
) -> Params:
    """`fresh`, with what `source` knows written over it.

    An array that belongs to a field with a vocabulary is a table: the rows of the raw values that both vocabularies
    have are carried over, and the unknown row; the others stay fresh. A field is known by its name among the keys of
    the array's path; rows are the last axis but one. Any other array is carried over whole. One that the source does
    not have in this shape, because one of the two has other fields, stays fresh: the first layer, for instance. Dense
    fields are carried over as they are, standardised by each dataset's own mean and scale.

    Args:
      source: parameters that were trained on other data.
      fresh: initial parameters for the new data, from the same strategy and model.
      known: fields of the source's data, by name (`metarec_jax.models.fields_of`).
      fields: fields of the new data.
      shared: the fields whose raw values mean the same in both (default: all that both have). Of other tables only the
        unknown row is carried over.

    Raises:
      ValueError: the parameters are not those of one strategy and model; the fields that both have come in another
        order; or `shared` names a field that one of them has not.
    """
    common = known.keys() & fields.keys()
    if wrong := set(shared or ()) - common:
        raise ValueError(f"shared: {sorted(wrong)} not in both datasets; they share {', '.join(sorted(common))}")
    if [name for name in known if name in common] != [name for name in fields if name in common]:
        raise ValueError(
            f"the fields come as {[*known]} and as {[*fields]}; layers read them in order: give them in one"
        )
    names, same = known.keys() | fields.keys(), common if shared is None else set(shared)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(params)) for params in (source, fresh))
    fixed = {path for path in before.keys() ^ after.keys() if _field(path, names) is None}
    if fixed:
        raise _unlike(min(map(jax.tree_util.keystr, fixed)))

    def carried(path: tuple[Any, ...], new: jax.Array) -> jax.Array:
        field, old = _field(path, names), before.get(path)
        if old is None or (field is not None and field not in common):
            return new
        if field is not None and _is_table(old, known[field]) and _is_table(new, fields[field]):
            if old.shape[:-2] != new.shape[:-2] or old.shape[-1] != new.shape[-1]:
                raise _unlike(jax.tree_util.keystr(path))
            theirs, ours = _rows(known[field].vocabulary, fields[field].vocabulary if field in same else None)
            return jnp.asarray(new).at[..., ours, :].set(jnp.asarray(old)[..., theirs, :])
        if old.shape != new.shape and field is None and known.keys() == fields.keys():
            raise _unlike(jax.tree_util.keystr(path))
        return jnp.asarray(old) if old.shape == new.shape else new

    return jax.tree_util.tree_map_with_path(carried, fresh)


def _field(path: tuple[Any, ...], names: Collection[str]) -> str | None:
    """The field that an array belongs to."""
    return next((key.key for key in path if getattr(key, "key", None) in names), None)


def _is_table(array: jax.Array, field: Field) -> bool:
    return field.kind != "dense" and array.ndim > 1 and array.shape[-2] == field.size


def _rows(known: Vocabulary | None, new: Vocabulary | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the values that both have, in the one and in the other; the unknown row is always among them."""
    if known is None or new is None or known.ids.dtype.kind != new.ids.dtype.kind:
        return np.full(1, UNKNOWN), np.full(1, UNKNOWN)
    if known.buckets is not None and known.buckets == new.buckets:  # the same hashes
        return np.arange(len(known)), np.arange(len(new))
    _, theirs, ours = np.intersect1d(known.ids, new.ids, assume_unique=True, return_indices=True)
    return np.append(UNKNOWN, theirs + 1), np.append(UNKNOWN, ours + 1)


def _unlike(path: str) -> ValueError:
    return ValueError(
        f"the parameters to start from do not fit at {path}; strategy and model, with their options, must be "
        "those that they were trained with"
    )
