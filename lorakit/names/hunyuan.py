"""HunyuanVideo and HunyuanImage 2.1: the names of diffusers, of Tencent's file, and ComfyUI's."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.clip import clip
from lorakit.names.decoder import decoder
from lorakit.names.flux import (
    ADD_QKV,
    EMBEDDER,
    TO_QKV,
    Names,
    final_modulation,
    flux_blocks,
    named,
    norms,
)
from lorakit.names.t5 import t5
from lorakit.names.wan import stack_block

_DOUBLES, _SINGLES, _REFINERS = 20, 40, 2
_TIME_LAYERS = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_DOUBLE: Names = {
    "img_attn_qkv": TO_QKV,
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_qkv": ADD_QKV,
    "txt_attn_proj": "attn.to_add_out",
    **{
        f"{there}_mlp.{layer}": f"{here}.{linear}"
        for there, here in {"img": "ff", "txt": "ff_context"}.items()
        for layer, linear in {"fc1": "net.0.proj", "fc2": "net.2"}.items()
    },
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
}
_DOUBLE_NORMS = {
    f"{there}_attn_{letter}_norm": f"attn.norm_{here}{letter}"
    for there, here in {"img": "", "txt": "added_"}.items()
    for letter in "qk"
}
_SINGLE: Names = {
    "linear1": (*TO_QKV, "proj_mlp"),
    "linear2": "proj_out",
    "modulation.linear": "norm.linear",
}
_SINGLE_NORMS = {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"}
_REFINER: Names = {
    "self_attn_qkv": TO_QKV,
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_REFINER_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_ENDS: Names = {
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    **{
        f"txt_in.{there}": f"context_embedder.time_text_embed.{here}"
        for there, here in {
            "t_embedder.mlp.0": "timestep_embedder.linear_1",
            "t_embedder.mlp.2": "timestep_embedder.linear_2",
            "c_embedder.linear_1": "text_embedder.linear_1",
            "c_embedder.linear_2": "text_embedder.linear_2",
        }.items()
    },
    "final_layer.linear": "proj_out",
}
_VIDEO_ENDS: Names = {
    f"{there}_in.{layer}": f"time_text_embed.{here}_embedder.{linear}"
    for there, here, layers in (
        ("time", "timestep", _TIME_LAYERS),
        ("guidance", "guidance", _TIME_LAYERS),
        ("vector", "text", EMBEDDER),
    )
    for layer, linear in layers.items()
}
_IMAGE_ENDS: Names = {
    **{
        f"{there}_in.{layer}": f"time_guidance_embed.{here}.{linear}"
        for there, here in {
            "time": "timestep_embedder",
            "time_r": "timestep_embedder_r",
            "guidance": "guidance_embedder",
        }.items()
        for layer, linear in _TIME_LAYERS.items()
    },
    **{f"byt5_in.fc{i}": f"context_embedder_2.linear_{i}" for i in (1, 2, 3)},
}
_IMAGE_NORMS = {"byt5_in.layernorm": "context_embedder_2.norm"}
_APART_DOUBLE: Names = {
    f"{side}_attn_{letter}": module
    for side, modules in {"img": TO_QKV, "txt": ADD_QKV}.items()
    for letter, module in zip("qkv", modules, strict=True)
}
_APART_SINGLE: Names = {
    **{f"linear1_{letter}": module for letter, module in zip("qkv", TO_QKV, strict=True)},
    "linear1_mlp": "proj_mlp",
    "linear2.fc": "proj_out",
}
"""What Tencent's own code of HunyuanImage makes of the fused layers."""
_COMFYUI = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_attn_q_norm": "_attn.norm.query_norm",
    "_attn_k_norm": "_attn.norm.key_norm",
    ".q_norm": ".norm.query_norm",
    ".k_norm": ".norm.key_norm",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    ".modulation.linear": ".modulation.lin",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
}
_EMBEDDERS = ("img_in", "txt_in", "time_in", "time_r_in", "guidance_in", "vector_in", "byt5_in")
_DIFFUSERS_EMBEDDERS = ("x_embedder", "context_embedder", "time_text_embed")
_ROOTS = {
    **dict.fromkeys(("double_blocks", "transformer_blocks"), "D"),
    **dict.fromkeys(("single_blocks", "single_transformer_blocks"), "S"),
    **dict.fromkeys((*_EMBEDDERS, *_DIFFUSERS_EMBEDDERS), "IN"),
    **dict.fromkeys(("context_embedder_2", "time_guidance_embed"), "IN"),
    **dict.fromkeys(("final_layer", "norm_out", "proj_out"), "OUT"),
}


def _stacks(*, apart: bool) -> Iterator[ModuleName]:
    """Yield the modules of the refiner and of all blocks.

    Args:
        apart: whether files may hold the fused layers apart too.

    Source: diffusers' `convert_hunyuan_video_transformer_to_diffusers` and its script for
    HunyuanImage.
    """
    for i in range(_REFINERS):
        here = f"context_embedder.token_refiner.refiner_blocks.{i}."
        there = f"txt_in.individual_token_refiner.blocks.{i}."
        yield from named(_REFINER, here=here, there=there)
        yield from norms(_REFINER_NORMS, here=here, there=there, parameter=".weight")
    for i in range(_DOUBLES):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        also = {there: _APART_DOUBLE} if apart else {}
        yield from named(_DOUBLE, here=here, there=there, also=also)
        yield from norms(_DOUBLE_NORMS, here=here, there=there, parameter=".weight")
    for i in range(_SINGLES):
        here, there = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        also = {there: _APART_SINGLE} if apart else {}
        yield from named(_SINGLE, here=here, there=there, also=also)
        yield from norms(_SINGLE_NORMS, here=here, there=there, parameter=".weight")


def _as_comfyui_too(names: Iterable[ModuleName]) -> Iterator[ModuleName]:
    """Give the modules ComfyUI's paths as well.

    Source: `process_unet_state_dict` of ComfyUI's HunyuanVideo.
    """
    for name in names:
        path = name.original
        for theirs, comfyui in _COMFYUI.items():
            path = path.replace(theirs, comfyui)
        also = () if path == name.original else ((path, name.part),)
        yield replace(name, also=(*name.also, *also))


@cache
def _video() -> tuple[ModuleName, ...]:
    denoiser = (*named({**_ENDS, **_VIDEO_ENDS}), final_modulation(), *_stacks(apart=False))
    return (
        *_as_comfyui_too(denoiser),
        *decoder("text_encoder", 32),
        *clip("text_encoder_2", 12),
    )


@cache
def _image() -> tuple[ModuleName, ...]:
    denoiser = (
        *named({**_ENDS, **_IMAGE_ENDS}),
        *norms(_IMAGE_NORMS, here="", there="", parameter=".weight"),
        final_modulation(),
        *_stacks(apart=True),
    )
    return (
        *_as_comfyui_too(denoiser),
        *decoder("text_encoder", 28),
        *t5("text_encoder_2", 12),
    )


HUNYUAN_VIDEO = Architecture(
    id="hunyuan-video",
    title="HunyuanVideo",
    base_model_version="hunyuan_video",
    modelspec="hunyuan-video",
    marks=("hunyuanvideo",),
    build=_video,
    roots=tuple(_ROOTS),
    widths=dict.fromkeys(("to_q", "qkv", "linear1"), 3072),
    kohya_original=True,
    clips={"text_encoder": "llama", "text_encoder_2": "clip_l"},
    places={},
    blocks=flux_blocks(("BASE",), _DOUBLES, _SINGLES),
    block=partial(stack_block, roots=_ROOTS),
    family="hunyuan-video",
)
HUNYUAN_IMAGE = Architecture(
    id="hunyuan-image",
    title="HunyuanImage 2.1",
    base_model_version="hunyuan-image-2.1",
    modelspec="hunyuan-image-2.1",
    marks=("hunyuan_image", "hunyuanimage"),
    build=_image,
    roots=tuple(_ROOTS),
    widths=dict.fromkeys(("to_q", "qkv", "linear1"), 3584),
    kohya_original=True,
    clips={"text_encoder": "qwen25_7b", "text_encoder_2": "byt5_small"},
    places={},
    blocks=flux_blocks(("BASE",), _DOUBLES, _SINGLES),
    block=partial(stack_block, roots=_ROOTS),
    family="hunyuan-image",
)
