"""The real tensor names and shapes of SD 1.x, SD 2.x and SDXL, in both of their spellings.

The single-file ("LDM") layouts and the diffusers UNet layouts are data; everything else is derived
from them here, by walking them. Nothing is taken from lorakit: its tests use this as an oracle.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Shape = tuple[int, ...]
Layout = dict[str, Shape]

ARCHITECTURES = ("sd1", "sd2", "sdxl")
FACTORS = (1, 2, 4, 8, 16, 32)
UNET = "model.diffusion_model."
SINGLE_FILE = {"sd1": "sd15_ldm", "sd2": "sd2_ldm", "sdxl": "sdxl_sgm"}
UNET_LAYOUT = {
    "sd1": "sd15_unet_diffusers",
    "sd2": "sd2_unet_diffusers",
    "sdxl": "sdxl_unet_diffusers",
}
TEXT_ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
# OpenCLIP-H holds 24 blocks, of which SD 2 uses the output of the 23rd: diffusers leaves one out.
OPEN_CLIP_LAYERS = {"sd2": 23, "sdxl": 32}
VAE_SAMPLE = ("encoder.conv_in", "decoder.conv_in", "quant_conv", "post_quant_conv")
SEQUENCE = 77

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
OPEN_CLIP_TOP = {
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a diffusers tensor lies in the single file: a key, perhaps some of its rows."""

    key: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A layer that trainers give a LoRA to, under both of its names."""

    component: str
    path: str
    original: str
    kind: str
    shape: Shape
    place: Place


def layout(name: str) -> Layout:
    """Return the tensors of a layout in their file's order, by name.

    Args:
        name: sd15_ldm, sd2_ldm, sdxl_sgm (single files), sd15_unet_diffusers, sd2_unet_diffusers,
            sdxl_unet_diffusers, or <sd15|sd2|sdxl>_text_encoder[_2]_diffusers.
    """
    if name == "sd2_ldm":
        return _sd2_single_file()
    if name == "sd2_unet_diffusers":
        return _sd2_unet(layout("sd15_unet_diffusers"))
    if "_text_encoder" in name:
        family, _, component = name.removesuffix("_diffusers").partition("_")
        architecture = {"sd15": "sd1"}.get(family, family)
        prefix = f"{component}/"
        tensors = folder_layout(architecture)
        return {k.removeprefix(prefix): s for k, s in tensors.items() if k.startswith(prefix)}
    return dict(_stored(name))


def single_file(architecture: str, *, factor: int = 1) -> Layout:
    """Return the single-file layout of sd1, sd2 or sdxl, shrunken by `factor`."""
    return shrink(layout(SINGLE_FILE[architecture]), factor)


def shrink(tensors: Mapping[str, Shape], factor: int) -> Layout:
    """Divide every width by `factor`; names, kernels, latent channels and the sequence stay.

    All real widths are multiples of 64, so a factor up to 32 keeps sums (skip connections, fused
    q, k, v) exact; only the VAE's narrowest levels meet the floor of 8 channels.
    """
    if factor not in FACTORS:
        raise ValueError(f"factor {factor} must be one of {FACTORS}")

    def width(size: int) -> int:
        return size if size < 64 or size == SEQUENCE else max(8, size // factor)

    small = {key: tuple(width(size) for size in shape) for key, shape in tensors.items()}
    return small if factor > 1 else {key: tuple(shape) for key, shape in tensors.items()}


def folder_layout(architecture: str, *, factor: int = 1) -> Layout:
    """Return the shapes of a diffusers folder, keys as `component/key in its file`."""
    original = single_file(architecture, factor=factor)
    return {k: _placed_shape(original, p) for k, p in folder_places(architecture).items()}


@cache
def folder_places(architecture: str) -> Mapping[str, Place]:
    """Say, for every tensor of a diffusers folder, where the single file holds it."""
    original = layout(SINGLE_FILE[architecture])
    unet = layout(UNET_LAYOUT[architecture])
    places = {f"unet/{k}": Place(key=UNET + ldm_name(k, unet)) for k in unet}
    for component, prefix in TEXT_ENCODERS[architecture].items():
        for name, place in _text_places(original, prefix, OPEN_CLIP_LAYERS.get(architecture, 0)):
            places[f"{component}/{name}"] = place
    for name in VAE_SAMPLE:
        for kind in ("weight", "bias"):
            places[f"vae/{name}.{kind}"] = Place(key=f"first_stage_model.{name}.{kind}")
    missing = [place.key for place in places.values() if place.key not in original]
    if missing:
        raise ValueError(f"{architecture}: no such tensor in the single file: {missing[:5]}")
    return places


def modules(architecture: str, *, factor: int = 1) -> Iterator[Module]:
    """Walk every layer that kohya's trainer can give a LoRA to.

    `kind` is attention (the default targets), conv (with conv_dim), or text.
    """
    shapes = folder_layout(architecture, factor=factor)
    for key, place in folder_places(architecture).items():
        component, _, name = key.partition("/")
        kind = _kind(component, name)
        if not name.endswith(".weight") or len(shapes[key]) < 2 or kind is None:
            continue
        original = place.key.removeprefix(UNET) if component == "unet" else name
        yield Module(
            component=component,
            path=name.removesuffix(".weight"),
            original=original.removesuffix(".weight"),
            kind=kind,
            shape=shapes[key],
            place=place,
        )


@cache
def trainable_keys() -> frozenset[str]:
    """Return the single-file names of all layers that can have a LoRA, of all architectures."""
    return frozenset(m.place.key for name in ARCHITECTURES for m in modules(name))


def ldm_name(name: str, unet: Mapping[str, Shape]) -> str:
    """Spell a diffusers UNet tensor as the single file does; `unet` is the diffusers layout."""
    match name.split("."):
        case ["down_blocks", block, "downsamplers", "0", "conv", tail]:
            return f"input_blocks.{3 * int(block) + 3}.0.op.{tail}"
        case ["up_blocks", block, "upsamplers", "0", "conv", tail]:
            attends = any(k.startswith(f"up_blocks.{block}.attentions.") for k in unet)
            return f"output_blocks.{3 * int(block) + 2}.{2 if attends else 1}.conv.{tail}"
        case ["down_blocks", block, kind, index, *rest]:
            return f"input_blocks.{1 + 3 * int(block) + int(index)}.{_inside(kind, rest)}"
        case ["up_blocks", block, kind, index, *rest]:
            return f"output_blocks.{3 * int(block) + int(index)}.{_inside(kind, rest)}"
        case ["mid_block", kind, index, *rest]:
            slot = 2 * int(index) if kind == "resnets" else 1
            return f"middle_block.{slot}.{_inside(kind, rest).partition('.')[2]}"
        case _:
            module, _, tail = name.rpartition(".")
            return f"{TOP[module]}.{tail}"


def _inside(kind: str, rest: list[str]) -> str:
    if kind == "resnets":
        return ".".join(["0", RESNET[rest[0]], *rest[1:]])
    return ".".join(["1", *rest])


def _text_places(original: Layout, prefix: str, layers: int) -> Iterator[tuple[str, Place]]:
    for key in [k for k in original if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not prefix.endswith(".model."):
            yield name, Place(key=key)
        elif name in OPEN_CLIP_TOP:
            yield OPEN_CLIP_TOP[name], Place(key=key, transposed=name == "text_projection")
        elif name.startswith("transformer.resblocks."):
            _, _, number, tail = name.split(".", 3)
            if int(number) < layers:
                for spelled, place in _open_clip_block(key, tail, original[key]):
                    yield f"text_model.encoder.layers.{number}.{spelled}", place


def _open_clip_block(key: str, tail: str, shape: Shape) -> Iterator[tuple[str, Place]]:
    if tail.startswith("attn.in_proj_"):
        for part, letter in enumerate("qkv"):
            rows = (part, part + 1)
            spelled = f"self_attn.{letter}_proj.{tail.removeprefix('attn.in_proj_')}"
            yield spelled, Place(key=key, rows=rows)
        return
    module, _, kind = tail.rpartition(".")
    yield f"{OPEN_CLIP_BLOCK[module]}.{kind}", Place(key=key)


def row_range(place: Place, shape: Shape) -> tuple[int, int]:
    """Return the first row and the row after the last of a place in a tensor of this shape."""
    if place.rows is None:
        return 0, shape[0]
    third = shape[0] // 3
    return place.rows[0] * third, place.rows[1] * third


def _placed_shape(original: Layout, place: Place) -> Shape:
    shape = original[place.key]
    if place.rows is not None:
        start, stop = row_range(place, shape)
        return (stop - start, *shape[1:])
    return shape[::-1] if place.transposed else shape


def _kind(component: str, name: str) -> str | None:
    if component.startswith("text_encoder"):
        return "text" if ".encoder.layers." in name else None
    if component == "unet" and ".attentions." in name:
        return "attention"
    conv = (".resnets.", ".downsamplers.", ".upsamplers.")
    return "conv" if component == "unet" and any(part in name for part in conv) else None


@cache
def _stored(name: str) -> Mapping[str, Shape]:
    path = Path(__file__).parent / "layouts" / f"{name}.json"
    entries: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return {key: tuple(shape) for key, shape in entries.items()}


def _sd2_unet(sd1: Mapping[str, Shape]) -> Layout:
    # SD 2 differs in two ways: text features of 1024, and proj_in / proj_out that are Linear.
    changed = dict(sd1)
    for key, shape in sd1.items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            changed[key] = (shape[0], 1024)
        elif key.endswith(("proj_in.weight", "proj_out.weight")) and len(shape) == 4:
            changed[key] = shape[:2]
    return changed


def _sd2_single_file() -> Layout:
    sd1 = layout("sd15_ldm")
    unet = {k: s for k, s in sd1.items() if k.startswith(UNET)}
    vae = {k: s for k, s in sd1.items() if k.startswith("first_stage_model.")}
    return _sd2_unet(unet) | vae | _open_clip("cond_stage_model.model.", width=1024, layers=24)


def _open_clip(prefix: str, *, width: int, layers: int) -> Layout:
    tensors: Layout = {
        "positional_embedding": (SEQUENCE, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    for number in range(layers):
        block = f"transformer.resblocks.{number}."
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            tensors[f"{block}{name}weight"] = (rows, columns)
            tensors[f"{block}{name}bias"] = (rows,)
    return {prefix + key: shape for key, shape in tensors.items()}
