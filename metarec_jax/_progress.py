"""Progress bars and result tables for the terminal (rich), and TensorBoard logs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Report = Callable[[int, dict[str, float]], None]


@contextmanager
def epochs_bar(show: bool, epochs: int, kind: str) -> Iterator[Report | None]:
    """Show a progress bar over epochs; yields the callback for `fit`, or None if hidden.

    Args:
      show: whether to show the bar.
      epochs: maximum number of epochs (training may stop early).
      kind: "click", "rating" or "ranking"; selects the metric beside the bar.
    """
    if not show:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    metric = {"click": "within_user_auc", "rating": "rmse", "ranking": "ndcg@100"}[kind]
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}")) as bar:
        task = bar.add_task("", total=epochs, note="compiling")

        def report(epoch: int, entry: dict[str, float]) -> None:
            validation = f"  validation {metric} {entry[metric]:.4f}" if metric in entry else ""
            bar.update(task, completed=epoch + 1, note=f"loss {entry['loss']:.4f}{validation}")

        yield report


@contextmanager
def tensorboard(folder: str | Path | None) -> Iterator[Report | None]:
    """Log each epoch's loss and validation metrics for TensorBoard; yields the callback for `fit`.

    Args:
      folder: where to write the event files; None writes nothing and yields None.

    Raises:
      ModuleNotFoundError: tensorboardX is not installed.
    """
    if folder is None:
        yield None
        return
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing for TensorBoard needs tensorboardX: pip install 'metarec-jax[tensorboard]'"
        ) from error
    with SummaryWriter(str(folder)) as writer:

        def report(epoch: int, entry: dict[str, float]) -> None:
            for name, value in entry.items():
                writer.add_scalar("loss/train" if name == "loss" else f"validation/{name}", value, epoch)

        yield report


def results_table(results: Mapping[str, Mapping[str, float]], title: str) -> Any:
    """Build a rich table with a row per learner and a column per metric."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("learner")
    metrics = list(next(iter(results.values())))
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for learner, values in results.items():
        table.add_row(learner, *(f"{values[m]:.4f}" for m in metrics))
    return table


@contextmanager
def counter(show: bool, what: str, total: int | None = None) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar with a count; yields a function that advances it.

    Args:
      show: whether to show the bar.
      what: label of the bar.
      total: final count, if known.
    """
    if not show:
        yield lambda more: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn(what), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda more: bar.advance(task, more)
