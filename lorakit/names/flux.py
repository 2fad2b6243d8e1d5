"""Flux.1 and Chroma: diffusers' names, those of the original single file, and XLabs'."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import accumulate

from lorakit.names.architectures import Alias, Architecture, ModuleName, Part
from lorakit.names.clip import clip
from lorakit.names.t5 import XXL, t5

Names = Mapping[str, str | tuple[str, ...]]
"""Path in a file -> its diffusers path, or those of the modules that its rows hold in turn."""

_DOUBLES, _SINGLES = 19, 38
_GUIDANCE_LAYERS = 5
_SHARES = {"proj_mlp": 4}
"""Rows of a module in multiples of the model's width, where they are not 1."""

TO_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADD_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
ATTENTION: Names = {
    "img_attn.qkv": TO_QKV,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ADD_QKV,
    "txt_attn.proj": "attn.to_add_out",
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}
ENDS: Names = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}

_DOUBLE: Names = {
    **ATTENTION,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_MODULATION: Names = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE: Names = {"linear1": (*TO_QKV, "proj_mlp"), "linear2": "proj_out"}
_SINGLE_MODULATION: Names = {"modulation.lin": "norm.linear"}
_XLABS_DOUBLE: Names = {
    "processor.qkv_lora1": TO_QKV,
    "processor.proj_lora1": "attn.to_out.0",
    "processor.qkv_lora2": ADD_QKV,
    "processor.proj_lora2": "attn.to_add_out",
}
_XLABS_SINGLE: Names = {
    "processor.qkv_lora": TO_QKV,
    "processor.proj_lora": "proj_out",
    "linear1_qkv": TO_QKV,
}
"""`linear1_qkv` is what ComfyUI makes of XLabs' `processor.qkv_lora`."""
_TIME: Names = {
    f"{there}_in.{layer}": f"time_text_embed.{here}_embedder.{linear}"
    for there, here in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items()
    for layer, linear in EMBEDDER.items()
}
_GUIDANCE: Names = {
    "in_proj": "in_proj",
    "out_proj": "out_proj",
    **{
        f"layers.{i}.{layer}": f"layers.{i}.{linear}"
        for i in range(_GUIDANCE_LAYERS)
        for layer, linear in EMBEDDER.items()
    },
}
_GUIDANCE_NORMS = {f"norms.{i}": f"norms.{i}" for i in range(_GUIDANCE_LAYERS)}

BLOCK_ROOTS = ("double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks")
END_ROOTS = (
    *("img_in", "txt_in", "final_layer"),
    *("x_embedder", "context_embedder", "norm_out", "proj_out"),
)
_TIME_ROOTS = ("time_in", "vector_in", "guidance_in", "time_text_embed")
_BLOCK = re.compile(
    r"transformer\.(?:(?P<single>single_)|double_)?(?:transformer_)?blocks\.(?P<number>\d+)\."
)
_IN = tuple(f"transformer.{root}" for root in ("x_embedder", "context_embedder", "time_"))
_SHARED = (
    "transformer.distilled_guidance_layer.",
    "transformer.double_stream_",
    "transformer.single_stream_",
)
"""What Chroma and Flux.2 make of the time once for all blocks."""
_OUT = ("transformer.norm_out.", "transformer.proj_out")


def named(
    names: Names, *, here: str = "", there: str = "", also: Mapping[str, Names] | None = None
) -> Iterator[ModuleName]:
    """Yield a transformer's modules from a table.

    Args:
        names: the single file's paths.
        here: what diffusers' paths begin with.
        there: what the single file's paths begin with.
        also: beginning of the paths in other files -> their tables.
    """
    aliases: dict[str, list[Alias]] = {}
    for start, table in (also or {}).items():
        for path, module, part in _held(table):
            aliases.setdefault(module, []).append((start + path, part))
    for original, module, part in _held(names):
        yield ModuleName(
            module=f"transformer.{here}{module}",
            original=there + original,
            part=part,
            also=tuple(aliases.get(module, ())),
        )


def _held(names: Names) -> Iterator[tuple[str, str, Part | None]]:
    for path, held in names.items():
        if isinstance(held, str):
            yield path, held, None
            continue
        shares = [_SHARES.get(module, 1) for module in held]
        for module, share, stop in zip(held, shares, accumulate(shares), strict=True):
            yield path, module, (stop - share, stop, sum(shares))


def norms(
    names: Mapping[str, str], *, here: str, there: str, parameter: str = ".scale"
) -> Iterator[ModuleName]:
    """Yield a transformer's norms from a table: the single file's paths -> diffusers'."""
    for original, module in names.items():
        yield ModuleName(
            module=f"transformer.{here}{module}",
            original=there + original,
            norm=True,
            parameter=parameter,
        )


def final_modulation() -> ModuleName:
    """Return the last modulation: shift, scale in the single file, scale, shift in diffusers.

    Source: diffusers' `swap_scale_shift`.
    """
    return ModuleName(
        module="transformer.norm_out.linear", original="final_layer.adaLN_modulation.1", swap=True
    )


def _blocks(double: Names, single: Names) -> Iterator[ModuleName]:
    """Yield the modules of all blocks.

    Source: diffusers' `convert_flux_transformer_checkpoint_to_diffusers` and
    `_convert_xlabs_flux_lora_to_diffusers`.
    """
    for i in range(_DOUBLES):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        yield from named(double, here=here, there=there, also={there: _XLABS_DOUBLE})
        yield from norms(DOUBLE_NORMS, here=here, there=there)
    for i in range(_SINGLES):
        here, there = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield from named(single, here=here, there=there, also={there: _XLABS_SINGLE})
        yield from norms(SINGLE_NORMS, here=here, there=there)


@cache
def _flux() -> tuple[ModuleName, ...]:
    return (
        *named({**ENDS, **_TIME}),
        final_modulation(),
        *_blocks({**_DOUBLE, **_DOUBLE_MODULATION}, {**_SINGLE, **_SINGLE_MODULATION}),
        *clip("text_encoder", 12),
        *t5("text_encoder_2", XXL),
    )


@cache
def _chroma() -> tuple[ModuleName, ...]:
    guidance = "distilled_guidance_layer."
    return (
        *named(ENDS),
        *named(_GUIDANCE, here=guidance, there=guidance),
        *norms(_GUIDANCE_NORMS, here=guidance, there=guidance),
        *_blocks(_DOUBLE, _SINGLE),
        *t5("text_encoder", XXL),
    )


def flux_blocks(text: Iterable[str], doubles: int, singles: int) -> tuple[str, ...]:
    """Return the block ids of a Flux: its text encoders', IN, D00…, S00…, OUT.

    Source: LoRA Block Weight's list of 61 for Flux.1.
    """
    double, single = (
        [f"{kind}{i:02}" for i in range(n)] for kind, n in (("D", doubles), ("S", singles))
    )
    return (*text, "IN", *double, *single, "OUT")


def flux_block(module: str) -> str:
    """Return the block id of a Flux's module; IN are the embedders, OUT is the final layer.

    What the blocks share is IN too, since it is made of the time.

    Source: LoRA Block Weight, for which every name with `_in` is IN.
    """
    if found := _BLOCK.match(module):
        return f"{'S' if found['single'] else 'D'}{int(found['number']):02}"
    if module.startswith(_OUT):
        return "OUT"
    return "IN" if module.startswith((*_IN, *_SHARED)) else "OTHER"


FLUX = Architecture(
    id="flux",
    title="Flux.1",
    base_model_version="flux1",
    modelspec="flux-1-dev",
    marks=("flux-1", "flux.1", "flux_1"),
    build=_flux,
    roots=(*BLOCK_ROOTS, *END_ROOTS, *_TIME_ROOTS),
    widths={"to_q": 3072, "qkv": 3072},
    kohya_original=True,
    clips={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    # kohya leaves lora_te2_ to CLIP-G, as in SD 3.
    kohya_text={"text_encoder_2": "lora_te3_"},
    places={},
    blocks=flux_blocks(("CLIP", "T5"), _DOUBLES, _SINGLES),
    block=flux_block,
    text_blocks={"text_encoder": "CLIP", "text_encoder_2": "T5"},
    family="flux",
)
CHROMA = Architecture(
    id="chroma",
    title="Chroma",
    base_model_version="chroma",
    modelspec="chroma",
    build=_chroma,
    roots=(*BLOCK_ROOTS, *END_ROOTS, "distilled_guidance_layer"),
    widths={"to_q": 3072, "qkv": 3072},
    kohya_original=True,
    clips={"text_encoder": "t5xxl"},
    kohya_text={"text_encoder": "lora_te3_"},
    places={},
    blocks=flux_blocks(("CLIP", "T5"), _DOUBLES, _SINGLES),
    block=flux_block,
    text_blocks={"text_encoder": "T5"},
    family="flux",
)
