"""A module's tensors and its ΔW."""
