"""Protocol description: what a result was measured on, as a dict, a line of text and a hash.

Results with the same hash are comparable.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.tasks.candidates import Among

VERSION = 1  # increases when the definition of a metric or the sampling of tasks changes


def describe(
    data: Dataset,
    protocol: Any,
    *,
    seeds: Sequence[int],
    support: Sequence[int | None] = (None,),
    candidates: Among = "query",
) -> dict[str, Any]:
    """Describe everything that a result depends on except the learner, as JSON values with a `hash`.

    Args:
      data: the dataset.
      protocol: a frozen dataclass with `split`, such as `ColdUsers`.
      seeds: seeds of the splits.
      support: largest support sizes; None for all.
      candidates: the items among which queries are ranked.

    Example:
      >>> data = mr.data.from_tables({"user_id": [1, 1], "item_id": [7, 8], "rating": [5, 3]})
      >>> three, four = (mr.evaluation.describe(data, mr.NextItem(minimum=n), seeds=[0]) for n in (3, 4))
      >>> three["protocol"], three["settings"]["minimum"]
      ('NextItem', 3)
      >>> three["hash"] == four["hash"]  # results on other users are not comparable
      False
    """
    description = {
        "data": data.name,
        "content": fingerprint(data),
        "protocol": type(protocol).__name__,
        "settings": json.loads(json.dumps(asdict(protocol))),  # tuples become lists, as after reading JSON
        "seeds": [int(seed) for seed in seeds],
        "support": [None if size is None else int(size) for size in support],
        "candidates": candidates,
        "version": VERSION,
    }
    content = {key: value for key, value in description.items() if key != "data"}
    return description | {"hash": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]}


def in_words(described: dict[str, Any]) -> str:
    """Format a description as one line, the hash first.

    Example:
      >>> data = mr.data.from_tables({"user_id": [1, 1], "item_id": [7, 8], "rating": [5, 3]}, name="shop")
      >>> words = mr.evaluation.in_words(mr.evaluation.describe(data, mr.NextItem(), seeds=[0, 1]))
      >>> words.partition("] ")[2]  # the rest after the hash
      'shop, NextItem(threshold=None, minimum=3, maximum=500), candidates query, splits 0 to 1'
    """
    settings = ", ".join(f"{name}={value}" for name, value in described["settings"].items())
    seeds = described["seeds"]
    consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    shown = f"{seeds[0]} to {seeds[-1]}" if consecutive and len(seeds) > 1 else ", ".join(map(str, seeds))
    among = (
        described["candidates"] if isinstance(described["candidates"], str) else f"{described['candidates']} sampled"
    )
    ranked = f"{described['protocol']}({settings}), candidates {among}"
    return f"[{described['hash']}] {described['data']}, {ranked}, splits {shown}"
