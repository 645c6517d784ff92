"""Fingerprint: a hash of what a dataset holds."""

import hashlib
from typing import Any

import numpy as np

from metarec_jax.data.dataset import Dataset


def fingerprint(data: Dataset) -> str:
    """Hash of a dataset's content: interactions, ids and encoded attributes; not of its name or its report."""
    digest = hashlib.sha256()
    arrays: dict[str, Any] = {"user": data.user, "item": data.item, "rating": data.rating, "timestamp": data.timestamp}
    arrays |= {"users": data.users.ids, "items": data.items.ids}
    arrays |= {f"user/{name}": table for name, table in data.user_features.items()}
    arrays |= {f"item/{name}": table for name, table in data.item_features.items()}
    arrays |= {f"context/{name}": table for name, table in data.context_features.items()}
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"))  # the same bytes on every machine
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:12]
