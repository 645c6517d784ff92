"""Transfer between datasets: carry parameters over by the raw values of their rows, not by row number."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.data.fields import Field
from metarec_jax.data.schema import ITEM_ID
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary
from metarec_jax.strategies.weights import DISLIKE_WEIGHT, ITEM_WEIGHT
from metarec_jax.types import Params


def carry_over(
    source: Params,
    fresh: Params,
    known: Mapping[str, Field],
    fields: Mapping[str, Field],
    shared: Collection[str] | None = None,
) -> Params:
    """Return `fresh` with the matching parameters of `source` copied into it.

    An array of a field with a vocabulary is a table, whose rows are the last axis but one; the item weights of
    closed-form rankers (`metarec_jax.strategies.weights`) are one of the items. The rows of raw values in
    both vocabularies, and the unknown row, are copied; the other rows stay fresh. An array belongs to the field whose
    name is among the keys of its path. Any other array is copied whole if the shapes agree. If they differ because the
    fields differ, as in the first layer, it stays fresh. Parameters of dense fields are copied as they are; each
    dataset standardises these fields by its own mean and scale.

    Args:
      source: parameters trained on other data.
      fresh: initial parameters for the new data, from the same strategy and model.
      known: fields of the source's data, by name (`metarec_jax.models.fields_of`).
      fields: fields of the new data.
      shared: fields whose raw values mean the same in both datasets (default: all common fields). Other tables get only
        the unknown row.

    Raises:
      ValueError: parameters of another strategy or model; common fields in another order; a name in `shared` that is
        not a common field.
    """
    common = known.keys() & fields.keys()
    if wrong := set(shared or ()) - common:
        raise ValueError(f"shared: {sorted(wrong)} not in both datasets; they share {', '.join(sorted(common))}")
    if [name for name in known if name in common] != [name for name in fields if name in common]:
        raise ValueError(
            f"the fields are ordered as {[*known]} and as {[*fields]}; layers read them in order: give both the same"
        )
    names, comparable = known.keys() | fields.keys(), common if shared is None else set(shared)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(params)) for params in (source, fresh))
    for path in sorted(before.keys() ^ after.keys(), key=jax.tree_util.keystr):
        if _field(path, names) is None:
            raise _mismatch(path, before.get(path), after.get(path))

    def carried(path: tuple[Any, ...], new: jax.Array) -> jax.Array:
        if path in before and ITEM_ID in common and _is_item_weight(path, after.keys()):
            return table(path, ITEM_ID, before[path][..., None], new[..., None])[..., 0]
        return table(path, _field(path, names), before.get(path), new)

    def table(path: tuple[Any, ...], field: str | None, old: jax.Array | None, new: jax.Array) -> jax.Array:
        if old is None or (field is not None and field not in common):
            return new
        if field is not None and _is_table(old, known[field]) and _is_table(new, fields[field]):
            if old.shape[:-2] != new.shape[:-2] or old.shape[-1] != new.shape[-1]:
                raise _mismatch(path, old, new)
            source_rows, rows = _rows(
                known[field].vocabulary, fields[field].vocabulary if field in comparable else None
            )
            return jnp.asarray(new).at[..., rows, :].set(jnp.asarray(old)[..., source_rows, :])
        if old.shape != new.shape and field is None and known.keys() == fields.keys():
            raise _mismatch(path, old, new)
        return jnp.asarray(old) if old.shape == new.shape else new

    return jax.tree_util.tree_map_with_path(carried, fresh)


def _field(path: tuple[Any, ...], names: Collection[str]) -> str | None:
    """Return the name of the field that an array belongs to, or None."""
    return next((key.key for key in path if getattr(key, "key", None) in names), None)


def _is_table(array: jax.Array, field: Field) -> bool:
    return field.kind != "dense" and array.ndim > 1 and array.shape[-2] == field.size


def _rows(known: Vocabulary | None, new: Vocabulary | None) -> tuple[np.ndarray, np.ndarray]:
    """Return matching rows of two vocabularies; the unknown row is always among them."""
    if known is None or new is None or known.ids.dtype.kind != new.ids.dtype.kind:
        return np.full(1, UNKNOWN), np.full(1, UNKNOWN)
    if known.buckets is not None and known.buckets == new.buckets:  # the same hashes
        return np.arange(len(known)), np.arange(len(new))
    _, known_rows, new_rows = np.intersect1d(known.ids, new.ids, assume_unique=True, return_indices=True)
    return np.append(UNKNOWN, known_rows + 1), np.append(UNKNOWN, new_rows + 1)


def _is_item_weight(path: tuple[Any, ...], paths: Collection[Any]) -> bool:
    """Return whether this is the array of item weights that `strategies.weights.example_weights` makes."""
    key, parent = jax.tree_util.DictKey, path[:-1]
    return path[-1:] == (key(ITEM_WEIGHT),) and (*parent, key(DISLIKE_WEIGHT)) in paths


def _mismatch(path: tuple[Any, ...], old: jax.Array | None, new: jax.Array | None) -> ValueError:
    shapes = [None if x is None else x.shape for x in (old, new)]
    there, here = ("it is missing" if shape is None else f"it has the shape {shape}" for shape in shapes)
    return ValueError(
        f"start does not fit at {jax.tree_util.keystr(path)}: {there} in start, {here} in this training; strategy and "
        "model, with their options, must be those of start (start.trained.recipe names them; the default members of a "
        "stack depend on the size of the catalogue)"
    )
