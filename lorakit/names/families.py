"""The architectures that lorakit knows by name: a new one is its file and its line here."""

from lorakit.names.architectures import Architecture
from lorakit.names.sd import SD1, SD2
from lorakit.names.sdxl import REFINER, SDXL

ARCHITECTURES: tuple[Architecture, ...] = (SD1, SD2, SDXL, REFINER)
"""Where names fit several alike, the earlier one is meant."""
