"""Strings only: what a key, a module, a block and an argument mean."""
