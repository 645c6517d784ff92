"""The command line: `metarec quickstart`, `train`, `evaluate`, `recommend`, `explain`, `serve`, ..."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

CANDIDATES = "Clicks only: rank the query among these: query (itself alone), a number of sampled items besides, or all."
EXAMPLE_USER = {99: 5, 588: 5, 71: 4, 95: 4, 288: 1}  # ml-100k: likes animated films for children, not Scream
DEFAULT_MODEL = "metarec-model"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="metarec-jax")
def cli() -> None:
    """Recommenders that learn a new user from a few interactions.

    \b
    Start here:   metarec quickstart
    Your data:    metarec train interactions.csv --out my-model
                  (columns user_id, item_id and, if there are such, rating and timestamp)
    A new user:   metarec recommend my-model 99=5 588=4 288=1   (with ratings)
                  metarec recommend my-model 99 588             (items that the user chose)
    In use:       metarec serve my-model
    Compare:      metarec compare ml-100k -s alpaca -s maml     (clicks and ratings)
    """


@cli.command()
@click.option("--out", default=DEFAULT_MODEL, show_default=True, help="Folder to save the model in.")
@click.option("--seed", default=0, show_default=True, help="Of the split and of the training.")
def quickstart(out: str, seed: int) -> None:
    """Train on MovieLens-100K, compare with plain methods, recommend films to a new user.

    Fetches the data once (5 MB, into your cache folder), learns to rank the whole catalogue, shows how well the films
    that test users chose are found, beside popularity, item-kNN, EASE and iALS, and saves the model. The test users are
    not in the training.
    """
    import metarec_jax as mr

    data = mr.data.load("ml-100k")
    click.echo(f"{data}")
    recommender = mr.train(data, seed=seed)
    click.echo("Evaluating, beside plain methods that are tuned on the validation users ...")
    _print_ranking(recommender)
    click.echo("\nA new user has rated five films:")
    assert data.titles is not None
    for item, rating in EXAMPLE_USER.items():
        title = data.titles[data.items.encode([item])[0]]
        click.echo(f"  {rating} of 5  {_described(recommender, item, title)}")
    _print_recommendations(recommender, recommender.recommend(EXAMPLE_USER, k=10))
    recommender.save(out)
    rated = " ".join(f"{item}={rating}" for item, rating in EXAMPLE_USER.items())
    click.echo(
        f"\nThe model is in {out}/. Next:\n  metarec recommend {out} {rated}\n  metarec serve {out}\n"
        "  metarec train --help"
    )


@cli.command()
@click.argument("data")
@click.option(
    "--objective",
    type=click.Choice(["ranking", "click", "rating"]),
    default="ranking",
    show_default=True,
    help="What to predict: which item of the whole catalogue a user chooses, whether an item is liked, or its rating.",
)
@click.option("--target", type=click.Choice(["click", "rating"]), default=None, hidden=True)  # the name until 0.1
@click.option(
    "--strategy",
    default=None,
    help='How to adapt to a user (README\'s table).  [default: "stack" to rank, "alpaca" for clicks and ratings]',
)
@click.option("--model", default=None, help="Network (see the README); by default the strategy's own.")
@click.option(
    "--threshold",
    default=4.0,
    show_default=True,
    help="Lowest rating that counts as positive (to rank) or as a click; ignored where all ratings are the same.",
)
@click.option(
    "--users",
    type=(int, int),
    default=(13, 100),
    show_default=True,
    help="Clicks and ratings only: fewest and most ratings of a user.",
)
@click.option(
    "--query",
    default=10,
    show_default=True,
    help="Clicks and ratings only: ratings of each user that are predicted.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1),
    default=None,
    help="At most so many; training stops when validation does not improve.  [default: what suits the objective]",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--column",
    multiple=True,
    metavar="NAME=YOURS",
    help="Your column names, e.g. --column rating=stars. Repeatable.",
)
@click.option("--tensorboard", type=click.Path(), default=None, help="Folder for TensorBoard's event files.")
@click.option("--checkpoint", type=click.Path(), default=None, help="File from which a killed training goes on.")
@click.option("--out", default=DEFAULT_MODEL, show_default=True, help="Folder to save the model in.")
def train(
    data: str, objective: Any, target: Any, strategy: str | None, model: str | None, threshold: float,
    users: tuple[int, int], query: int, epochs: int | None, seed: int, column: tuple[str, ...],
    tensorboard: str | None, checkpoint: str | None, out: str,
) -> None:  # fmt: skip
    """Meta-train a model on DATA and save it.

    \b
    DATA is ml-100k, ml-1m, ml-latest-small or ml-latest, the path of such a
    folder or archive, a folder of RecBole's atomic files, or a .csv, .tsv,
    .jsonl or .parquet table of interactions. Without a column of ratings
    every interaction is a positive.
    Example: metarec train ml-100k --out my-model
             metarec train ml-100k --objective rating --strategy melu
    """
    import metarec_jax as mr

    if target is not None:
        click.echo(f"--target is deprecated: use --objective {target}", err=True)
        objective = target
    protocol: Any
    if objective == "ranking":
        source = click.get_current_context().get_parameter_source
        if given := [name for name in ("users", "query") if source(name) is not ParameterSource.DEFAULT]:
            raise click.UsageError(f"--{given[0]} is for --objective click or rating")
        protocol = mr.StrongGeneralisation(threshold=threshold)
    else:
        protocol = mr.ColdUsers(minimum=users[0], maximum=users[1], query=query, target=objective, threshold=threshold)
    kept: dict[str, Any] = {"tensorboard": tensorboard, "checkpoint": checkpoint}
    recommender = mr.train(_read(data, column), strategy, model, seed=seed, protocol=protocol, epochs=epochs, **kept)
    recommender.save(out)
    click.echo(
        f"The model is in {out}/. Next:\n  metarec evaluate {out} {data}\n  metarec recommend {out} ITEM=RATING ..."
    )


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("data")
@click.option("--support", type=int, default=None, help="Adapt to at most so many ratings of a user (default: all).")
@click.option("--candidates", default="query", show_default=True, help=CANDIDATES)
@click.option("--column", multiple=True, metavar="NAME=YOURS", help="Your column names, e.g. --column rating=stars.")
@click.option("--json", "as_json", is_flag=True, help="Print every metric of every learner as JSON.")
def evaluate(
    model: str, data: str, support: int | None, candidates: str, column: tuple[str, ...], as_json: bool
) -> None:
    """Metrics of MODEL on DATA's test users, beside the plain baselines on the same tasks.

    DATA is what the model was trained on; the test users are those that training never saw. A model that ranks is
    judged among all items of the catalogue.
    """
    import metarec_jax as mr

    recommender = mr.load(model)
    if recommender.target.kind == "ranking" and candidates != "query":
        raise click.UsageError("--candidates is for clicks; this model ranks, and is judged among all items")
    if as_json:
        found = recommender.evaluate(_read(data, column), support=support, candidates=_among(candidates))
        click.echo(json.dumps(found, indent=1))
    elif recommender.target.kind != "ranking":
        _print_evaluation(recommender, _read(data, column), support, _among(candidates))
    else:
        _print_ranking(recommender, _read(data, column), support)


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("ratings", nargs=-1, metavar="[ITEM[=RATING]]...")
@click.option("-k", default=10, show_default=True, help="How many items.")
@click.option("--include-seen", is_flag=True, help="Also recommend what was rated.")
@click.option(
    "--user",
    multiple=True,
    metavar="FIELD=VALUE",
    help="What is known of the user, e.g. --user age=30. Repeatable.",
)
def recommend(model: str, ratings: tuple[str, ...], k: int, include_seen: bool, user: tuple[str, ...]) -> None:
    """The best items of MODEL for a new user with these ratings (none: for a user about whom nothing is known).

    ITEM alone is an item that the user chose, without a rating. The scores of a model that ranks are shown relative to
    the first item: how likely each is to be chosen next, the first being 1.

    \b
    Example: metarec recommend metarec-model 99=5 588=5 288=1 -k 5
             metarec recommend metarec-model 99 588 -k 5
    """
    import metarec_jax as mr

    recommender = mr.load(model)
    history = _history(recommender, ratings)
    dense = {f.name for f in recommender.catalogue.user_fields if f.kind == "dense"}
    attributes = {name: _number(v, float, name) if name in dense else v for name, v in _pairs(user)}
    items = [entry[0] if isinstance(entry, tuple) else entry for entry in history]
    unknown = [item for item, row in zip(items, recommender.stock.encode(items), strict=True) if not row]
    if unknown:
        click.echo(f"note: the model does not know {', '.join(map(str, unknown))}", err=True)
    _print_recommendations(
        recommender, recommender.recommend(history, k, exclude_seen=not include_seen, user=attributes)
    )


@cli.command()
@click.argument("data")
@click.option("--strategy", "-s", "strategies", multiple=True, required=True, help="One of them. Repeatable.")
@click.option("--splits", default=10, show_default=True, help="Random splits, seeds 0 and up.")
@click.option(
    "--target", type=click.Choice(["click", "rating"]), default="click", show_default=True, help="What to predict."
)
@click.option("--epochs", default=60, show_default=True, help="At most so many.")
@click.option("--candidates", default="query", show_default=True, help=CANDIDATES)
@click.option("--column", multiple=True, metavar="NAME=YOURS", help="Your column names, e.g. --column rating=stars.")
@click.option("--out", default="comparison", show_default=True, help="Folder; what is there already is not run again.")
def compare(
    data: str, strategies: tuple[str, ...], splits: int, target: Any, epochs: int, candidates: str,
    column: tuple[str, ...], out: str,
) -> None:  # fmt: skip
    """Train strategies on several splits of DATA and compare them with the plain baselines.

    May be stopped and started again. Example: metarec compare ml-100k -s alpaca -s maml --splits 10
    """
    import metarec_jax as mr

    found = mr.evaluation.compare(
        _read(data, column),
        strategies,
        splits=splits,
        protocol=mr.ColdUsers(target=target),
        folder=out,
        candidates=_among(candidates),
        epochs=epochs,
        report=click.echo,
    )
    for (name, seed), why in found.failed.items():
        click.echo(f"{name}, split {seed}, came to nothing: {why}", err=True)
    click.echo(f"\n{mr.evaluation.markdown(found)}\n\nNext:\n  metarec report {out}")


@cli.command()
@click.argument("comparison", type=click.Path(exists=True, file_okay=False))
@click.option("--out", default="report.html", show_default=True, help="The file to write.")
def report(comparison: str, out: str) -> None:
    """One HTML file with the tables and plots of COMPARISON, a folder that `metarec compare` wrote."""
    import metarec_jax as mr

    click.echo(f"{mr.evaluation.report(mr.evaluation.load_comparison(comparison), out)} is ready; open it in a browser")


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("item")
@click.argument("ratings", nargs=-1, metavar="ITEM[=RATING] ...")
@click.option("--plot", type=click.Path(dir_okay=False), default=None, help="Write the bars to this PNG, SVG or PDF.")
def explain(model: str, item: str, ratings: tuple[str, ...], plot: str | None) -> None:
    """Why ITEM has its score for someone with these ratings.

    Example: metarec explain metarec-model 432 99=5 588=5 288=1
    """
    import metarec_jax as mr

    recommender = mr.load(model)
    history = _history(recommender, ratings)
    found = recommender.explain(history, _item(recommender, item))
    click.echo(str(found))
    if plot:
        found.plot(plot)


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--users", default="users.db", show_default=True, help="Where users are kept: a file or redis://...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--half-life",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Days in which an event loses half its weight.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Milliseconds that a request waits for company.",
)
@click.option(
    "--waiting", type=click.IntRange(1), default=512, show_default=True, help="Requests that may wait; more get 503."
)
def serve(
    model: str, users: str, host: str, port: int, half_life: float | None, budget: float, waiting: int
) -> None:  # fmt: skip
    """Serve MODEL over HTTP, with a page to try it at /.

    Requests need the token in the environment variable METAREC_TOKEN (Authorization: Bearer TOKEN), which may be left
    out on loopback only. POST /v1/model/reload serves what is in the folder MODEL by then.
    """
    token = os.environ.get("METAREC_TOKEN") or None
    if token is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise click.UsageError(
            f"{host} can be reached from elsewhere: set METAREC_TOKEN to a secret that requests must carry"
        )
    try:
        import uvicorn

        from metarec_jax.serving import Service, create_app
    except ImportError as error:
        raise click.UsageError(f"serving needs more packages: pip install 'metarec-jax[serve]' ({error})") from error

    service = Service(model, users, half_life=half_life and half_life * 86400, report=click.echo)
    click.echo(f"model {service.current.version}, users in {users}")
    app = create_app(service, token=token, budget=budget / 1000, waiting=waiting, ready=_keep_objects)
    click.echo(f"http://{host}:{port}/  (Ctrl+C ends)")
    uvicorn.run(app, host=host, port=port, log_level="warning")


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("out")
@click.option("-k", default=10, show_default=True, help="Recommendations a user.")
@click.option("--longest", default=32, show_default=True, help="Ratings a user.")
def export(model: str, out: str, k: int, longest: int) -> None:
    """Write MODEL's adapting and recommending to the folder OUT as a function that JAX alone can run, and the items'
    vectors as Parquet."""
    import metarec_jax as mr

    recommender = mr.load(model)
    recommender.export(out, k=k, longest=longest)
    recommender.export_vectors(Path(out) / "items.parquet")
    click.echo(f"{out}/: recommend.jax, recommend.json (how to call it), items.parquet")


def _keep_objects() -> None:
    """All objects there are now stay out of collections, which would stop every request to walk them."""
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run the command line; errors of the package become one line each."""
    from metarec_jax.errors import DataError, ModelFileError, StoreError

    _keep_compiled_programs()
    try:
        cli(standalone_mode=True)
    except (DataError, ModelFileError, StoreError, ValueError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"metarec: {error}") from error


def _keep_compiled_programs() -> None:
    """What was compiled once is read from the user's cache the next time, unless JAX was told of another one."""
    import jax

    from metarec_jax.data.fetch import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _read(data: str, column: tuple[str, ...]) -> Any:
    from metarec_jax.data import from_tables, load, read_table

    if column:
        return from_tables(read_table(data), columns=dict(_pairs(column)), name=Path(data).stem)
    return load(data)


def _pairs(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} should look like NAME=VALUE")
    return [(left, right) for left, _, right in (text.rpartition("=") for text in texts)]


def _number(text: str, kind: type, what: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise click.BadParameter(f"{what} {text!r} is no {'integer' if kind is int else 'number'}") from error


def _item(recommender: Any, text: str) -> Any:
    return _number(text, int, "item id") if recommender.stock.trained.ids.dtype.kind == "i" else text


def _history(recommender: Any, texts: tuple[str, ...]) -> list[Any]:
    """Of "ITEM=RATING" (item, rating), of "ITEM" the item."""
    found: list[Any] = []
    for text in texts:
        left, equals, right = text.rpartition("=")
        item = _item(recommender, left if equals else text)
        found.append((item, _number(right, float, "rating")) if equals else item)
    return found


def _among(candidates: str) -> Any:
    return int(candidates) if candidates.isdigit() else candidates


def _print_evaluation(recommender: Any, data: Any, support: int | None, candidates: Any = "query") -> None:
    """The table of clicks or ratings."""
    from rich.console import Console

    from metarec_jax import ColdUsers
    from metarec_jax._progress import results_table

    results = recommender.evaluate(data, support=support, candidates=candidates)
    if recommender.target.kind == "click":
        shown = ("auc", "within_user_auc", "precision@5", "ndcg@5", "mrr@5", "log_loss")
        results = {learner: {m: values[m] for m in shown} for learner, values in results.items()}
    new = "Users never seen in training" if isinstance(recommender.protocol, ColdUsers) else "Test tasks"
    title = f"{new}, judged on ratings kept from the learner"
    Console(width=110).print(results_table(results, title))


def _print_ranking(recommender: Any, data: Any = None, support: int | None = None) -> None:
    """The table of a ranking, and how far the learner is ahead of the best plain method."""
    from rich.console import Console

    from metarec_jax._progress import results_table
    from metarec_jax.metrics.ranking import SIZES

    sizes = SIZES if support is None else (support,)
    columns = {f"ndcg@100, {size} known": f"{size} known" for size in sizes if size is not None}
    if support is None:
        columns |= {"ndcg@100": "all known", "recall@20": "recall@20, all"}
    found = recommender.rankings(data, sizes=sizes)
    results = {
        learner: {shown: float(np.nanmean(values[name])) for name, shown in columns.items()}
        for learner, values in found.items()
    }
    title = f"nDCG@100 of test users among all {len(recommender.stock) - 1:,} items, by how many positives are known"
    Console(width=110).print(results_table(results, title))
    judged = "ndcg@100, 5 known" if 5 in sizes else next(iter(columns))
    ours, *plain = found
    best = max(plain, key=lambda learner: results[learner][columns[judged]])
    difference = found[ours][judged] - found[best][judged]
    mean, half, users = _paired(difference, getattr(recommender.protocol, "fold_ins", 1))
    lead = f"{abs(mean):.3f} {'behind' if mean < 0 else 'ahead of'} {best}, the best plain method"
    interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}, {users} users"
    click.echo(f"With {columns[judged]}, {ours} is {lead} ({interval})")


def _paired(differences: np.ndarray, fold_ins: int) -> tuple[float, float, int]:
    """Mean of paired differences, half the width of its 95 % interval, normal over users, and the number of users.

    Args:
      differences: `[users * fold_ins]`, the draws of a user one after the other; NaN where there is no query.
      fold_ins: draws of query and support for each user.
    """
    per_user = differences.reshape(-1, fold_ins).mean(1)
    per_user = per_user[np.isfinite(per_user)]
    return float(per_user.mean()), float(1.96 * per_user.std(ddof=1) / len(per_user) ** 0.5), len(per_user)


def _print_recommendations(recommender: Any, recommendations: Any) -> None:
    """The list; scores of a ranking as odds of being chosen next relative to the first, exp(score - first score)."""
    ranks = recommender.target.kind == "ranking"
    scores = np.array([score for _, score, _ in recommendations])
    if ranks:
        scores = np.exp(scores - scores.max(initial=-np.inf))
    click.echo("\nRecommended (how likely to be chosen next, relative to the first):" if ranks else "\nRecommended:")
    for rank, ((item, _, title), score) in enumerate(zip(recommendations, scores, strict=True), 1):
        click.echo(f"{rank:4}. {score:6.3f}  {_described(recommender, item, title)}")


def _described(recommender: Any, item: Any, title: str | None) -> str:
    """Title, id and, where items have such a field, genres."""
    stock, name = recommender.stock, f"{title}  [{item}]" if title else str(item)
    field = next((f for f in stock.fields if f.name in ("genres", "genre")), None)
    if field is None or field.kind not in ("categorical", "multi") or field.vocabulary.buckets is not None:
        return name
    codes = np.atleast_1d(stock.features[field.name][stock.encode([item])[0]])
    genres = field.vocabulary.decode(codes[codes > 0]).tolist()
    return f"{name}  {', '.join(map(str, genres))}" if genres else name


if __name__ == "__main__":
    main()
