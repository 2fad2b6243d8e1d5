"""Lumina 2 and Z-Image, which grew out of it: diffusers' names and those of the single file."""

from collections.abc import Iterator, Mapping
from functools import cache, partial

from lorakit.names.architectures import Architecture, ModuleName, Part
from lorakit.names.decoder import decoder
from lorakit.names.flux import Names, named, norms
from lorakit.names.wan import stack_block, stack_blocks

_LUMINA_DEPTH, _Z_DEPTH, _REFINER_DEPTH = 26, 30, 2
_FFN = (1, 2, 3)

_LUMINA_PARTS: Mapping[str, Part] = {"to_q": (0, 3, 5), "to_k": (3, 4, 5), "to_v": (4, 5, 5)}
"""Three heads that ask share one that is asked: 2304, 768 and 768 rows."""
_LUMINA_BLOCK: Names = {
    "attention.out": "attn.to_out.0",
    **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in _FFN},
}
_LUMINA_MODULATION: Names = {"adaLN_modulation.1": "norm1.linear"}
_LUMINA_NORMS = {
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
_LUMINA_ENDS: Names = {
    "x_embedder": "x_embedder",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_LUMINA_END_NORMS = {"cap_embedder.0": "time_caption_embed.caption_embedder.0"}

_Z_PARTS: Mapping[str, Part] = {"to_q": (0, 1, 3), "to_k": (1, 2, 3), "to_v": (2, 3, 3)}
_Z_BLOCK: Names = {
    "attention.out": "attention.to_out.0",
    **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in _FFN},
}
_Z_MODULATION: Names = {"adaLN_modulation.0": "adaLN_modulation.0"}
_Z_NORMS = {
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **{norm: norm for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
_Z_ENDS: Names = {
    "x_embedder": "all_x_embedder.2-1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    "final_layer.linear": "all_final_layer.2-1.linear",
}
"""`2-1` is the size of a patch in space and in time, of which the file has one."""
_Z_END_NORMS = {"cap_embedder.0": "cap_embedder.0"}

_STACKS = {"layers": "B", "noise_refiner": "IN", "context_refiner": "IN"}
_EMBEDDERS = ("x_embedder", "cap_embedder", "t_embedder")
_LUMINA_ROOTS = {
    **_STACKS,
    **dict.fromkeys((*_EMBEDDERS, "time_caption_embed"), "IN"),
    **dict.fromkeys(("final_layer", "norm_out"), "OUT"),
}
_Z_ROOTS = {
    **_STACKS,
    **dict.fromkeys((*_EMBEDDERS, "all_x_embedder"), "IN"),
    **dict.fromkeys(("final_layer", "all_final_layer"), "OUT"),
}


def _places(depth: int) -> Iterator[tuple[str, bool]]:
    """Yield where each block is, and whether the time modulates it."""
    for stack in _STACKS:
        for i in range(depth if stack == "layers" else _REFINER_DEPTH):
            yield f"{stack}.{i}.", stack != "context_refiner"


def _qkv(here: str, there: str, parts: Mapping[str, Part]) -> Iterator[ModuleName]:
    for to, part in parts.items():
        yield ModuleName(module=f"transformer.{here}.{to}", original=f"{there}.qkv", part=part)


def _norms(names: Mapping[str, str], place: str) -> Iterator[ModuleName]:
    return norms(names, here=place, there=place, parameter=".weight")


@cache
def _lumina() -> tuple[ModuleName, ...]:
    """Make Lumina 2's table.

    Source: diffusers' `convert_lumina2_to_diffusers`.
    """
    found = [*named(_LUMINA_ENDS), *_norms(_LUMINA_END_NORMS, "")]
    for place, timed in _places(_LUMINA_DEPTH):
        modulation = _LUMINA_MODULATION if timed else {}
        first = {"attention_norm1": "norm1.norm" if timed else "norm1"}
        found += _qkv(f"{place}attn", f"{place}attention", _LUMINA_PARTS)
        found += named({**_LUMINA_BLOCK, **modulation}, here=place, there=place)
        found += _norms({**first, **_LUMINA_NORMS}, place)
    return (*found, *decoder("text_encoder", 26))


@cache
def _z_image() -> tuple[ModuleName, ...]:
    """Make Z-Image's table.

    Source: diffusers' `convert_z_image_transformer_checkpoint_to_diffusers`.
    """
    found = [*named(_Z_ENDS), *_norms(_Z_END_NORMS, "")]
    for place, timed in _places(_Z_DEPTH):
        modulation = _Z_MODULATION if timed else {}
        found += _qkv(f"{place}attention", f"{place}attention", _Z_PARTS)
        found += named({**_Z_BLOCK, **modulation}, here=place, there=place)
        found += _norms(_Z_NORMS, place)
    return (*found, *decoder("text_encoder", 36))


LUMINA2 = Architecture(
    id="lumina2",
    title="Lumina Image 2.0",
    base_model_version="lumina2",
    modelspec="lumina-2",
    marks=("lumina_2", "lumina-image-2"),
    build=_lumina,
    roots=tuple(_LUMINA_ROOTS),
    widths={"to_q": 2304, "qkv": 2304},
    kohya_original=True,
    clips={"text_encoder": "gemma2_2b"},
    places={},
    blocks=stack_blocks(_LUMINA_DEPTH),
    block=partial(stack_block, roots=_LUMINA_ROOTS),
    family="lumina2",
)
Z_IMAGE = Architecture(
    id="z-image",
    title="Z-Image",
    base_model_version="z_image",
    modelspec="Z-Image",
    marks=("z-image", "zimage"),
    build=_z_image,
    roots=tuple(_Z_ROOTS),
    widths={"to_q": 3840, "qkv": 3840},
    # musubi-tuner and ai-toolkit train the model with q, k and v apart.
    kohya_original=False,
    clips={"text_encoder": "qwen3_4b"},
    places={},
    blocks=stack_blocks(_Z_DEPTH),
    block=partial(stack_block, roots=_Z_ROOTS),
    family="z-image",
)
