"""Inference: recommendations, predictions and explanations for known and new users."""
