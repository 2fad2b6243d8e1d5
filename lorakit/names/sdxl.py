"""SDXL, Pony and Illustrious too, and its refiner."""

from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.clip import clip, open_clip
from lorakit.names.unet import ROOTS, unet, unet_block, unet_blocks

_LEVELS = 3
_REFINER_LEVELS = 4
_INS = ("IN04", "IN05")
_IND = ("IN07", "IN08")


@cache
def _sdxl() -> tuple[ModuleName, ...]:
    return (
        *unet(widths=(1, 2, 4), depths=(0, 2, 10), middle=10, label=True),
        *clip("text_encoder", 12),
        *open_clip("text_encoder_2", 32),
    )


@cache
def _refiner() -> tuple[ModuleName, ...]:
    return (
        *unet(widths=(1, 2, 4, 4), depths=(0, 4, 4, 0), middle=4, label=True),
        *open_clip("text_encoder_2", 32),
    )


def _presets(deep: tuple[str, ...], shallow: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Name the blocks by the community's rule: 17 values for SD would leave out OUT00-OUT02."""
    return {
        "INS": _INS,
        "IND": _IND,
        "MIDD": (*_IND, "MID", *deep),
        "OUTD": deep,
        "OUTS": shallow,
    }


SDXL = Architecture(
    id="sdxl",
    title="SDXL",
    base_model_version="sdxl_base_v1-0",
    modelspec="stable-diffusion-xl-v1-base",
    marks=("sdxl_base", "sdxl_1"),
    build=_sdxl,
    roots=ROOTS,
    dimensions={"proj_in": 2, "proj_out": 2},
    kohya_original=True,
    clips={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    places={
        "conditioner.embedders.0.transformer.": "text_encoder",
        "conditioner.embedders.1.model.": "text_encoder_2",
    },
    blocks=unet_blocks(_LEVELS),
    block=partial(unet_block, levels=_LEVELS),
    attention=(*_INS, *_IND, "MID", *(f"OUT{i:02}" for i in range(6))),
    presets=_presets(("OUT00", "OUT01", "OUT02"), ("OUT03", "OUT04", "OUT05")),
)
REFINER = Architecture(
    id="sdxl-refiner",
    title="SDXL refiner",
    base_model_version="sdxl_refiner_v1-0",
    modelspec="stable-diffusion-xl-v1-refiner",
    marks=("sdxl_refiner",),
    build=_refiner,
    roots=ROOTS,
    dimensions={"proj_in": 2, "proj_out": 2},
    kohya_original=True,
    clips={"text_encoder_2": "clip_g"},
    places={"conditioner.embedders.0.model.": "text_encoder_2"},
    blocks=unet_blocks(_REFINER_LEVELS),
    block=partial(unet_block, levels=_REFINER_LEVELS),
    attention=(*_INS, *_IND, "MID", *(f"OUT{i:02}" for i in range(3, 9))),
    presets=_presets(("OUT03", "OUT04", "OUT05"), ("OUT06", "OUT07", "OUT08")),
)
