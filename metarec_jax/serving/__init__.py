"""Serving: the recommender over HTTP (`metarec serve`), with a demo page."""

from metarec_jax.serving.app import create_app
from metarec_jax.serving.service import Service

__all__ = ["Service", "create_app"]
