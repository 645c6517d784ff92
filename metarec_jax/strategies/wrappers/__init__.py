"""Wrappers: strategies built from other strategies."""
