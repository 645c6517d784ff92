"""Table: metrics by learner, as a dict that prints itself and converts to data frames."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl


class Table(dict[str, dict[str, float]]):
    """Metrics by learner, `{learner: {metric: value}}`; the learner that was trained comes first.

    Printed, it has a line for each metric and a column for each learner.

    Example:
      >>> from metarec_jax.metrics.table import Table
      >>> print(Table({"stack": {"ndcg@10": 0.25}, "popularity": {"ndcg@10": 0.125}}))
               stack  popularity
      ndcg@10  0.250       0.125
    """

    def __str__(self) -> str:
        metrics = list(dict.fromkeys(metric for values in self.values() for metric in values))
        rows = [["", *self]] + [[m, *(f"{v[m]:.3f}" if m in v else "" for v in self.values())] for m in metrics]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
        return "\n".join("  ".join(row).rstrip() for row in cells)

    __repr__ = __str__

    def to_polars(self) -> "pl.DataFrame":
        """Return a polars frame with the column "learner" and one column per metric."""
        import polars as pl

        return pl.DataFrame([{"learner": learner, **values} for learner, values in self.items()])

    def to_pandas(self) -> Any:
        """Return a pandas frame with the learners as index and one column per metric."""
        import pandas as pd

        return pd.DataFrame.from_dict(dict(self), orient="index")

    def _repr_html_(self) -> str:
        return self.to_polars()._repr_html_()
