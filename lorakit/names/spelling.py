"""The prefix of a module's name: which component and whose dialect it spells."""

import re
from dataclasses import dataclass
from functools import lru_cache

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("unet", "transformer")

_KOHYA = {
    "lora_unet__": "unet",
    "lora_unet_": "unet",
    "lora_prior_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_prior_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
}
_ENCODERS = {"clip_g": "text_encoder_2", "t5xxl": "text_encoder_3", "t5": "text_encoder_3"}
"""ComfyUI's names of text encoders that are not the first or the only one."""
_COMFYUI = {
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "pipe.dit.": "transformer",
}
"""ComfyUI's names of the denoiser, and DiffSynth's."""
_COMFYUI_TEXT = re.compile(r"text_encoders\.(?P<encoder>\w+)\.(?:transformer\.)?")
_OMI_TEXT = re.compile(r"(?P<encoder>clip_[lgh]|t5)\.")
"""OneTrainer's own names."""
_COMPONENTS = {f"{component}.": component for component in (*DENOISERS, *TEXT_ENCODERS)}
_PEFT = "base_model.model."
_OUTER = (_PEFT, *_COMPONENTS)
"""What may stand before another prefix, where a trainer wrapped a whole pipeline."""
_ORIGINAL_UNET = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb")
_DIFFUSERS_UNET = ("down_blocks", "mid_block", "up_blocks", "time_embedding", "add_embedding")
_UNET = re.compile(rf"(?:{'|'.join((*_ORIGINAL_UNET, *_DIFFUSERS_UNET))})[._]")
_TEXT = re.compile(
    r"text_model[._](?:encoder|embeddings|final)|text_projection$"
    r"|encoder[._]layers[._]\d+[._](?:self_attn|mlp)[._]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """A module's name without its prefix.

    `component` is empty where neither a prefix nor the name tells it; `path` is dotted or flat, as
    the file has it; `encoder` is ComfyUI's name of a text encoder.
    """

    component: str
    path: str
    dialect: str
    prefix: str
    encoder: str = ""


@lru_cache(maxsize=2**16)
def spelling_of(raw: str) -> Spelling:
    """Split a module's name into component and path."""
    for pattern in (_COMFYUI_TEXT, _OMI_TEXT):
        if found := pattern.match(raw):
            name = found["encoder"]
            return Spelling(
                component=_ENCODERS.get(name, TEXT_ENCODERS[0]),
                path=raw[found.end() :],
                dialect="comfyui",
                prefix=found[0],
                encoder="t5xxl" if name == "t5" else name,
            )
    for dialect, table in (("kohya", _KOHYA), ("comfyui", _COMFYUI), ("diffusers", _COMPONENTS)):
        for prefix, component in table.items():
            if raw.startswith(prefix):
                return _below(raw, prefix, component, dialect)
    return _below(raw, "", "", "diffusers" if "." in raw else "kohya")


def _below(raw: str, prefix: str, component: str, dialect: str) -> Spelling:
    path = raw.removeprefix(prefix)
    if path.startswith(_PEFT) and prefix in ("", *_COMPONENTS):
        prefix, path, dialect = prefix + _PEFT, path.removeprefix(_PEFT), "peft"
        component = component or ("text_encoder" if _TEXT.match(path) else "unet")
    for inner, held in (_COMPONENTS | _COMFYUI).items():
        if prefix.endswith(_OUTER) and path.startswith(inner):
            prefix, path, component = prefix + inner, path.removeprefix(inner), held
    if not component and _UNET.match(path):
        component = "unet"
    elif not component and _TEXT.match(path):
        component = "text_encoder"
    return Spelling(component=component, path=path, dialect=dialect, prefix=prefix)
