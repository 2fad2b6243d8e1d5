"""Matrices only: no key, no file."""
