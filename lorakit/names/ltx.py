"""LTX-Video and LTX-2: diffusers' names and those of the original single file."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.flux import Names, named, norms
from lorakit.names.t5 import XXL, t5
from lorakit.names.wan import stack_block, stack_blocks

_DEPTH, _BIG_DEPTH = 28, 48
_ATTENTIONS = ("attn1", "attn2")
_SOUND_ATTENTIONS = (
    *("audio_attn1", "audio_attn2"),
    *("audio_to_video_attn", "video_to_audio_attn"),
)
_FEED_FORWARD = ("net.0.proj", "net.2")
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
_GATED_LAYERS = (*_LAYERS, "to_gate_logits")
"""LTX-2.3 has the gate."""
_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_CAPTION = ("linear_1", "linear_2")
_VIDEO_EMBEDDERS = {"adaln_single": "time_embed"}
_SOUND_EMBEDDERS = {
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_VIDEO_ROOTS = {
    "transformer_blocks": "B",
    **dict.fromkeys(("patchify_proj", "proj_in", "caption_projection"), "IN"),
    **dict.fromkeys((*_VIDEO_EMBEDDERS, *_VIDEO_EMBEDDERS.values()), "IN"),
    "proj_out": "OUT",
}
_SOUND_ROOTS = {
    **_VIDEO_ROOTS,
    **dict.fromkeys(("audio_patchify_proj", "audio_proj_in", "audio_caption_projection"), "IN"),
    **dict.fromkeys((*_SOUND_EMBEDDERS, *_SOUND_EMBEDDERS.values()), "IN"),
    "audio_proj_out": "OUT",
}


def _ends(embedders: Mapping[str, str], *, start: str = "") -> Iterator[ModuleName]:
    """Yield the modules outside the blocks, whose names begin with `start`."""
    names: Names = {
        f"{start}patchify_proj": f"{start}proj_in",
        **{
            f"{start}caption_projection.{layer}": f"{start}caption_projection.{layer}"
            for layer in _CAPTION
        },
        f"{start}proj_out": f"{start}proj_out",
        **{
            f"{there}.{layer}": f"{here}.{layer}"
            for there, here in embedders.items()
            for layer in _EMBEDDER
        },
    }
    yield from named(names)


def _blocks(
    depth: int, *, attentions: Sequence[str], layers: Sequence[str], feeds: Sequence[str]
) -> Iterator[ModuleName]:
    """Yield the modules of all blocks: only the norms have two names."""
    paths = [f"{attention}.{layer}" for attention in attentions for layer in layers]
    paths += [f"{feed}.{layer}" for feed in feeds for layer in _FEED_FORWARD]
    normed = {
        f"{attention}.{letter}_norm": f"{attention}.norm_{letter}"
        for attention in attentions
        for letter in "qk"
    }
    for i in range(depth):
        place = f"transformer_blocks.{i}."
        yield from named({path: path for path in paths}, here=place, there=place)
        yield from norms(normed, here=place, there=place, parameter=".weight")


@cache
def _ltx(depth: int) -> tuple[ModuleName, ...]:
    """Make the table of one size.

    Source: diffusers' `convert_ltx_transformer_checkpoint_to_diffusers`.
    """
    return (
        *_ends(_VIDEO_EMBEDDERS),
        *_blocks(depth, attentions=_ATTENTIONS, layers=_LAYERS, feeds=("ff",)),
        *t5("text_encoder", XXL),
    )


@cache
def _ltx2() -> tuple[ModuleName, ...]:
    """Make the table of LTX-2 and 2.3.

    Source: diffusers' `convert_ltx2_transformer_to_diffusers` and
    `_convert_non_diffusers_ltx2_lora_to_diffusers`.
    """
    return (
        *_ends(_VIDEO_EMBEDDERS),
        *_ends(_SOUND_EMBEDDERS, start="audio_"),
        *_blocks(
            _BIG_DEPTH,
            attentions=(*_ATTENTIONS, *_SOUND_ATTENTIONS),
            layers=_GATED_LAYERS,
            feeds=("ff", "audio_ff"),
        ),
    )


def _architecture(name: str, title: str, *, depth: int, width: int) -> Architecture:
    return Architecture(
        id=name,
        title=title,
        base_model_version="ltx-video",
        modelspec="ltx-video",
        marks=("ltxv", "ltx_video"),
        build=partial(_ltx, depth),
        roots=tuple(_VIDEO_ROOTS),
        widths={"to_q": width},
        # CogVideoX and Sana name their blocks alike.
        common=True,
        kohya_original=False,
        clips={"text_encoder": "t5xxl"},
        places={},
        blocks=stack_blocks(depth),
        block=partial(stack_block, roots=_VIDEO_ROOTS),
        family="ltx",
    )


LTX = _architecture("ltx", "LTX-Video 2B", depth=_DEPTH, width=2048)
LTX_13B = _architecture("ltx-13b", "LTX-Video 13B", depth=_BIG_DEPTH, width=4096)
LTX2 = Architecture(
    id="ltx2",
    title="LTX-2",
    base_model_version="ltx2",
    modelspec="ltx2",
    marks=("ltx-2", "ltx_2"),
    build=_ltx2,
    roots=tuple(_SOUND_ROOTS),
    # Of the picture; the sound has half as many.
    widths={"to_q": 4096},
    common=True,
    kohya_original=False,
    clips={},
    places={},
    blocks=stack_blocks(_BIG_DEPTH),
    block=partial(stack_block, roots=_SOUND_ROOTS),
    family="ltx2",
)
