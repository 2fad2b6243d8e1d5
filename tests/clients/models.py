"""Tiny models that diffusers and transformers load, and the float64 twin of a stack of LoRAs."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import synthetic
import torch
from realnames import Module
from torch import Tensor, nn

from tests import reference

FACTOR = 32
LOUDER = 8
"""‖ΔW‖ is 8 % of ‖W‖, so that the outputs of random weights show it."""
Deltas = dict[tuple[str, str], Tensor]
IGNORED = (
    "ignore::FutureWarning:diffusers",
    "ignore::FutureWarning:transformers",
    "ignore::FutureWarning:huggingface_hub",
    "ignore::DeprecationWarning",
)


def peers(*names: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a file that needs other packages and lives with their warnings."""
    return [pytest.mark.peer, *(pytest.mark.filterwarnings(line) for line in IGNORED)]


def load(folder: Path, component: str) -> nn.Module:
    """Load a component in float64, so that only the stored numbers' rounding is seen."""
    import diffusers
    import transformers

    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    model, told = classes[component].from_pretrained(
        folder / component, output_loading_info=True, local_files_only=True
    )
    # OpenCLIP-H's file holds a projection that SD 2 has no use for.
    unexpected = set(told.pop("unexpected_keys")) - {"text_projection.weight"}
    assert not unexpected and not any(told.values()), (unexpected, told)
    return model.double().eval()


def load_all(folder: Path) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: load(folder, name) for name in names if (folder / name).is_dir()}


def layer(model: nn.Module, path: str) -> nn.Module:
    """Find a layer; transformers 5 leaves out `text_model.`."""
    names = dict(model.named_modules())
    return names[path if path in names else path.removeprefix("text_model.")]


def base_weight(model: nn.Module, path: str) -> Tensor:
    """Return the weight of a layer, also where PEFT stands around it."""
    found = layer(model, path)
    return getattr(found, "base_layer", found).weight.detach()


def kept(architecture: str) -> list[Module]:
    """Return the layers of the test: diffusers takes a minute for all of SDXL's repetitions."""

    def repeats(module: Module) -> bool:
        if module.component != "unet":
            return not re.search(r"\.layers\.(0|10|31)\.", module.path)
        if architecture == "sdxl":
            return bool(
                re.search(r"\.transformer_blocks\.[1-8]\.|\.attentions\.[12]\.", module.path)
            )
        return module.path.startswith(("down_blocks.1.", "up_blocks.1.", "up_blocks.2."))

    return [m for m in synthetic.modules(architecture, factor=FACTOR) if not repeats(m)]


def lora(architecture: str, dialect: str, **options: object) -> dict[str, Tensor]:
    """Return the synthetic LoRA's tensors of the kept layers."""
    tensors = synthetic.lora_tensors(architecture, dialect=dialect, factor=FACTOR, **options)
    stems = {synthetic.spelled(m, architecture, dialect) for m in kept(architecture)}
    return {
        key: tensor * LOUDER if key.endswith(("lora_up.weight", "lora_B.weight")) else tensor
        for key, tensor in tensors.items()
        if key.split(".lora_")[0].removesuffix(".alpha") in stems
    }


def deltas(architecture: str, dialect: str, tensors: Mapping[str, Tensor]) -> Deltas:
    """Return the float64 ΔW of each layer, by (component, path)."""
    found = {}
    for module in synthetic.modules(architecture, factor=FACTOR):
        stem = synthetic.spelled(module, architecture, dialect)
        up = tensors.get(f"{stem}.lora_up.weight", tensors.get(f"{stem}.lora_B.weight"))
        down = tensors.get(f"{stem}.lora_down.weight", tensors.get(f"{stem}.lora_A.weight"))
        if up is not None and down is not None:
            alpha = tensors.get(f"{stem}.alpha")
            delta = reference.delta(up, down, None if alpha is None else float(alpha))
            found[module.component, module.path] = delta.reshape(module.shape)
    return found


def summed(terms: Iterable[tuple[Deltas, float]]) -> Deltas:
    """Return Σ strength · ΔW."""
    total: Deltas = {}
    for term, strength in terms:
        for key, delta in term.items():
            total[key] = total.get(key, torch.zeros_like(delta)) + strength * delta
    return total


@torch.no_grad()
def changed(models: Mapping[str, nn.Module], change: Deltas) -> Mapping[str, nn.Module]:
    """Add the change to the models' weights in place, in float64."""
    for (component, path), delta in change.items():
        weight = layer(models[component], path).weight
        weight += delta
    return models


@torch.no_grad()
def outputs(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Run every model on seeded inputs, apart from the others."""
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    found = {}
    for name, model in models.items():
        if name != "unet":
            tokens = torch.randint(0, model.config.vocab_size, (1, 12), generator=draw)
            told = model(tokens)
            found[name] = told.last_hidden_state
            if name == "text_encoder_2":
                found[f"{name} pooled"] = told.text_embeds
            continue
        config = model.config
        added = None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim
            pooled -= 6 * config.addition_time_embed_dim
            added = {"text_embeds": noise(1, pooled), "time_ids": noise(1, 6)}
        text = noise(1, 12, config.cross_attention_dim)
        step = torch.tensor(321)
        found[name] = model(noise(1, 4, 16, 16), step, text, added_cond_kwargs=added).sample
    return found


def distances(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ‖found − expected‖ / ‖expected‖ of every output."""
    assert found.keys() == expected.keys()
    return {name: reference.relative_error(found[name], expected[name]) for name in expected}


def worst_change(models: Mapping[str, nn.Module], before: Deltas, change: Deltas) -> float:
    """Return the largest relative error of W' − W against the ΔW that was to be added."""
    errors = []
    for (component, path), delta in change.items():
        moved = base_weight(models[component], path) - before[component, path]
        errors.append(reference.relative_error(moved.reshape(delta.shape), delta))
    return max(errors)


def weights(models: Mapping[str, nn.Module], change: Deltas) -> Deltas:
    return {(c, path): base_weight(models[c], path).clone() for c, path in change}
