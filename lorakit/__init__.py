"""Merge, extract, resize and cut LoRAs: exact, streaming, fast."""
