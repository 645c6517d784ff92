"""Wrappers: strategies made of other strategies."""
