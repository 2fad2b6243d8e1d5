"""The same model in both layouts, by our tables: what diffusers' own converters must agree with."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorakit.names.architectures import Architecture, ModuleName


def original_layout(
    names: Iterable[ModuleName], diffusers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename, join, turn and swap a component's tensors to the original single file's.

    Args:
        names: the architecture's table.
        diffusers: path -> tensor of the component, as `state_dict()` has them.

    A weight that no name claims is left out; the test sees it missing on the other side.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name in names:
        for kind in ("weight", "bias"):
            tensor = diffusers.get(f"{name.path}.{kind}")
            if name.bare:
                tensor = diffusers.get(name.path) if kind == "weight" else None
            if tensor is None:
                continue
            if name.swap:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if name.transpose and tensor.ndim > 1:
                tensor = tensor.T
            parameter = name.parameter.replace("weight", kind) if kind == "bias" else name.parameter
            parameter = "" if name.bare else parameter
            parts.setdefault(name.original + parameter, []).append(
                (name.part[0] if name.part else 0, tensor)
            )
    return {
        key: torch.cat([tensor for _, tensor in sorted(held, key=lambda at: at[0])])
        for key, held in parts.items()
    }


def tiny_model(names: Iterable[ModuleName], seed: int = 0) -> dict[str, Tensor]:
    """Make weights for every module of a table, by canonical name: small, random, right in rows."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in names:
        start, stop, _ = name.part or (0, 2, 2)
        rows = 2 * (stop - start)
        shape = (rows,) if name.norm else (rows, 6)
        if name.bare:
            tensors[name.module] = torch.randn(1, 2, 6, generator=generator)
            continue
        tensors[f"{name.module}.weight"] = torch.randn(shape, generator=generator)
        if name.parameter not in ("", ".scale"):
            tensors[f"{name.module}.bias"] = torch.randn(rows, generator=generator)
    return tensors


def as_folder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name canonical tensors as a diffusers folder does."""
    return {key.replace(".", "/", 1): tensor for key, tensor in tensors.items()}


def as_single_file(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name canonical tensors as the original single file does, fused where it fuses."""
    names = architecture.build()
    found: dict[str, Tensor] = {}
    for component in dict.fromkeys(name.component for name in names):
        own = [name for name in names if name.component == component]
        inside = {
            k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{component}.")
        }
        prefix = prefix_of(architecture, component)
        found |= {prefix + key: tensor for key, tensor in original_layout(own, inside).items()}
    return found


def prefix_of(architecture: Architecture, component: str) -> str:
    """Return what the single file's keys of a component begin with."""
    if component in ("unet", "transformer"):
        return "model.diffusion_model."
    places = {held: prefix for prefix, held in architecture.places.items()}
    return places.get(component, f"text_encoders.{architecture.clips.get(component)}.transformer.")


def spelled(architecture: Architecture, module: str, dialect: str) -> str:
    """Spell a module, fused or not, as a dialect does: the plain rules, once more."""
    component, _, path = module.partition(".")
    name = architecture.modules.get(module)
    denoiser = component in ("unet", "transformer")
    original = path if name is None or name.part or not denoiser else name.original
    if dialect == "diffusers":
        return module
    if dialect == "comfyui":
        return (
            f"diffusion_model.{original}"
            if denoiser
            else f"text_encoders.{architecture.clips[component]}.transformer.{path}"
        )
    flat = (original if architecture.kohya_original else path).replace(".", "_")
    if denoiser:
        return f"lora_unet_{flat}"
    number = (
        component.removeprefix("text_encoder_") if "_2" in component or "_3" in component else "1"
    )
    usual = "lora_te_" if len(architecture.clips) == 1 else f"lora_te{number}_"
    return architecture.kohya_text.get(component, usual) + flat
