"""Seeded checkpoints and LoRAs with real names: the stuff of lorakit's demo, tests and benchmarks.

Run `python examples/synthetic.py sdxl out.safetensors --factor 32` to have one on disk.
Every tensor is a function of (seed, its single-file name) alone, so the same model can be written
as one file or as a diffusers folder, and the same LoRA in every dialect.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from configs import configs
from realnames import (
    ARCHITECTURES,
    UNET,
    Module,
    Shape,
    folder_layout,
    folder_places,
    layout,
    modules,
    row_range,
    shrink,
    single_file,
    trainable_keys,
)
from seeded import DTYPES, factors, raw_bytes, save_order, weight, write_file
from torch import Tensor

__all__ = [
    "ARCHITECTURES",
    "DIALECTS",
    "Module",
    "Tuning",
    "folder_layout",
    "folder_places",
    "layout",
    "lora_metadata",
    "lora_tensors",
    "modules",
    "row_range",
    "shrink",
    "single_file",
    "spelled",
    "weight",
    "write_checkpoint",
    "write_file",
    "write_folder",
    "write_lora",
    "write_peft_folder",
    "write_tuned",
]

DIALECTS = ("kohya", "kohya-diffusers", "diffusers", "peft", "comfyui")
CHANGE = 0.01  # ‖ΔW‖ / ‖W‖ of a LoRA
LEFTOVERS: Mapping[str, tuple[str, Shape]] = {
    "alphas_cumprod": ("F32", (1000,)),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": ("I64", (1, 77)),
}
BASE_VERSION = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
MODELSPEC = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
CLIPS = {
    "sd1": {"text_encoder": "clip_l"},
    "sd2": {"text_encoder": "clip_h"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a fine-tuned checkpoint differs: low rank with a decaying spectrum, and a little noise.

    `scale` and `noise` are relative to the weight; `norms` moves biases and norms too, which no
    LoRA can hold.
    """

    seed: int = 1
    rank: int = 16
    scale: float = 0.01
    noise: float = 0.001
    norms: bool = False


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Shape],
    *,
    seed: int = 0,
    dtype: str = "F16",
    tuning: Tuning | None = None,
    leftovers: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a single-file checkpoint of this layout, never holding more than one tensor.

    Args:
        path: the file; its folder is made.
        tensors: its layout, such as `single_file("sdxl", factor=32)`.
        seed: of the weights.
        dtype: of the weights.
        tuning: the fine-tuning to add; computed in fp32, then rounded to `dtype`.
        leftovers: add the fp32 and int64 tensors that old checkpoints carry.
        metadata: goes into the header.
    """
    specs = {key: (dtype, shape) for key, shape in tensors.items()}
    if leftovers:
        specs |= LEFTOVERS

    def get(key: str) -> Tensor:
        return _tuned(key, specs[key][1], dtype=specs[key][0], seed=seed, tuning=tuning)

    return write_file(path, specs, get, metadata)


def write_tuned(
    path: Path,
    tensors: Mapping[str, Shape],
    *,
    seed: int = 0,
    dtype: str = "F16",
    tuning: Tuning | None = None,
) -> Path:
    """Write the checkpoint of this layout and seed, fine-tuned."""
    return write_checkpoint(path, tensors, seed=seed, dtype=dtype, tuning=tuning or Tuning())


def write_folder(
    folder: Path,
    architecture: str,
    *,
    factor: int = 32,
    seed: int = 0,
    dtype: str = "F16",
    tuning: Tuning | None = None,
) -> Path:
    """Write the model of `write_checkpoint` as a diffusers folder, its VAE but a sample.

    The UNet's and text encoders' configs are true, so that diffusers and transformers load them.
    """
    original = single_file(architecture, factor=factor)
    shapes, places = folder_layout(architecture, factor=factor), folder_places(architecture)

    def get(key: str) -> Tensor:
        place = places[key]
        shape = original[place.key]
        tensor = _tuned(place.key, shape, dtype=dtype, seed=seed, tuning=tuning)
        start, stop = row_range(place, shape) if shape else (0, 0)
        if place.rows is not None:
            tensor = tensor[start:stop]
        return tensor.T.contiguous() if place.transposed else tensor

    for component in dict.fromkeys(key.partition("/")[0] for key in shapes):
        prefix = f"{component}/"
        specs = {
            k.removeprefix(prefix): (dtype, s) for k, s in shapes.items() if k.startswith(prefix)
        }
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        file = folder / component / f"{stem}.safetensors"
        write_file(file, specs, _under(prefix, get), {"format": "pt"})
    for name, config in configs(architecture, factor=factor).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def lora_tensors(
    architecture: str,
    *,
    dialect: str = "kohya",
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    conv: bool = False,
    te: bool = True,
    dtype: str = "F16",
    factor: int = 32,
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA: ‖ΔW‖ is about 1 % of ‖W‖ and the same in every dialect.

    Args:
        architecture: sd1, sd2 or sdxl.
        dialect: kohya (flat; single-file names for SDXL, diffusers names for SD), kohya-diffusers
            (flat diffusers names), diffusers, peft (the UNet alone) or comfyui.
        rank: of every module, also where the layer is narrower.
        alpha: what kohya's and ComfyUI's files store, default the rank; ΔW does not depend on it.
        seed: of ΔW.
        conv: resnets, down- and upsamplers too.
        te: text encoders too.
        dtype: of the factors.
        factor: of the checkpoint's widths.
    """
    stored_alpha = float(rank if alpha is None else alpha)
    tensors: dict[str, Tensor] = {}
    for module in modules(architecture, factor=factor):
        if module.kind == "conv" and not conv:
            continue
        if module.component != "unet" and (not te or dialect == "peft"):
            continue
        rows, columns = module.shape[0], math.prod(module.shape[1:])
        name = f"{module.component}.{module.path}"
        up, down = factors(name, rows, columns, seed=seed, rank=rank)
        up, down = up * CHANGE**0.5, down * CHANGE**0.5
        if len(module.shape) == 4:
            up, down = up[:, :, None, None], down.reshape(rank, *module.shape[1:])
        stem = spelled(module, architecture, dialect)
        if dialect in ("diffusers", "peft"):
            named = {"lora_A.weight": down, "lora_B.weight": up}
        else:
            named = {"lora_down.weight": down, "lora_up.weight": up * (rank / stored_alpha)}
            named["alpha"] = torch.tensor(stored_alpha)
        tensors |= {f"{stem}.{role}": part.to(DTYPES[dtype]) for role, part in named.items()}
    return tensors


def lora_metadata(
    architecture: str, *, rank: int = 8, alpha: float | None = None, conv: bool = False
) -> dict[str, str]:
    """Return training metadata as kohya's trainer writes it."""
    stored_alpha = float(rank if alpha is None else alpha)
    args = {"conv_dim": str(rank), "conv_alpha": str(stored_alpha)} if conv else {}
    return {
        "ss_base_model_version": BASE_VERSION[architecture],
        "ss_v2": str(architecture == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(stored_alpha),
        "ss_network_args": json.dumps(args),
        "ss_output_name": f"synthetic-{architecture}",
        "ss_sd_model_name": f"{MODELSPEC[architecture]}.safetensors",
        "ss_learning_rate": "0.0001",
        "ss_num_epochs": "10",
        "ss_num_train_images": "40",
        "ss_resolution": "(1024, 1024)" if architecture == "sdxl" else "(512, 512)",
        "ss_tag_frequency": json.dumps({"10_copy": {"copy": 10, "line art": 7}}),
        "ss_training_comment": "synthetic: seeded random factors",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{MODELSPEC[architecture]}/lora",
        "modelspec.title": f"synthetic-{architecture}",
    }


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a LoRA with its metadata and, as trainers do, the hash of its data section."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    specs = {key: (names[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    if metadata is None:
        return write_file(path, specs, tensors.__getitem__)
    data = hashlib.sha256()
    for key in save_order(specs):
        data.update(raw_bytes(tensors[key]))
    hashed = {**metadata, "sshs_model_hash": data.hexdigest()}
    return write_file(path, specs, tensors.__getitem__, hashed)


def write_peft_folder(folder: Path, tensors: Mapping[str, Tensor], *, rank: int) -> Path:
    """Write a LoRA of the dialect `peft` as PEFT's save_pretrained does."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({key.split(".lora_")[0].split(".")[-1] for key in tensors}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "base_model_name_or_path": None,
    }
    write_lora(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def spelled(module: Module, architecture: str, dialect: str) -> str:
    """Return the name of a module in a LoRA of this dialect, without the factor's suffix."""
    component, path = module.component, module.path
    if dialect == "diffusers":
        return f"{component}.{path}"
    if dialect == "peft":
        # transformers 5 leaves text_model. out of CLIPTextModel, not out of the projecting one.
        bare = path.removeprefix("text_model.") if component == "text_encoder" else path
        return f"base_model.model.{bare}"
    if dialect == "comfyui":
        if component == "unet":
            return f"diffusion_model.{module.original}"
        return f"text_encoders.{CLIPS[architecture][component]}.transformer.{path}"
    if dialect == "kohya" and architecture == "sdxl":
        path = module.original
    flat = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[component]
    if architecture == "sdxl" and component == "text_encoder":
        flat = "lora_te1"
    return f"{flat}_{path.replace('.', '_')}"


def _tuned(key: str, shape: Shape, *, dtype: str, seed: int, tuning: Tuning | None) -> Tensor:
    base = weight(key, shape, seed=seed, dtype=dtype)
    if tuning is None or not base.is_floating_point():
        return base
    if key in trainable_keys():
        noise = weight(f"noise {key}", shape, seed=tuning.seed).mul_(tuning.noise)
        rows, columns = shape[0], math.prod(shape[1:])
        up, down = factors(f"delta {key}", rows, columns, seed=tuning.seed, rank=tuning.rank)
        noise.view(rows, columns).addmm_(up, down, alpha=tuning.scale)
        return noise.add_(base).to(base.dtype)
    if tuning.norms and len(shape) == 1 and key.startswith(UNET):
        noise = weight(f"noise {key}", shape, seed=tuning.seed).mul_(tuning.scale)
        return noise.add_(base).to(base.dtype)
    return base


def _under(prefix: str, get: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    return lambda key: get(prefix + key)


def main() -> None:
    """Write one synthetic checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--factor", type=int, default=1, help="divide every width by this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true", help="add a seeded fine-tuning")
    options = parser.parse_args()
    tensors = single_file(options.architecture, factor=options.factor)
    tuning = Tuning() if options.tuned else None
    write_checkpoint(options.output, tensors, seed=options.seed, tuning=tuning)


if __name__ == "__main__":
    main()
