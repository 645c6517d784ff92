"""Saving: model folders of JSON and safetensors (no pickle, no code), written atomically, verified on reading."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metarec_jax.data.dataset import Dataset
from metarec_jax.data.fields import Field
from metarec_jax.data.schema import ITEM, prefixed
from metarec_jax.data.vocabulary import Vocabulary
from metarec_jax.errors import ModelFileError
from metarec_jax.inference.stock import Stock
from metarec_jax.types import Params

FORMAT = "metarec_jax model"
FORMAT_VERSION = 1
CONFIG, CATALOGUE, ARRAYS = "model.json", "catalogue.json", "arrays.safetensors"
ARRAYS_OF_FIELD = ("mean", "scale", "knots")


def write(
    path: str | Path,
    config: Mapping[str, Any],
    catalogue: Dataset,
    params: Params,
    stock: Stock,
    parts: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write a model folder; an existing model at `path` is replaced once the new one is complete.

    `parts` write nested models, by subfolder name. The config holds the checksum of each nested config.

    Raises:
      ModelFileError: `path` exists and is not a model.
    """
    path = Path(path)
    if path.exists() and not (path / CONFIG).is_file():
        raise ModelFileError(f"{path} exists and is no model folder; choose another path or remove it")
    arrays = {f"params{jax.tree_util.keystr(p)}": x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    arrays |= prefixed(ITEM, catalogue.item_features)
    known = len(catalogue.items)
    arrays |= {f"added/{name}": table[known:] for name, table in stock.features.items()}
    added = {"ids": stock.added.tolist(), "titles": None if stock.titles is None else stock.titles[known:].tolist()}
    contents = {
        CATALOGUE: json.dumps(_describe(catalogue) | {"added": added}).encode(),
        ARRAYS: save({name: np.array(x, order="C") for name, x in arrays.items()}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        fresh, old = Path(folder) / "fresh", Path(folder) / "old"
        fresh.mkdir(0o700)
        for name, part_of in (parts or {}).items():
            part_of(fresh / name)
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "metarec_jax": version("metarec-jax"),
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
            "parts": {name: hashlib.sha256((fresh / name / CONFIG).read_bytes()).hexdigest() for name in parts or {}},
        }
        contents[CONFIG] = json.dumps(head | dict(config), indent=1).encode()
        for name, content in contents.items():
            (fresh / name).write_bytes(content)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise


def read(path: str | Path) -> tuple[dict[str, Any], Dataset, Stock, dict[str, np.ndarray]]:
    """Read a model folder: config with its `version`, catalogue (without interactions), stock and arrays.

    Raises:
      ModelFileError: no model, a damaged or incomplete one, or one of another format version.
    """
    path = Path(path)
    head = _bytes(path / CONFIG)
    config = _json(head, path / CONFIG)
    if config.get("format") != FORMAT:
        raise ModelFileError(f"{path}: not a model of metarec_jax; save one with Recommender.save(path)")
    if config.get("format_version") != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: written in format {config.get('format_version')} by metarec_jax {config.get('metarec_jax')}, "
            f"this version reads format {FORMAT_VERSION}; load it with that version, or train again"
        )
    contents = {}
    parts = {f"{name}/{CONFIG}": sha256 for name, sha256 in config.get("parts", {}).items()}
    for name, sha256 in (config["sha256"] | parts).items():
        contents[name] = _bytes(path / name)
        if hashlib.sha256(contents[name]).hexdigest() != sha256:
            raise ModelFileError(
                f"{path / name}: damaged or incomplete (its checksum is not the saved one); save again"
            )
    try:
        arrays = load(contents[ARRAYS])
    except SafetensorError as error:
        raise ModelFileError(f"{path / ARRAYS}: cannot be read ({error})") from error
    described = json.loads(contents[CATALOGUE])
    catalogue = _restore(described, arrays)
    added = described.get("added", {"ids": []})
    stock = Stock.of(catalogue)
    if added["ids"]:
        features = {name: arrays[f"added/{name}"] for name in stock.features}
        stock = stock.with_rows(np.array(added["ids"], catalogue.items.ids.dtype.type), features, added["titles"])
    return config | {"version": hashlib.sha256(head).hexdigest()[:12]}, catalogue, stock, arrays


def restore_params(arrays: Mapping[str, np.ndarray], like: Params, path: str | Path) -> Params:
    """Return the parameters in the structure of `like` (shapes from `jax.eval_shape`)."""

    def restore(key_path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        name = f"params{jax.tree_util.keystr(key_path)}"
        if name not in arrays or arrays[name].shape != wanted.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise ModelFileError(
                f"{path}: expected {name} of shape {wanted.shape}, got {found}; the strategy and the model must be "
                "those of the training"
            )
        return arrays[name]

    return jax.tree_util.tree_map_with_path(restore, like)


def restore_tree(arrays: Mapping[str, np.ndarray], name: str, path: str | Path) -> Params:
    """Return the dicts and lists of arrays that `write` stored under `name`."""
    tree: Any = {}
    for key, value in arrays.items():
        if not key.startswith(name):
            continue
        node, keys = tree, [json.loads(k.replace("'", '"')) for k in re.findall(r"\[([^\]]*)\]", key[len(name) :])]
        for k in keys[:-1]:
            node = node.setdefault(k, {})
        node[keys[-1]] = value
    if not tree:
        raise ModelFileError(f"{path}: holds no {name}; train and save the model again")
    return _lists(tree)


def _lists(tree: Any) -> Any:
    """Convert dicts with the keys 0, 1, ... to lists."""
    if not isinstance(tree, dict):
        return tree
    values = {k: _lists(v) for k, v in tree.items()}
    return [values[k] for k in sorted(values)] if values and all(isinstance(k, int) for k in values) else values


def _describe(data: Dataset) -> dict[str, Any]:
    return {
        "name": data.name,
        "report": data.report,
        "items": _vocabulary_to_json(data.items),
        "titles": None if data.titles is None else data.titles.tolist(),
        "user_fields": [_field_to_json(f) for f in data.user_fields],
        "item_fields": [_field_to_json(f) for f in data.item_fields],
        "context_fields": [_field_to_json(f) for f in data.context_fields],
    }


def _restore(described: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Dataset:
    item_fields = tuple(_field_from_json(f) for f in described["item_fields"])
    titles = described["titles"]
    return Dataset(
        name=described["name"],
        user=np.zeros(0, np.int32),
        item=np.zeros(0, np.int32),
        rating=np.zeros(0, np.float32),
        timestamp=np.zeros(0, np.int64),
        users=Vocabulary(np.zeros(0, np.int64), "user_id"),
        items=_vocabulary_from_json(described["items"]),
        user_fields=tuple(_field_from_json(f) for f in described["user_fields"]),
        item_fields=item_fields,
        item_features={f.name: arrays[ITEM + f.name] for f in item_fields},
        context_fields=tuple(_field_from_json(f) for f in described.get("context_fields", [])),
        titles=None if titles is None else np.array(titles, object),
        report=described.get("report", {}),
    )


def _vocabulary_to_json(vocabulary: Vocabulary) -> dict[str, Any]:
    ids = vocabulary.ids
    return {"name": vocabulary.name, "kind": ids.dtype.kind, "ids": ids.tolist(), "buckets": vocabulary.buckets}


def _vocabulary_from_json(described: dict[str, Any]) -> Vocabulary:
    ids = np.array(described["ids"], np.int64 if described["kind"] == "i" else np.str_)
    return Vocabulary(ids, described["name"], described.get("buckets"))


def _field_to_json(field: Field) -> dict[str, Any]:
    arrays = {k: None if (v := getattr(field, k)) is None else v.tolist() for k in ARRAYS_OF_FIELD}
    vocabulary = None if field.vocabulary is None else _vocabulary_to_json(field.vocabulary)
    plain = {k: getattr(field, k) for k in ("name", "kind", "size", "width", "transform", "gram")}
    return plain | arrays | {"vocabulary": vocabulary}


def _field_from_json(described: dict[str, Any]) -> Field:
    arrays = {k: None if (v := described.get(k)) is None else np.array(v) for k in ARRAYS_OF_FIELD}
    vocabulary = described["vocabulary"] and _vocabulary_from_json(described["vocabulary"])
    return Field(**{**described, **arrays, "vocabulary": vocabulary})


def _json(content: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ModelFileError(f"{path}: damaged, or not a model of metarec_jax ({error})") from error
    return parsed if isinstance(parsed, dict) else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: missing or unreadable ({error.strerror}); is this a saved model?") from error
