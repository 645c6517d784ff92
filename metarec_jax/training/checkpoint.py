"""Checkpoint: the state of a training between two epochs as one file, from which it resumes exactly."""

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
    """Write arrays (any pytree), plain values and the training's setting to a file, atomically."""
    leaves = {str(i): np.array(leaf, order="C") for i, leaf in enumerate(jax.tree.leaves(arrays))}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, save(leaves, {"state": json.dumps(state), "setting": json.dumps(setting)}))


def read(path: str | Path, like: Any, setting: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Read the arrays, in the structure of `like`, and the plain values; return None if there is no file yet.

    Raises:
      ModelFileError: a damaged file, or one of a training with another setting, strategy, model or optimiser.
    """
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, "np") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state, saved_setting = json.loads(head["state"]), json.loads(head["setting"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelFileError(f"{path}: not a checkpoint, or damaged ({error}); delete it to start anew") from error
    if saved_setting != (current := json.loads(json.dumps(setting))):
        different = sorted(k for k in {*saved_setting, *current} if saved_setting.get(k) != current.get(k))
        raise ModelFileError(
            f"{path} belongs to a training with another {', '.join(different)}; use the same, another file, "
            "or delete it"
        )
    leaves, tree = jax.tree.flatten(like)
    arrays = [tensors.get(str(i)) for i in range(len(leaves))]
    fits = all(a is not None and a.shape == np.shape(leaf) for a, leaf in zip(arrays, leaves, strict=True))
    if len(tensors) != len(leaves) or not fits:
        raise ModelFileError(f"{path} belongs to another strategy, model or optimiser; use another file, or delete it")
    return jax.tree.unflatten(tree, arrays), state
