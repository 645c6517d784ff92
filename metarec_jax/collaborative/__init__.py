"""Collaborative filtering, fitted in closed form on the host: strategies start from it, tables compare with it."""
