"""Fingerprint: a content hash of a dataset."""

import hashlib
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.schema import CONTEXT, ITEM, USER, prefixed


def fingerprint(data: Dataset) -> str:
    """Hash a dataset's interactions, ids and encoded attributes.

    The name and the cleaning report do not count.

    Returns:
      12 hexadecimal digits, the same on every machine.

    Example:
      >>> data = mr.data.from_tables({"user_id": [1, 1], "item_id": [7, 8], "rating": [5, 3]}, name="shop")
      >>> mr.evaluation.fingerprint(data)
      '63925d1df6de'
    """
    digest = hashlib.sha256()
    arrays: dict[str, Any] = {"user": data.user, "item": data.item, "rating": data.rating, "timestamp": data.timestamp}
    arrays |= {"users": data.users.ids, "items": data.items.ids}
    arrays |= prefixed(USER, data.user_features)
    arrays |= prefixed(ITEM, data.item_features)
    arrays |= prefixed(CONTEXT, data.context_features)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)  # machine-independent byte order
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        if array.nbytes:
            digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()[:12]
