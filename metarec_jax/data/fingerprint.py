"""Fingerprint: a content hash of a dataset."""

import hashlib
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset


def fingerprint(data: Dataset) -> str:
    """Hash a dataset's interactions, ids and encoded attributes.

    The name and the cleaning report do not count.

    Returns:
      12 hexadecimal digits, the same on every machine.
    """
    digest = hashlib.sha256()
    arrays: dict[str, Any] = {"user": data.user, "item": data.item, "rating": data.rating, "timestamp": data.timestamp}
    arrays |= {"users": data.users.ids, "items": data.items.ids}
    arrays |= {f"user/{name}": table for name, table in data.user_features.items()}
    arrays |= {f"item/{name}": table for name, table in data.item_features.items()}
    arrays |= {f"context/{name}": table for name, table in data.context_features.items()}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"))  # machine-independent byte order
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:12]
