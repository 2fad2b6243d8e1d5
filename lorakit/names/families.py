"""The architectures that lorakit knows by name: a new one is its file and its line here."""

from lorakit.names.architectures import Architecture
from lorakit.names.flux import CHROMA, FLUX
from lorakit.names.flux2 import FLUX2, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from lorakit.names.sd import SD1, SD2
from lorakit.names.sd3 import SD3, SD3_LARGE
from lorakit.names.sdxl import REFINER, SDXL

ARCHITECTURES: tuple[Architecture, ...] = (
    *(SD1, SD2, SDXL, REFINER, FLUX, CHROMA, SD3, SD3_LARGE),
    *(FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2),
)
"""Where names fit several alike, the earlier one is meant."""
