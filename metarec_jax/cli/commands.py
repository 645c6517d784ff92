"""Commands: `metarec quickstart`, `train`, `evaluate`, `recommend`, `explain`, `serve`, ..."""

import gc
import json
import os
import warnings
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from metarec_jax.cli.arguments import (
    COLUMN,
    ITEMS,
    PROTOCOL,
    SETTING,
    USERS,
    among,
    history,
    item_id,
    number,
    pairs,
    protocol_of,
    read,
)  # fmt: skip
from metarec_jax.cli.output import described, print_evaluation, print_ranking, print_recommendations

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
    Read:         metarec docs                                  (tutorials, strategies, every option)
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
    print_ranking(recommender)
    click.echo("\nA new user has rated five films:")
    assert data.titles is not None
    for item, rating in EXAMPLE_USER.items():
        title = data.titles[data.items.encode([item])[0]]
        click.echo(f"  {rating} of 5  {described(recommender, item, title)}")
    print_recommendations(recommender, recommender.recommend(EXAMPLE_USER, k=10))
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
    help='How to adapt to a user: see `metarec docs strategies`.  [default: "stack"; for clicks and ratings "alpaca"]',
)
@click.option("--model", default=None, help="Network: see `metarec docs strategies`; by default the strategy's own.")
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
@PROTOCOL
@SETTING
@COLUMN
@ITEMS
@USERS
@click.option("--tensorboard", type=click.Path(), default=None, help="Folder for TensorBoard's event files.")
@click.option("--checkpoint", type=click.Path(), default=None, help="File from which a killed training goes on.")
@click.option("--out", default=DEFAULT_MODEL, show_default=True, help="Folder to save the model in.")
def train(
    data: str, objective: Any, target: Any, strategy: str | None, model: str | None, threshold: float,
    users: tuple[int, int], query: int, epochs: int | None, seed: int, protocol: str | None, settings: tuple[str, ...],
    column: tuple[str, ...], item_table: str | None, user_table: str | None, tensorboard: str | None,
    checkpoint: str | None, out: str,
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
    source = click.get_current_context().get_parameter_source
    typed = {name for name in ("threshold", "users", "query") if source(name) is not ParameterSource.DEFAULT}
    if objective == "ranking" and (wrong := sorted(typed & {"users", "query"})):
        raise click.UsageError(f"--{wrong[0]} is for --objective click or rating")
    of_tasks = {"minimum": users[0], "maximum": users[1], "query": query}
    default = {"threshold": threshold} | (of_tasks if objective != "ranking" else {})
    options = {"minimum": "users", "maximum": "users"}
    given = {name: value for name, value in default.items() if options.get(name, name) in typed}
    chosen = protocol_of(objective, protocol, settings, given, default)
    table = read(data, column, item_table, user_table)
    kept: dict[str, Any] = {"tensorboard": tensorboard, "checkpoint": checkpoint}
    recommender = mr.train(
        table, strategy, model, objective=objective, seed=seed, protocol=chosen, epochs=epochs, **kept
    )
    recommender.save(out)
    click.echo(
        f"The model is in {out}/. Next:\n  metarec evaluate {out} {data}\n  metarec recommend {out} ITEM=RATING ..."
    )


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.argument("data")
@click.option("--support", type=int, default=None, help="Adapt to at most so many ratings of a user (default: all).")
@click.option("--candidates", default="query", show_default=True, help=CANDIDATES)
@COLUMN
@ITEMS
@USERS
@click.option("--json", "as_json", is_flag=True, help="Print every metric of every learner as JSON.")
def evaluate(
    model: str, data: str, support: int | None, candidates: str, column: tuple[str, ...], item_table: str | None,
    user_table: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Metrics of MODEL on DATA's test users, beside the plain baselines on the same tasks.

    DATA is what the model was trained on; the test users are those that training never saw. A model that ranks is
    judged among all items of the catalogue.
    """
    import metarec_jax as mr

    recommender = mr.load(model)
    if recommender.target.kind == "ranking" and candidates != "query":
        raise click.UsageError("--candidates is for clicks; this model ranks, and is judged among all items")
    table = read(data, column, item_table, user_table)
    if as_json:
        click.echo(json.dumps(recommender.evaluate(table, support=support, candidates=among(candidates)), indent=1))
    elif recommender.target.kind != "ranking":
        print_evaluation(recommender, table, support, among(candidates))
    else:
        print_ranking(recommender, table, support)


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
    known = history(recommender, ratings)
    dense = {f.name for f in recommender.catalogue.user_fields if f.kind == "dense"}
    attributes = {name: number(v, float, name) if name in dense else v for name, v in pairs(user)}
    with warnings.catch_warnings(record=True, action="always", category=mr.UnknownItemWarning) as notes:
        recommended = recommender.recommend(known, k, exclude_seen=not include_seen, user=attributes)
    for note in notes:
        click.echo(f"note: {note.message}", err=True)
    print_recommendations(recommender, recommended)


@cli.command()
@click.argument("data")
@click.option("--strategy", "-s", "strategies", multiple=True, required=True, help="One of them. Repeatable.")
@click.option("--splits", default=10, show_default=True, help="Random splits, seeds 0 and up.")
@click.option(
    "--target", type=click.Choice(["click", "rating"]), default="click", show_default=True, help="What to predict."
)
@click.option("--epochs", default=60, show_default=True, help="At most so many.")
@click.option("--candidates", default="query", show_default=True, help=CANDIDATES)
@PROTOCOL
@SETTING
@COLUMN
@ITEMS
@USERS
@click.option("--out", default="comparison", show_default=True, help="Folder; what is there already is not run again.")
def compare(
    data: str, strategies: tuple[str, ...], splits: int, target: Any, epochs: int, candidates: str,
    protocol: str | None, settings: tuple[str, ...], column: tuple[str, ...], item_table: str | None,
    user_table: str | None, out: str,
) -> None:  # fmt: skip
    """Train strategies on several splits of DATA and compare them with the plain baselines.

    May be stopped and started again. Example: metarec compare ml-100k -s alpaca -s maml --splits 10
    """
    import metarec_jax as mr

    found = mr.evaluation.compare(
        read(data, column, item_table, user_table),
        strategies,
        splits=splits,
        protocol=protocol_of(target, protocol, settings, {}, {}),
        folder=out,
        candidates=among(candidates),
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
    known = history(recommender, ratings)
    found = recommender.explain(known, item_id(recommender, item))
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


@cli.command()
@click.argument("page", required=False)
@click.option("--site", "folder", type=click.Path(file_okay=False), help="Write pages and API reference here as HTML.")
def docs(page: str | None, folder: str | None) -> None:
    """Print PAGE of the documentation; without PAGE, list the pages.

    \b
    Example: metarec docs shop-clicks
             metarec docs --site site
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from metarec_jax.cli.site import build, read_page

    if page and folder:
        raise click.UsageError("--site writes all pages: leave out PAGE")
    if folder:
        click.echo(f"{build(Path(folder))} is ready; open it in a browser")
    else:
        Console().print(Markdown(read_page(page)))


def _keep_objects() -> None:
    """All objects there are now stay out of collections, which would stop every request to walk them."""
    gc.collect()
    gc.freeze()
