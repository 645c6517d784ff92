"""Collaborative filtering fitted on the host, for initialising strategies and as baselines."""
