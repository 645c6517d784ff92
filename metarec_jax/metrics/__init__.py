"""Metrics of scores, of ranked lists, and of strategies on task batches."""

from metarec_jax.metrics import lists
from metarec_jax.metrics.pointwise import (
    accuracy,
    calibration_error,
    click_metrics,
    f1,
    f1_at,
    hit_rate_at,
    log_loss,
    mae,
    map_at,
    mean_defined,
    mrr_at,
    ndcg_at,
    precision,
    precision_at,
    ranking_metrics,
    rating_metrics,
    recall,
    recall_at,
    reliability,
    rmse,
)
from metarec_jax.metrics.ranking import Lists, list_metrics, rank
from metarec_jax.metrics.roc import auc, within_user_auc
from metarec_jax.metrics.scoring import Scores, score_tasks, summarise

__all__ = [
    "Lists", "Scores", "accuracy", "auc", "calibration_error", "click_metrics", "f1", "f1_at", "hit_rate_at",
    "list_metrics", "lists", "log_loss", "mae", "map_at", "mean_defined", "mrr_at", "ndcg_at", "precision",
    "precision_at", "rank", "ranking_metrics", "rating_metrics", "recall", "recall_at", "reliability", "rmse",
    "score_tasks", "summarise", "within_user_auc",
]  # fmt: skip
