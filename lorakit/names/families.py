"""The architectures that lorakit knows by name: a new one is its file and its line here."""

from lorakit.names.anima import ANIMA
from lorakit.names.architectures import Architecture
from lorakit.names.auraflow import AURAFLOW
from lorakit.names.flux import CHROMA, FLUX
from lorakit.names.flux2 import FLUX2, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from lorakit.names.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from lorakit.names.ltx import LTX, LTX2, LTX_13B
from lorakit.names.lumina import LUMINA2, Z_IMAGE
from lorakit.names.pixart import PIXART
from lorakit.names.qwen_image import QWEN_IMAGE
from lorakit.names.sd import SD1, SD2
from lorakit.names.sd3 import SD3, SD3_LARGE
from lorakit.names.sdxl import REFINER, SDXL
from lorakit.names.wan import WAN, WAN_SMALL

ARCHITECTURES: tuple[Architecture, ...] = (
    *(SD1, SD2, SDXL, REFINER),
    *(FLUX, CHROMA, SD3, SD3_LARGE, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2),
    *(QWEN_IMAGE, Z_IMAGE, LUMINA2, WAN_SMALL, WAN, HUNYUAN_VIDEO, HUNYUAN_IMAGE),
    *(LTX, LTX_13B, LTX2, PIXART, AURAFLOW, ANIMA),
)
"""Where names fit several alike, the earlier one is meant."""
