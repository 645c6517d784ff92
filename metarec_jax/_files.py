"""Atomic file writes."""

import os
from pathlib import Path

import numpy as np


def write_whole(path: Path, content: bytes | np.ndarray) -> None:
    """Write bytes or an array (as .npy) to `path` atomically: sync a temporary file to disk, then rename it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
