"""Regroup interactions into other tasks than users: items, merchants, segments, sessions."""

from dataclasses import replace
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import CONTEXT, ITEM, USER
from metarec_jax.data.vocabulary import UNKNOWN, Vocabulary
from metarec_jax.errors import DataError


def by_item(data: Dataset) -> Dataset:
    """Swap users and items, so that each item is a task.

    The task attributes are those of the item. The new "items" are the users; they have no titles. Protocols, fields and
    metrics work unchanged: `ColdUsers` then splits cold items, and `ItemStatistics` summarises a user's ratings of the
    training items.

    Example:
      >>> plays = {"user_id": ["ann", "ann", "bob"], "item_id": ["tea", "rye", "tea"]}
      >>> by_item = mr.data.by_item(mr.data.from_tables(plays))
      >>> by_item.users.ids.tolist(), by_item.items.ids.tolist()
      (['rye', 'tea'], ['ann', 'bob'])
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
    """Group interactions into one task for each value of a key, or for each combination of several keys.

    Items remain the candidates. If every task holds interactions of one user, as in `by_key(data, "user",
    "context/device")`, the user's attributes become those of the task. Otherwise user attributes vary within a task and
    become context fields `context/user/NAME`. Fields used as keys are dropped, since their value would be unknown for a
    new task. Interactions with an unknown key are dropped and counted in `report["without a key"]`. Tasks of the same
    user may fall into different splits; `TimeSplit` still separates them in time.

    Args:
      data: the dataset; for items as tasks see `by_item`.
      *keys: each "user", a categorical field such as "item/merchant", "user/segment" or "context/session", or raw
        values `[interactions]`, integers or strings.

    Raises:
      DataError: a key is unknown or not categorical, has a wrong length, or is unknown in every interaction; or two
        combinations of values have the same name.
      ValueError: no key is given.

    Example:
      >>> plays = {"user_id": ["ann", "ann", "bob"], "item_id": ["tea", "rye", "tea"], "device": ["phone", "tv", "tv"]}
      >>> data = mr.data.from_tables(plays, context=["device"])
      >>> mr.data.by_key(data, "context/device").users.ids.tolist()
      ['phone', 'tv']
      >>> mr.data.by_key(data, "user", "context/device").users.ids.tolist()
      ['ann/phone', 'ann/tv', 'bob/tv']
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
        prefix, code = np.divmod(pairs, len(ids) + 1)
        labels = ids[code - 1]
        names = labels if i == 0 else np.char.add(np.char.add(names[prefix].astype(str), "/"), labels.astype(str))
    tasks = Vocabulary.of(names, _name(keys))
    if len(tasks) != len(names) + 1:
        raise DataError(
            f"{data.name}: two combinations of {_name(keys)} read alike when joined by '/'; "
            "pass one array of combined keys"
        )
    task, user = tasks.encode(names)[group], data.user[kept]
    user_of_task = np.zeros(len(tasks), user.dtype)
    user_of_task[task] = user
    single_user = bool((user_of_task[task] == user).all())

    def fields_kept(prefix: str, fields: tuple[Field, ...]) -> tuple[Field, ...]:
        return tuple(f for f in fields if prefix + f.name not in key_names)

    key_names = {key for key in keys if isinstance(key, str)}
    user_fields, item_fields = fields_kept(USER, data.user_fields), fields_kept(ITEM, data.item_fields)
    context_fields = fields_kept(CONTEXT, data.context_fields)
    contexts = {f.name: data.context_features[f.name][kept] for f in context_fields}
    if not single_user:
        context_fields += tuple(replace(f, name=USER + f.name) for f in user_fields)
        contexts |= {USER + f.name: data.user_features[f.name][user] for f in user_fields}
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
        user_features={f.name: data.user_features[f.name][user_of_task] for f in user_fields},
        item_fields=item_fields,
        item_features={f.name: data.item_features[f.name] for f in item_fields},
        context_fields=context_fields,
        context_features=contexts,
        report=data.report | {"without a key": len(data.user) - len(kept)},
        truth=data.truth[user_of_task] if single_user and data.truth is not None else None,
    )


def _name(keys: tuple[str | np.ndarray, ...]) -> str:
    return " and ".join(key if isinstance(key, str) else "key" for key in keys)


def _rows(data: Dataset, key: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a key's row of each interaction `[interactions]`, 0 if unknown, and the raw values of rows 1 and up."""
    if not isinstance(key, str):
        vocabulary_of_key = Vocabulary.of(key, "key")
        if len(rows := vocabulary_of_key.encode(key)) != len(data.user):
            raise DataError(
                f"by_key: got {len(rows)} values of a key for {len(data.user)} interactions; give one for each"
            )
        return rows, vocabulary_of_key.ids
    if key == "user":
        return data.user, data.users.ids
    prefix, slash, name = key.partition("/")
    tables: dict[str, tuple[tuple[Field, ...], dict[str, np.ndarray], Any]] = {
        ITEM: (data.item_fields, data.item_features, data.item),
        USER: (data.user_fields, data.user_features, data.user),
        CONTEXT: (data.context_fields, data.context_features, slice(None)),
    }
    fields, features, position = tables.get(prefix + slash, ((), {}, slice(None)))
    field = next((f for f in fields if f.name == name), None)
    if field is None or field.kind != "categorical" or field.vocabulary is None:
        known = ["user", *(side + f.name for side, (fs, *_) in tables.items() for f in fs if f.kind == "categorical")]
        raise DataError(f"by_key: {key!r} is no categorical field; choose from {', '.join(known)}")
    vocabulary = field.vocabulary
    return features[name][position], vocabulary.decode(np.arange(1, len(vocabulary)))
