"""What several tests of the data package share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from metarec_jax.data.dataset import Dataset

SameData = Callable[[Dataset, Dataset], None]


@pytest.fixture
def table() -> dict[str, np.ndarray]:
    """Five ratings of three users and four items."""
    return {
        "user_id": np.array([10, 10, 20, 30, 30]),
        "item_id": np.array([7, 5, 7, 9, 6]),
        "rating": np.array([4.0, 2.0, 5.0, 3.5, 1.0]),
        "timestamp": np.array([100, 200, 300, 400, 500]),
    }


@pytest.fixture
def assert_same_data() -> SameData:
    """Compares everything in two datasets but their names."""

    def check(a: Dataset, b: Dataset) -> None:
        for name in ("user", "item", "rating", "timestamp"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(x, y, err_msg=name)
        assert a.users.ids.tolist() == b.users.ids.tolist()
        assert a.items.ids.tolist() == b.items.ids.tolist()
        assert [(f.name, f.kind) for f in a.user_fields] == [(f.name, f.kind) for f in b.user_fields]
        assert [(f.name, f.kind) for f in a.item_fields] == [(f.name, f.kind) for f in b.item_fields]
        for x, y in ((a.user_features, b.user_features), (a.item_features, b.item_features)):
            assert x.keys() == y.keys()
            for name in x:
                assert x[name].dtype == y[name].dtype, name
                np.testing.assert_array_equal(x[name], y[name], err_msg=name)
        assert (a.titles is None) == (b.titles is None)
        if a.titles is not None and b.titles is not None:
            assert a.titles.tolist() == b.titles.tolist()
        assert a.report == b.report

    return check


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[..., Path]:
    """Writes texts into a folder of that name."""

    def write(name: str, files: dict[str, str], encoding: str = "latin-1") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_bytes(text.encode(encoding))
        return folder

    return write
