"""Export: adapt-and-recommend as one serialised function for JAX alone, and item vectors as a table."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from metarec_jax._files import write_whole
from metarec_jax.inference.predictor import Predictor
from metarec_jax.strategies.catalogue import adapt, score
from metarec_jax.tasks.ranking import Known

FUNCTION, DESCRIPTION = "recommend.jax", "recommend.json"


def export(
    predictor: Predictor, folder: str | Path, *, k: int = 10, longest: int = 32, platforms: tuple[str, ...] = ()
) -> None:
    """Write adapt-and-recommend as a serialised `jax.export` artefact for any number of users.

    The function is in `recommend.jax`; `recommend.json` describes its arguments and the ids of its item rows. It runs
    without this package:

        function = jax.export.deserialize(bytearray(open("recommend.jax", "rb").read()))
        scores, rows = function.call(items, ratings, weights, user, context)

    items are rows `[users, longest]` int32 of "items" in the description; ratings and weights are `[users, longest]`
    float32 (weight 0: padding). user and context are dicts of encoded attributes, zeros where unknown; the description
    has their shapes. The contexts of past interactions are unknown. Scores are click probabilities or ratings, -inf
    where no item is left. Items in the history are excluded.

    Args:
      predictor: the model and its stock.
      folder: output folder, created if missing.
      k: recommendations per user.
      longest: examples per user.
      platforms: "cpu", "cuda", "tpu" (default: the platform of this process).

    Raises:
      ImportError: the package flatbuffers is missing: pip install 'metarec-jax[export]'.
      ValueError: `k` is not positive or exceeds the number of items; `longest` is not positive.
    """
    try:
        import flatbuffers  # noqa: F401  # check before minutes of tracing
    except ImportError as error:
        raise ImportError("exporting needs flatbuffers: pip install 'metarec-jax[export]'") from error

    stock, target = predictor.stock, predictor.target
    if not 1 <= k < len(stock) or longest < 1:
        raise ValueError(f"need 1 <= k < {len(stock)} and longest >= 1, got {k=}, {longest=}")
    strategy, tables = predictor.trained.strategy, predictor.ranker.tables
    params = jax.tree.map(jnp.asarray, predictor.trained.params)  # numpy arrays do not take traced indices
    all_rows = jnp.arange(len(stock), dtype=jnp.int32)

    def one(known: Known) -> tuple[jax.Array, jax.Array]:
        batched = jax.tree.map(lambda x: x[None], known)
        graded = batched._replace(target=target.grade(batched.target))
        scores = score(strategy, params, tables, adapt(strategy, params, tables, graded), graded, all_rows[None])[0]
        scores = scores.at[0].set(-jnp.inf)  # row 0 is the unknown item
        excluded = jnp.where(known.weight > 0, known.items, 0)
        best, rows = jax.lax.top_k(scores.at[excluded].set(-jnp.inf), k)
        return jnp.where(jnp.isfinite(best), target.decode(best), -jnp.inf), rows

    def recommend(
        items: jax.Array, ratings: jax.Array, weights: jax.Array, user: dict[str, Any], context: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(one)(Known(items, ratings, weights, user, context))

    (users,) = jax_export.symbolic_shape("users")
    example = Known.blank(1, longest, *predictor.ranker.fields)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((users, *x.shape[1:]), x.dtype), example._replace(past=None))
    exported = jax_export.export(jax.jit(recommend), platforms=platforms or None)(*shapes[:-1])
    described = {
        "k": k,
        "longest": longest,
        "platforms": list(exported.platforms),
        "score": {"click": "click probability", "ranking": "ranking score"}.get(target.kind, "rating"),
        "ratings": {"lowest": predictor.trained.limits[0], "highest": predictor.trained.limits[1]},
        "user": {f.name: _encoding(f, example.user[f.name]) for f in predictor.ranker.fields[0]},
        "context": {f.name: _encoding(f, example.context[f.name]) for f in predictor.ranker.fields[1]},
        "items": [None, *stock.decode(np.arange(1, len(stock))).tolist()],
        "titles": None if stock.titles is None else stock.titles.tolist(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FUNCTION, bytes(exported.serialize()))
    write_whole(folder / DESCRIPTION, json.dumps(described, indent=1).encode())


def export_vectors(predictor: Predictor, path: str | Path) -> None:
    """Write item vectors (`Ranker.vectors`) to a Parquet or npz file.

    A `.parquet` file has the columns `item_id`, `title` and `vector`; an `.npz` file has the arrays `item_id` and
    `vector`.

    Raises:
      ValueError: another file extension.
    """
    path, stock = Path(path), predictor.stock
    rows = np.arange(1, len(stock))
    ids, vectors = stock.decode(rows), predictor.ranker.vectors()[rows]
    if path.suffix == ".npz":
        np.savez(path, item_id=ids, vector=vectors)
    elif path.suffix == ".parquet":
        import polars as pl

        titles = [None] * len(rows) if stock.titles is None else stock.titles[rows].tolist()
        pl.DataFrame({"item_id": ids, "title": titles, "vector": vectors}).write_parquet(path)
    else:
        raise ValueError(f"{path}: item vectors are written as .parquet or .npz")


def _encoding(field: Any, example: np.ndarray) -> dict[str, Any]:
    numbers = {k: None if (v := getattr(field, k)) is None else v.tolist() for k in ("mean", "scale", "knots")}
    values = None if field.vocabulary is None else [None, *field.vocabulary.ids.tolist()]
    shape = {"kind": field.kind, "shape": list(example.shape[1:]), "dtype": str(example.dtype)}
    return shape | {"transform": field.transform, "values": values} | numbers
