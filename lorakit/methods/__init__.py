"""Ways to combine the ΔW of one module."""
