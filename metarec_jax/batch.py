"""Batch: recommend and predict for many users in one call."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metarec_jax._files import write_whole
from metarec_jax._progress import counter
from metarec_jax.errors import DataError, OptionError, UnknownItemWarning
from metarec_jax.inference.histories import History, is_table, shown
from metarec_jax.inference.predictor import Attributes, EncodedUser, Predictor
from metarec_jax.inference.recommendations import Choice, as_table
from metarec_jax.state.events import UserId
from metarec_jax.state.feedback import checked_id
from metarec_jax.state.memory import Memory

if TYPE_CHECKING:
    import polars as pl

CHUNK = 4096  # users whose recommendations are Python objects at once in `Batch.table`
Context = Mapping[str, Any] | None


@dataclass(frozen=True)
class Batch:
    """The calls of a `Recommender` for many users; each returns one entry per user, in order.

    Attributes:
      predictor: the model applied to the items that can be recommended.
      memory: the known users.
    """

    predictor: Predictor
    memory: Memory

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        users: Sequence[Attributes] | None = None,
        context: Context = None,
        **choice: Any,
    ) -> list[list[Any]]:
        """Recommend the `k` best items to each of many new users.

        Args:
          histories: one history per user, of any form that `Recommender.recommend` takes.
          k, context: see `Recommender.recommend`; shared by all users.
          users: attributes of each user, `[{"age": 30}, None, ...]`.
          **choice: other options of `Recommender.recommend`. `where` and `seed` may be lists, one entry per user.

        Raises:
          DataError, ValueError: as `Recommender.recommend`; the message names the history by its position.
        """
        options = chosen(choice, "batch.recommend")
        return self.predictor.top(self.people(histories, users), k, context, options)

    def recommend_to(
        self, users: Sequence[UserId], k: int = 10, *, context: Context = None, **choice: Any
    ) -> list[list[Any]]:
        """Recommend the `k` best items to each of many known users; see `Recommender.recommend_to` and `recommend`."""
        options = chosen(choice, "recommend_to")
        return self.predictor.top(self.remembered(users), k, context, options)

    def predict(
        self,
        histories: Sequence[History],
        items: Sequence[Any],
        *,
        users: Sequence[Attributes] | None = None,
        context: Context = None,
    ) -> list[list[float]]:
        """Predict ratings, or click probabilities, of the same items for each of many new users.

        See `Recommender.predict`, and `recommend` for the arguments.
        """
        return self.predictor.expected(self.people(histories, users), items, context)

    def predict_for(
        self, users: Sequence[UserId], items: Sequence[Any], *, context: Context = None
    ) -> list[list[float]]:
        """Predict ratings, or click probabilities, of the same items for each of many known users."""
        return self.predictor.expected(self.remembered(users), items, context)

    def table(
        self,
        users: Sequence[UserId],
        k: int = 10,
        *,
        path: str | Path | None = None,
        context: Context = None,
        progress: bool = False,
        **choice: Any,
    ) -> "pl.DataFrame":
        """Recommend to many known users; see `Recommender.recommend_all`."""
        import polars as pl

        ids = _checked_ids(users)
        if len({type(user) for user in ids}) > 1:
            raise DataError("users: integers and strings are mixed; a column holds ids of one type")
        if path is not None and (Path(path).suffix != ".parquet" or not Path(path).parent.is_dir()):
            raise DataError(f"path: expected a .parquet file in a folder that exists, got {str(path)!r}")
        if choice.get("deviation"):
            raise OptionError("the table has no column for deviations; batch.recommend_to(users, deviation=True) has")
        per_user = {name: v for name, v in choice.items() if name in ("where", "seed") and isinstance(v, list | tuple)}
        for name, values in per_user.items():
            if len(values) != len(ids):
                raise OptionError(
                    f"{name}: got {len(values)} entries for {len(ids)} users; give one each, or one for all"
                )
        text, parts = self.predictor.stock.trained.ids.dtype.kind == "U", []
        with counter(progress, "users", len(ids)) as count:
            for start in range(0, len(ids), CHUNK):
                here = slice(start, start + CHUNK)
                own = {name: values[here] for name, values in per_user.items()}
                lists = self.recommend_to(ids[here], k, context=context, **choice | own)
                parts.append(as_table(ids[here], lists, text))
                count(len(lists))
        whole = pl.concat(parts) if parts else as_table([], [], text)
        if not parts and self.predictor.catalogue.users.ids.dtype.kind == "U":
            whole = whole.cast({"user_id": pl.String})
        if path is not None:
            file = BytesIO()
            whole.write_parquet(file)
            write_whole(Path(path), file.getvalue())
        return whole

    def people(self, histories: Sequence[History], users: Sequence[Attributes] | None = None) -> list[EncodedUser]:
        """Encode new users, and warn of unknown items."""
        listed = _listed(histories, "histories", "histories")
        given = [None] * len(listed) if users is None else _listed(users, "users", "attributes")
        if len(given) != len(listed):
            raise DataError(f"users: got attributes of {len(given)} users for {len(listed)} histories")
        for i, history in enumerate(listed):
            if isinstance(history, tuple) and history and not isinstance(history[0], tuple):
                raise DataError(
                    f"history {i}: {shown(history)} is one interaction of a history; one user: "
                    "recommender.recommend(history); a history of item ids is a list"
                )
        each = enumerate(zip(listed, given, strict=True))
        people = [self.predictor.person(history, own, f"history {i}") for i, (history, own) in each]
        warn_of_unknown(people, stacklevel=4)
        return people

    def remembered(self, users: Sequence[UserId]) -> list[EncodedUser]:
        """Encode known users."""
        return self.memory.users(self.predictor, _checked_ids(users))


def _checked_ids(users: Sequence[UserId]) -> list[Any]:
    return [checked_id(user, None, "user") for user in _listed(users, "users", "ids")]


def _listed(values: Any, name: str, what: str) -> list[Any]:
    """Return the entries of a list, an array or a column; raise `DataError` for anything else."""
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if not is_list or is_table(values):
        raise DataError(f"{name}: expected a list of {what}, one per user, got {shown(values)}")
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def chosen(options: Mapping[str, Any], call: str) -> Choice:
    """Return the options of a call as a `Choice`.

    Raises:
      TypeError: an unknown option.
    """
    known = [field.name for field in fields(Choice)]
    if unknown := sorted(options.keys() - set(known)):
        hint = {"user": "; attributes are users=[...] of batch.recommend, or describe_user"}.get(unknown[0], "")
        raise TypeError(
            f"{call}() got an unexpected keyword argument {unknown[0]!r}; it takes context, {', '.join(known)}{hint}"
        )
    return Choice(**options)


def warn_of_unknown(people: Sequence[EncodedUser], stacklevel: int = 3) -> None:
    """Warn of items in histories that are not in the stock: they tell only how high a user rates.

    Args:
      people: encoded users.
      stacklevel: of the warning; 3 is the caller of the function that calls this one.
    """
    unknown = [item for person in people for item in person.unknown]
    if unknown:
        total, first = sum(len(person.rows) for person in people), ", ".join(map(repr, unknown[:3]))
        warnings.warn(
            f"{len(unknown):,} of {total:,} items in the history are unknown to the model ({first}"
            f"{', ...' if len(unknown) > 3 else ''}); they tell only how high the user rates; check the ids, or add "
            "them with add_items",
            UnknownItemWarning,
            stacklevel=stacklevel,
        )
