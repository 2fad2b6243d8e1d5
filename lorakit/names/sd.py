"""Stable Diffusion 1.x and 2.x."""

from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.clip import clip, open_clip
from lorakit.names.unet import ROOTS, unet, unet_block, unet_blocks

_LEVELS = 4
_ATTENTION = (
    *(f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8)),
    "MID",
    *(f"OUT{i:02}" for i in range(3, 12)),
)
_PRESETS = {
    "INS": ("IN01", "IN02", "IN04"),
    "IND": ("IN05", "IN07", "IN08"),
    "MIDD": ("IN05", "IN07", "IN08", "MID", "OUT03", "OUT04", "OUT05", "OUT06"),
    "OUTD": ("OUT03", "OUT04", "OUT05", "OUT06"),
    "OUTS": ("OUT07", "OUT08", "OUT09", "OUT10", "OUT11"),
}


@cache
def _unet() -> tuple[ModuleName, ...]:
    return tuple(unet(widths=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle=1, label=False))


@cache
def _sd1() -> tuple[ModuleName, ...]:
    return (*_unet(), *clip("text_encoder", 12))


@cache
def _sd2() -> tuple[ModuleName, ...]:
    # The file holds a 24th layer, whose output nobody uses: a LoRA of it would change nothing.
    return (*_unet(), *open_clip("text_encoder", 23))


SD1 = Architecture(
    id="sd1",
    title="Stable Diffusion 1.x",
    base_model_version="sd_v1",
    modelspec="stable-diffusion-v1",
    marks=("sd_1.5", "sd1.5"),
    build=_sd1,
    roots=ROOTS,
    dimensions={"proj_in": 4, "proj_out": 4},
    kohya_original=False,
    clips={"text_encoder": "clip_l"},
    places={"cond_stage_model.transformer.": "text_encoder"},
    blocks=unet_blocks(_LEVELS),
    block=partial(unet_block, levels=_LEVELS),
    attention=_ATTENTION,
    presets=_PRESETS,
)
SD2 = Architecture(
    id="sd2",
    title="Stable Diffusion 2.x",
    base_model_version="sd_v2",
    modelspec="stable-diffusion-v2-512",
    marks=("stable-diffusion-v2",),
    build=_sd2,
    roots=ROOTS,
    dimensions={"proj_in": 2, "proj_out": 2},
    kohya_original=False,
    clips={"text_encoder": "clip_h"},
    places={
        "cond_stage_model.model.": "text_encoder",
        "conditioner.embedders.0.model.": "text_encoder",
    },
    blocks=unet_blocks(_LEVELS),
    block=partial(unet_block, levels=_LEVELS),
    attention=_ATTENTION,
    presets=_PRESETS,
)
