"""Ways to combine the ΔW of one module: one file a family, one table of functions."""
