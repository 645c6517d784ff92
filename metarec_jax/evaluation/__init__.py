"""Evaluation: metrics, the plain baselines, and both applied to a split's tasks."""

from metarec_jax.evaluation import lists, metrics
from metarec_jax.evaluation.baselines import BASELINES
from metarec_jax.evaluation.evaluate import Scores, score_baselines, score_tasks, summarise

__all__ = ["BASELINES", "Scores", "lists", "metrics", "score_baselines", "score_tasks", "summarise"]
