"""Evaluation: metrics, the plain baselines, comparisons of many learners and their reports."""

from metarec_jax.evaluation import counterfactual, intervals, lists, metrics
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.compare import Comparison, compare
from metarec_jax.evaluation.compare import load as load_comparison
from metarec_jax.evaluation.evaluate import Scores, score_baselines, score_tasks, summarise
from metarec_jax.evaluation.protocol import describe, fingerprint, in_words
from metarec_jax.evaluation.report import markdown, report

__all__ = [
    "BASELINES", "Comparison", "Scores", "compare", "counterfactual", "describe", "fingerprint", "in_words",
    "intervals", "lists", "load_comparison", "markdown", "metrics", "report", "score_baselines", "score_tasks",
    "summarise",
]  # fmt: skip
