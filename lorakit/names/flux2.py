"""Flux.2: the dev model and the two sizes of klein."""

from collections.abc import Iterator
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.decoder import decoder
from lorakit.names.flux import (
    ADD_QKV,
    ATTENTION,
    BLOCK_ROOTS,
    DOUBLE_NORMS,
    EMBEDDER,
    END_ROOTS,
    ENDS,
    SINGLE_NORMS,
    TO_QKV,
    Names,
    final_modulation,
    flux_block,
    flux_blocks,
    named,
    norms,
)

_MLP: Names = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE: Names = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_FUSED: Names = {"attn.to_qkv": TO_QKV, "attn.to_added_qkv": ADD_QKV}
"""What diffusers calls q, k, v once it has fused them; its LoKrs of them are so named."""
_CUT_OFF: Names = {
    path: path
    for path in (*TO_QKV, *ADD_QKV, "attn.to_out.0", "attn.to_add_out", *map(str, _MLP.values()))
}
_MODULATION: Names = {
    f"{stream}.lin": f"{stream}.linear"
    for stream in (
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
}
_TIME, _GUIDANCE = (
    {
        f"{there}_in.{layer}": f"time_guidance_embed.{here}_embedder.{linear}"
        for layer, linear in EMBEDDER.items()
    }
    for there, here in (("time", "timestep"), ("guidance", "guidance"))
)
_TIME_ROOTS = ("time_in", "guidance_in", "time_guidance_embed")
_MODULATION_ROOTS = ("double_stream_modulation", "single_stream_modulation")


def _blocks(doubles: int, singles: int) -> Iterator[ModuleName]:
    """Yield the modules of all blocks.

    Some LoRAs call the double blocks `sformer_blocks`, as diffusers' reader of them knows.

    Source: diffusers' `convert_flux2_transformer_checkpoint_to_diffusers`.
    """
    for i in range(doubles):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        also = {here: _FUSED, f"sformer_blocks.{i}.": _CUT_OFF}
        yield from named({**ATTENTION, **_MLP}, here=here, there=there, also=also)
        yield from norms(DOUBLE_NORMS, here=here, there=there)
    for i in range(singles):
        here, there = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield from named(_SINGLE, here=here, there=there)
        yield from norms(SINGLE_NORMS, here=here, there=there)


@cache
def _flux2(doubles: int, singles: int, *, text: int, guided: bool) -> tuple[ModuleName, ...]:
    return (
        *named({**ENDS, **_TIME, **(_GUIDANCE if guided else {}), **_MODULATION}),
        final_modulation(),
        *_blocks(doubles, singles),
        *decoder("text_encoder", text),
    )


def _architecture(
    name: str,
    size: str,
    *,
    doubles: int,
    singles: int,
    width: int,
    clip: str,
    text: int = 36,
    guided: bool = False,
) -> Architecture:
    """Make one size, called `size` by musubi-tuner and `name` by ai-toolkit.

    Its text encoder, `clip` to ComfyUI, is a decoder of `text` layers.
    """
    return Architecture(
        id=name,
        title=f"Flux.2 {size}",
        base_model_version=name.replace("-", "_"),
        modelspec=f"Flux.2-{size}",
        marks=(f"flux.2-{size}", f"flux-2-{size}", f"flux_2_{size}".replace("-", "_")),
        build=partial(_flux2, doubles, singles, text=text, guided=guided),
        roots=(*BLOCK_ROOTS, "sformer_blocks", *END_ROOTS, *_TIME_ROOTS, *_MODULATION_ROOTS),
        widths=dict.fromkeys(("to_q", "qkv", "linear1", "to_qkv_mlp_proj"), width),
        kohya_original=True,
        clips={"text_encoder": clip},
        places={},
        blocks=flux_blocks(("BASE",), doubles, singles),
        block=flux_block,
        family="flux2",
    )


# Source: BFL's `Klein4BParams`, `Klein9BParams` and `Flux2Params`.
FLUX2_KLEIN_4B = _architecture(
    "flux2-klein-4b", "klein-4b", doubles=5, singles=20, width=3072, clip="qwen3_4b"
)
FLUX2_KLEIN_9B = _architecture(
    "flux2-klein-9b", "klein-9b", doubles=8, singles=24, width=4096, clip="qwen3_8b"
)
FLUX2 = _architecture(
    "flux2", "dev", doubles=8, singles=48, width=6144, clip="mistral3_24b", text=40, guided=True
)
