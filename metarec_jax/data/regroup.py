"""Tasks other than users: items, merchants, segments, a user on one device or in one session."""

from dataclasses import replace
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary
from metarec_jax.errors import DataError


def by_item(data: Dataset) -> Dataset:
    """The dataset with users and items exchanged.

    Its "users", the tasks, are the items, and their attributes are the tasks' own; its "items" are the users, who have
    no titles. Every protocol, field and metric works as before: `ColdUsers` then splits cold items, and
    `ItemStatistics` tells what the training items' ratings say of a user.
    """
    return replace(
        data,
        name=f"{data.name} by item",
        user=data.item,
        item=data.user,
        users=data.items,
        items=data.users,
        user_fields=data.item_fields,
        user_features=data.item_features,
        item_fields=data.user_fields,
        item_features=data.user_features,
        titles=None,
        truth=None if data.truth is None else data.truth.T,
    )


def by_key(data: Dataset, *keys: str | np.ndarray) -> Dataset:
    """The dataset with one task for each value of a key, or for each combination of several; items stay what is scored.

    Where every task holds interactions of one user, as `by_key(data, "user", "context/device")`, the user's attributes
    are the task's. Else they are contexts of the interactions, `context/user/NAME`, because they differ within a task.
    The keys' own fields are left out: a new task's would be unknown. Interactions whose key is unknown are dropped, and
    `report["without a key"]` counts them. Tasks of one user are split like others; `TimeSplit` keeps their times apart.

    Args:
      data: the dataset; for items as tasks see `by_item`.
      *keys: each "user", a categorical field as "item/merchant", "user/segment" or "context/session", or raw values
        `[interactions]`, integers or strings.

    Raises:
      DataError: an unknown or other field, values of another length, no interaction with a key, or two combinations
        that read alike.
      ValueError: no key.
    """
    if not keys:
        raise ValueError('by_key needs a key, for instance by_key(data, "item/merchant")')
    parts = [_rows(data, key) for key in keys]
    kept = np.flatnonzero(np.all([rows != UNKNOWN for rows, _ in parts], 0))
    if not len(kept):
        raise DataError(f"{data.name}: no interaction has a value of the key {_name(keys)}")
    group, names = np.zeros(len(kept), np.int64), np.array([""])
    for i, (rows, ids) in enumerate(parts):
        pairs, group = np.unique(group * (len(ids) + 1) + rows[kept], return_inverse=True)
        before, last = np.divmod(pairs, len(ids) + 1)
        own = ids[last - 1]
        names = own if i == 0 else np.char.add(np.char.add(names[before].astype(str), "/"), own.astype(str))
    tasks = Vocabulary.of(names, _name(keys))
    if len(tasks) != len(names) + 1:
        raise DataError(f"{data.name}: two combinations of {_name(keys)} read alike; give the combinations as one key")
    task, user = tasks.encode(names)[group], data.user[kept]
    owner = np.zeros(len(tasks), user.dtype)
    owner[task] = user
    own_user = bool((owner[task] == user).all())

    def read(source: str, fields: tuple[Field, ...]) -> tuple[Field, ...]:
        return tuple(f for f in fields if f"{source}/{f.name}" not in named)

    named = {key for key in keys if isinstance(key, str)}
    user_fields, item_fields = read("user", data.user_fields), read("item", data.item_fields)
    context_fields = read("context", data.context_fields)
    contexts = {f.name: data.context_features[f.name][kept] for f in context_fields}
    if not own_user:
        context_fields += tuple(replace(f, name=f"user/{f.name}") for f in user_fields)
        contexts |= {f"user/{f.name}": data.user_features[f.name][user] for f in user_fields}
        user_fields = ()
    return replace(
        data,
        name=f"{data.name} by {_name(keys)}",
        user=task,
        item=data.item[kept],
        rating=data.rating[kept],
        timestamp=data.timestamp[kept],
        users=tasks,
        user_fields=user_fields,
        user_features={f.name: data.user_features[f.name][owner] for f in user_fields},
        item_fields=item_fields,
        item_features={f.name: data.item_features[f.name] for f in item_fields},
        context_fields=context_fields,
        context_features=contexts,
        report=data.report | {"without a key": len(data.user) - len(kept)},
        truth=data.truth[owner] if own_user and data.truth is not None else None,
    )


def _name(keys: tuple[str | np.ndarray, ...]) -> str:
    return " and ".join(key if isinstance(key, str) else "key" for key in keys)


def _rows(data: Dataset, key: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A key's row `[interactions]`, 0 where it is unknown, and the raw values of the rows from 1 on."""
    if not isinstance(key, str):
        found = Vocabulary.of(key, "key")
        if len(rows := found.encode(key)) != len(data.user):
            raise DataError(f"by_key: got {len(rows)} values of a key for {len(data.user)} interactions")
        return rows, found.ids
    if key == "user":
        return data.user, data.users.ids
    source, _, name = key.partition("/")
    tables: dict[str, tuple[tuple[Field, ...], dict[str, np.ndarray], Any]] = {
        "item": (data.item_fields, data.item_features, data.item),
        "user": (data.user_fields, data.user_features, data.user),
        "context": (data.context_fields, data.context_features, slice(None)),
    }
    fields, features, position = tables.get(source, ((), {}, slice(None)))
    field = next((f for f in fields if f.name == name), None)
    if field is None or field.kind != "categorical" or field.vocabulary is None:
        known = ["user", *(f"{s}/{f.name}" for s, (fs, *_) in tables.items() for f in fs if f.kind == "categorical")]
        raise DataError(f"by_key: {key!r} is no categorical field; there are {', '.join(known)}")
    vocabulary = field.vocabulary
    return features[name][position], vocabulary.decode(np.arange(1, len(vocabulary)))
