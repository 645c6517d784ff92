"""What a result was measured on, in words and as a short hash: results with the same hash may be compared."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.tasks.candidates import Among

VERSION = 1  # of the metrics' definitions and of the way tasks are drawn; a change of either is a new number


def describe(
    data: Dataset,
    protocol: Any,
    *,
    seeds: Sequence[int],
    support: Sequence[int | None] = (None,),
    candidates: Among = "query",
) -> dict[str, Any]:
    """Everything that a result depends on besides the learner, as plain values with a `hash` of them all.

    Args:
      data: the dataset.
      protocol: a frozen dataclass with `split`, such as `ColdUsers`.
      seeds: of the splits.
      support: largest support sizes; None is all that a user has.
      candidates: among what the queries are ranked.
    """
    found = {
        "data": data.name,
        "content": fingerprint(data),
        "protocol": type(protocol).__name__,
        "settings": json.loads(json.dumps(asdict(protocol))),  # tuples become lists, as they are once read back
        "seeds": [int(seed) for seed in seeds],
        "support": [None if size is None else int(size) for size in support],
        "candidates": candidates,
        "version": VERSION,
    }
    content = {key: value for key, value in found.items() if key != "data"}
    return found | {"hash": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]}


def in_words(described: dict[str, Any]) -> str:
    """One line for people, the hash in front."""
    settings = ", ".join(f"{name}={value}" for name, value in described["settings"].items())
    seeds = described["seeds"]
    consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    shown = f"{seeds[0]} to {seeds[-1]}" if consecutive and len(seeds) > 1 else ", ".join(map(str, seeds))
    among = (
        described["candidates"] if isinstance(described["candidates"], str) else f"{described['candidates']} sampled"
    )
    what = f"{described['protocol']}({settings}), candidates {among}"
    return f"[{described['hash']}] {described['data']}, {what}, splits {shown}"
