"""Evaluation: baselines, comparisons of learners, and reports."""

from metarec_jax._moved import moved
from metarec_jax.data.fingerprint import fingerprint
from metarec_jax.evaluation import counterfactual, intervals
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.comparison import Comparison, compare
from metarec_jax.evaluation.comparison import load as load_comparison
from metarec_jax.evaluation.protocol import describe, in_words
from metarec_jax.evaluation.reports import markdown, report

__all__ = [
    "BASELINES", "Comparison", "compare", "counterfactual", "describe", "fingerprint", "in_words", "intervals",
    "load_comparison", "markdown", "report",
]  # fmt: skip

__getattr__ = moved(
    __name__,
    {"metrics": "metarec_jax.metrics", "score_baselines": "metarec_jax.evaluation.baselines.score_baselines"}
    | {name: f"metarec_jax.metrics.{name}" for name in ("Scores", "lists", "score_tasks", "summarise")},
)
