"""The same interactions with items as tasks: what strategies for cold items are trained and judged on."""

from dataclasses import replace

from metarec_jax.data.dataset import Dataset


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
