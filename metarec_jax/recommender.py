"""Recommender: the thin wrapper that people touch. `train` makes one; it recommends, evaluates, saves and loads."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import saving
from metarec_jax.data.batches import batches
from metarec_jax.data.candidates import Among, judged_on
from metarec_jax.data.candidates import candidates as draw
from metarec_jax.data.dataset import Dataset
from metarec_jax.data.histories import History, encode_attributes, encode_history, is_one_user
from metarec_jax.data.protocols import PROTOCOLS, Protocol
from metarec_jax.data.splits import ColdUsers, Split
from metarec_jax.data.statistics import ItemStatistics
from metarec_jax.data.target import Target
from metarec_jax.errors import DataError, ModelFileError
from metarec_jax.evaluation.evaluate import Scores, score_baselines, score_tasks, summarise
from metarec_jax.evidence import evidence
from metarec_jax.models import MODELS, Model, fields_of
from metarec_jax.progress import epochs_bar
from metarec_jax.progress import tensorboard as event_files
from metarec_jax.strategies import DEFAULT_MODEL, STRATEGIES, Strategy, reweighted, with_history, with_labels
from metarec_jax.tasks import Examples, Params
from metarec_jax.training import EPOCHS, fit
from metarec_jax.transfer import carry_over

LOSSES = {"click": optax.losses.sigmoid_binary_cross_entropy, "rating": optax.losses.squared_error}
CHUNK = 256  # users adapted at once
CELLS = 1 << 20  # users x items scored at once


class Recommendation(NamedTuple):
    """One item: raw id, score (a click probability or a rating; of `ask`, how much it tells) and title, where known."""

    item: Any
    score: float
    title: str | None


@dataclass(frozen=True, eq=False)
class Recommender:
    """A trained learner with the catalogue it was trained on.

    Attributes:
      strategy: the four pure functions.
      params: meta-trained parameters.
      catalogue: the dataset; after loading, one without interactions.
      target: ratings to targets.
      protocol: how users were split.
      seed: of the split.
      recipe: names and options of strategy and model, for `save`.
      limits: lowest and highest rating seen in training.
      history: training log, one dict an epoch.
    """

    strategy: Strategy
    params: Params
    catalogue: Dataset
    target: Target
    protocol: Protocol
    seed: int
    recipe: dict[str, Any]
    limits: tuple[float, float]
    history: list[dict[str, float]] = field(default_factory=list)

    def recommend(
        self,
        history: History | Sequence[History],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        user: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Any:
        """The `k` best items for a new user, or for each of a batch of new users.

        Args:
          history: what a user has rated, `{item: rating}` or `[(item, rating), ...]` with raw item ids; or a list of
            such. An empty history gets the ranking of a user about whom nothing is known. An item rated twice counts
            with its later rating; unknown items count as ratings of an unknown item.
          k: how many; fewer come back when fewer items are left.
          exclude_seen: leave out what is in the history.
          user: attributes of the user (or a list of them), `{"age": 30}`; what is left out is unknown.
          context: what is around the call, for all its users, `{"device": "phone"}`; what is left out is unknown, as
            are the contexts of the history.

        Returns:
          A list of `Recommendation`, best first; for a batch a list of such lists.

        Raises:
          DataError: item ids of another type than in training; a rating that is no finite number or off the scale; an
            unknown attribute or context.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise DataError(f"k must be a positive integer, got {k!r}")
        single = is_one_user(history)
        histories: list[Any] = [history] if single else list(history)
        users: Sequence[Any] = [user] if single else [None] * len(histories) if user is None else user  # type: ignore
        if isinstance(users, Mapping) or len(users) != len(histories):
            raise DataError(f"user: got attributes of {len(users)} users for {len(histories)} histories")
        encoded = [
            encode_history(h, self.catalogue.items, self.limits, "history" if single else f"history {i}")
            for i, h in enumerate(histories)
        ]
        attributes = [encode_attributes(u, self.catalogue.user_fields) for u in users]
        around = encode_attributes(context, self.catalogue.context_fields, "context")
        size = min(CHUNK, max(1, CELLS // len(self.catalogue.items)))
        found: list[list[Recommendation]] = []
        for i in range(0, len(encoded), size):
            chunk = encoded[i : i + size], attributes[i : i + size]
            found += self._recommend_chunk(*chunk, around, int(k), exclude_seen)
        return found[0] if single else found

    def evaluate(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Metrics on the test users, who were never seen in training, beside the plain baselines on the same tasks.

        Args:
          data: the dataset of the training; may be left out unless the model was loaded.
          support: largest support size (default: all that a user has besides the query).
          candidates: among what the query is ranked: "query", its own items; a number, so many sampled items besides
            that the user has no interaction with; "all", all such items. They count as not clicked.
          baselines: compute two means, ALS fold-in and item-kNN too.

        Returns:
          `{learner: {metric: value}}`.
        """
        scores = self.scores(data, support=support, candidates=candidates, baselines=baselines)
        return {learner: summarise(found, self.target.kind) for learner, found in scores.items()}

    def scores(
        self,
        data: Dataset | None = None,
        *,
        support: int | None = None,
        candidates: Among = "query",
        baselines: bool = True,
    ) -> dict[str, Scores]:
        """What `evaluate` summarises: every test user's scores by learner; arguments as there."""
        split, query = self.split(data, "evaluate(data)"), self.protocol.query
        test, longest = split.test, int(np.maximum(split.test.lengths - query, 1).max())
        width = -(-longest // 32) * 32  # splits and support sizes share their shapes, hence what is compiled
        judged = draw(test, self.target, candidates, query=query)
        size = min(len(test), max(1, CELLS // judged.item.shape[1]))
        tasks = (
            judged_on(batch, test, judged)
            for batch in batches(test, self.target, query=query, support=support, batch_size=size, buckets=(width,))
        )
        name = self.recipe["strategy"]["name"] or "strategy"
        results = {name: score_tasks(self.strategy, self.params, tasks, self.target)}
        if baselines:
            options: dict[str, Any] = {"query": query, "support": support, "among": candidates}
            results |= score_baselines(split.train, test, self.target, **options)
        return results

    def adaptation_cost(self, data: Dataset | None = None, *, users: int = 256, repeats: int = 5) -> tuple[float, int]:
        """What adapting costs: milliseconds a user and bytes of one adapted user.

        The time is the median of `repeats` runs of the compiled `adapt` on a batch of `users` support sets, which are
        those of the test users.
        """
        test = self.split(data, "adaptation_cost(data)").test
        width = -(-int(np.maximum(test.lengths - self.protocol.query, 1).max()) // 32) * 32
        options: dict[str, Any] = {"query": self.protocol.query, "batch_size": len(test), "buckets": (width,)}
        (batch,) = batches(test, self.target, **options)
        support = jax.tree.map(lambda x: jnp.asarray(np.resize(x, (users, *x.shape[1:]))), batch.task.support)
        adapt, key = jax.jit(self.strategy.adapt), jax.random.key(0)
        adapted = jax.block_until_ready(adapt(self.params, support, key))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(adapt(self.params, support, key))
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) / users * 1e3, sum(x.nbytes for x in jax.tree.leaves(adapted)) // users

    def ask(self, k: int = 10, data: Dataset | None = None) -> list[Recommendation]:
        """The `k` items to ask a new user about first, most telling first: MeLU's evidence candidates.

        Those that many training users have rated and whose ratings, each taken alone, move the adapted parameters
        the most; see `metarec_jax.evidence`, which is also what the scores are.

        Args:
          k: how many; fewer come back when fewer items have ratings.
          data: the dataset of the training; may be left out unless the model was loaded.

        Raises:
          DataError: a loaded model without `data`, or data that do not fit.
          ValueError: the strategy adapts nothing.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise DataError(f"k must be a positive integer, got {k!r}")
        value = evidence(self.strategy, self.params, self.split(data, "ask(k, data)").train, self.target)
        rows = np.argsort(-value, kind="stable")[: min(k, np.count_nonzero(value))]
        return self._readable(rows, value[rows])

    def save(self, path: str | Path) -> None:
        """Write the model as a folder of JSON and safetensors files; an earlier model there is replaced at once."""
        config = {
            "recipe": self.recipe,
            "target": asdict(self.target),
            "protocol": {"name": type(self.protocol).__name__} | asdict(self.protocol),
            "seed": self.seed,
            "limits": self.limits,
            "history": self.history,
        }
        saving.write(path, config, self.catalogue, self.params)

    def split(self, data: Dataset | None = None, call: str = "split(data)") -> Split:
        """The split of the training; `call` is what to write where a loaded model needs the dataset."""
        if data is None and not len(self.catalogue.rating):
            raise DataError(f"a loaded model holds no interactions: {call} with the dataset it was trained on")
        return self.protocol.split(self.catalogue if data is None else self._as_trained(data), self.seed)

    def _readable(self, rows: np.ndarray, scores: np.ndarray) -> list[Recommendation]:
        """Item rows `[k]` with their scores as people read them."""
        titles = [None] * len(rows) if self.catalogue.titles is None else self.catalogue.titles[rows]
        raw = self.catalogue.items.decode(rows).tolist()
        return [Recommendation(*r) for r in zip(raw, scores.tolist(), titles, strict=True)]

    def _as_trained(self, data: Dataset) -> Dataset:
        """The interactions of `data` with the item features of the training, or an error when the two do not fit."""
        known, given = (
            {n: (f.kind, f.size, f.vocabulary and f.vocabulary.ids.tolist()) for n, f in fields_of(d).items()}
            for d in (self.catalogue, data)
        )
        around = [{f.name for f in d.context_fields} for d in (self.catalogue, data)]
        same_fields = around[0] == around[1] and all(known.get(name) == field for name, field in given.items())
        if not np.array_equal(self.catalogue.items.ids, data.items.ids) or not same_fields:
            raise DataError(
                f"{data.name} does not have the items and fields of the training data ({self.catalogue.name}); "
                "evaluate it on the same dataset, or train a new model"
            )
        return replace(data, item_fields=self.catalogue.item_fields, item_features=self.catalogue.item_features)

    def _recommend_chunk(
        self,
        encoded: list[tuple[np.ndarray, np.ndarray]],
        attributes: list[dict[str, np.ndarray]],
        around: dict[str, np.ndarray],
        k: int,
        exclude: bool,
    ) -> list[list[Recommendation]]:
        data = self.catalogue
        users, width = _bucket(len(encoded), 1), _bucket(max(len(rows) for rows, _ in encoded), 8)
        items = np.zeros((users, width), np.int32)
        target, mask = np.zeros((2, users, width), np.float32)
        for i, (rows, ratings) in enumerate(encoded):
            items[i, : len(rows)], target[i, : len(rows)] = rows, self.target.grade(ratings)
            mask[i, : len(rows)] = 1
        known = {
            f.name: np.stack([a[f.name] for a in attributes] + [f.unknown()] * (users - len(attributes)))
            for f in data.user_fields
        }
        scores, best = _rank(
            self.strategy, min(_bucket(k, 8), len(data.items)), exclude, self.params, items, target, mask, known,
            around, data.item_features | {"": np.arange(len(data.items), dtype=np.int32)},
        )  # fmt: skip
        probability = self.target.decode(np.asarray(scores))
        found = []
        for row, finite, value in zip(np.asarray(best), np.isfinite(scores), probability, strict=True):
            kept = np.flatnonzero(finite)[:k]
            found.append(self._readable(row[kept], value[kept]))
        return found[: len(encoded)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _rank(
    strategy: Strategy,
    k: int,
    exclude: bool,
    params: Params,
    items: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    user: dict[str, jax.Array],
    context: dict[str, jax.Array],
    catalogue: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The top `k` scores `[users, k]` and item rows `[users, k]`; what must not be recommended has score -inf."""

    # as metarec_jax.data.batches.features
    def features(rows: jax.Array, context: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = {"item_id" if name == "" else f"item/{name}": table[rows] for name, table in catalogue.items()}
        for name, value in user.items():
            found[f"user/{name}"] = jnp.broadcast_to(value[:, None], rows.shape + value.shape[1:])
        for name, value in context.items():
            found[f"context/{name}"] = jnp.broadcast_to(value, rows.shape + value.shape)
        return found

    before = jnp.broadcast_to(jnp.arange(items.shape[1], dtype=jnp.int32), items.shape)
    support = Examples(features(items, jax.tree.map(jnp.zeros_like, context)) | {"order": before}, target, mask)
    adapted = strategy.adapt(params, support, jax.random.key(0))
    everything = jnp.broadcast_to(catalogue[""], (len(items), len(catalogue[""])))
    last = jnp.broadcast_to(mask.sum(1, keepdims=True).astype(jnp.int32), everything.shape)
    scores = strategy.predict(params, adapted, features(everything, context) | {"order": last})
    scores = scores.at[:, 0].set(-jnp.inf)  # the unknown item is none
    if exclude:
        scores = scores.at[jnp.arange(len(items))[:, None], items].set(-jnp.inf)
    return jax.lax.top_k(scores, k)


def train(
    data: Dataset,
    strategy: str | Callable[..., Strategy] = "alpaca",
    model: str | Callable[..., Model] | None = None,
    *,
    seed: int = 0,
    protocol: Protocol | None = None,
    graded: bool = True,
    strategy_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    start: Recommender | None = None,
    shared: Collection[str] | None = None,
    progress: bool = True,
    tensorboard: str | Path | None = None,
    **fit_options: Any,
) -> Recommender:
    """Meta-train a recommender on a dataset.

    Args:
      data: from `metarec_jax.data`.
      strategy: a name in `metarec_jax.strategies.STRATEGIES`, or a function `(model, loss=...) -> Strategy`.
      model: a name in `metarec_jax.models.MODELS`, or a function `(fields) -> Model`; by default what
        `metarec_jax.strategies.DEFAULT_MODEL` says, else "mlp".
      seed: of the split, the parameters and the sampling; same seed, same machine: same model.
      protocol: which users train, validate and test, and what is predicted (default: clicks of cold users).
      graded: where clicks are made from ratings, learn what each rating of a support set tells of the user, and show
        the mean rating of an item beside its share of clicks; else a rating counts as a click or none.
      strategy_options, model_options: keyword arguments of the two.
      start: a recommender trained on other data, to start from its parameters instead of random ones. Rows of tables
        are carried over where both know the raw value (an item id, a genre), layers where their shapes are the same.
      shared: with `start`, the fields whose raw values mean the same in both datasets, by the names of
        `metarec_jax.models.fields_of` (default: all that both have). Leave out "item_id" where the same number is
        another item.
      progress: show a progress bar.
      tensorboard: a folder for event files with each epoch's loss and validation metrics.
      **fit_options: keyword arguments of `metarec_jax.training.fit`, for instance `epochs` or `checkpoint`.

    Raises:
      DataError: the dataset has too few users for the protocol.
      ValueError: an unknown name; `start` was trained for another target, or with another strategy or model; `shared`
        without `start`.
      TypeError: `start` is no recommender.
    """
    protocol = protocol or ColdUsers()
    if model is None:
        model = DEFAULT_MODEL.get(strategy, "mlp") if isinstance(strategy, str) else "mlp"
    split = protocol.split(data, seed)
    target = Target.fit(protocol, split.train, graded)
    statistics = ItemStatistics.fit(split.train, target)
    data = statistics.extend(data)
    split = Split(*(replace(part, data=data) for part in split))
    recipe = {"strategy": saving.part(strategy, strategy_options), "model": saving.part(model, model_options)}
    built = _build(
        partial(_named(STRATEGIES, strategy, "strategy"), **dict(strategy_options or {})),
        partial(_named(MODELS, model, "model"), **dict(model_options or {})),
        data,
        target,
    )
    if start is None and shared is not None:
        raise ValueError("`shared` names fields that are shared with the data of `start`: give both or none")
    if start is not None:
        if not isinstance(start, Recommender):
            raise TypeError(f"start must be a Recommender, got {type(start).__name__}; a saved one: mr.load(path)")
        if start.target.kind != target.kind:
            raise ValueError(f"start predicts a {start.target.kind}, this training a {target.kind}; use one target")
        fresh = jax.jit(built.init)(jax.random.key(seed))
        fit_options["params"] = carry_over(start.params, fresh, fields_of(start.catalogue), fields_of(data), shared)
    told = [fit_options.pop("report", None)]
    with (
        epochs_bar(progress, fit_options.get("epochs", EPOCHS), target.kind) as bar,
        event_files(tensorboard) as events,
    ):
        told += [bar, events]

        def report(epoch: int, entry: dict[str, float]) -> None:
            for tell in filter(None, told):
                tell(epoch, entry)

        fitted = fit(
            built,
            split,
            target,
            query=protocol.query,
            statistics=statistics,
            seed=seed,
            report=report,
            **fit_options,
        )
    rating = data.rating[split.train.index]
    return Recommender(
        built,
        fitted.params,
        data,
        target,
        protocol,
        seed,
        recipe,
        (float(rating.min()), float(rating.max())),
        fitted.history,
    )


def load(
    path: str | Path,
    *,
    strategy: Callable[..., Strategy] | None = None,
    model: Callable[..., Model] | None = None,
) -> Recommender:
    """A recommender from a folder that `Recommender.save` wrote.

    Args:
      path: the folder.
      strategy, model: the functions given to `train`, when they were given as functions and not by name.

    Raises:
      ModelFileError: no model, a damaged one, one of another version, or one that needs `strategy` or `model`.
    """
    config, catalogue, arrays = saving.read(path)
    levels = config["target"].get("levels")
    recipe, target = config["recipe"], Target(**config["target"] | {"levels": levels and tuple(levels)})
    makers: dict[str, Callable[..., Any]] = {}
    choices: list[Any] = [("strategy", strategy, STRATEGIES), ("model", model, MODELS)]
    for what, given, known in choices:
        name = recipe[what]["name"]
        if given is None and name not in known:
            raise ModelFileError(
                f"{path}: its {what} is {name or 'a function of the caller'}; load it with load(path, {what}=...)"
            )
        makers[what] = partial(known[name], **recipe[what]["options"]) if given is None else given
    built = _build(makers["strategy"], makers["model"], catalogue, target)
    built = reweighted(built) if recipe.get("reweighted") else built
    params = saving.restore_params(arrays, jax.eval_shape(built.init, jax.random.key(0)), path)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["protocol"].items()}
    protocol = PROTOCOLS[settings.pop("name", "ColdUsers")](**settings)
    return Recommender(
        built,
        params,
        catalogue,
        target,
        protocol,
        config["seed"],
        recipe,
        tuple(config["limits"]),
        config["history"],
    )


def _build(strategy: Callable[..., Strategy], model: Callable[..., Model], data: Dataset, target: Target) -> Strategy:
    """The strategy on its model; one that reads histories is given them."""
    network = model(fields_of(data))
    built = strategy(network, loss=LOSSES[target.kind])
    if network.history:
        built = with_history(built)
    if target.levels is None:
        return built
    levels = np.array(target.levels)
    return with_labels(built, target.grade(levels).tolist(), target.encode(levels).tolist())


def _named(known: Mapping[str, Callable[..., Any]], choice: Any, what: str) -> Callable[..., Any]:
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(f"{what} {choice!r} is unknown; choose from {', '.join(known)}, or pass a function")
    return known[choice]


def _bucket(n: int, smallest: int) -> int:
    """The smallest power of two that is at least `n` and `smallest`: few shapes, few compilations."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())
