"""Checkpoint: a training between two epochs as one file, so that a killed one goes on as if nothing had been."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from metarec_jax._files import write_whole
from metarec_jax.errors import ModelFileError


def write(path: str | Path, arrays: Any, state: dict[str, Any], setting: dict[str, Any]) -> None:
    """Write arrays (any pytree), plain values and the setting that they belong to; the file appears whole."""
    leaves = {str(i): np.array(leaf, order="C") for i, leaf in enumerate(jax.tree.leaves(arrays))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(leaves, {"state": json.dumps(state), "setting": json.dumps(setting)}))


def read(path: str | Path, like: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """The arrays, in the structure of `like`, and the plain values; None where there is no such file yet.

    Raises:
      ModelFileError: a damaged file, or one of a training with another setting, strategy, model or optimiser.
    """
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, "np") as file:
            head = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        state, before = json.loads(head["state"]), json.loads(head["setting"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelFileError(f"{path}: no checkpoint, or a damaged one ({error}); delete it to start anew") from error
    if before != (now := json.loads(json.dumps(setting))):
        other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        raise ModelFileError(
            f"{path} is of a training with another {', '.join(other)}; give the same, another file, or delete it"
        )
    leaves, tree = jax.tree.flatten(like)
    arrays = [found.get(str(i)) for i in range(len(leaves))]
    fits = all(a is not None and a.shape == np.shape(leaf) for a, leaf in zip(arrays, leaves, strict=True))
    if len(found) != len(leaves) or not fits:
        raise ModelFileError(f"{path} is of another strategy, model or optimiser; give another file, or delete it")
    return jax.tree.unflatten(tree, arrays), state
