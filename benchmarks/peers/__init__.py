"""Packages that do the same: each is imported only where it is measured, and left out if absent."""
