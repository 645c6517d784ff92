"""Inference: from what is known of a user to recommendations, and why."""
