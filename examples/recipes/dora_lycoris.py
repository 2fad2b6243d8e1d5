"""DoRA and LyCORIS: kinds that other tools skip, in the same sums as plain LoRAs.

The page is docs/recipes/dora-lycoris.md.
"""

from pathlib import Path

import torch
from kitchen import (
    FACTOR,
    Deltas,
    Found,
    between,
    checkpoint,
    deltas,
    error,
    fine_tune,
    lorakit,
    plant,
    serve,
    tensors_of,
    times,
)
from synthetic import modules, spelled, write_lora

RANK = 4


def cook() -> Found:
    """Merge a LoHa with a LoRA, and take half of a DoRA."""
    checkpoint("base")
    fine_tune("tuned", seed=1, rank=8, noise=0.0002)
    plant("character", seed=2, rank=8)
    plant_loha("loha", seed=3)

    lorakit("inspect loha.safetensors")
    lorakit("merge loha.safetensors:0.7 character.safetensors -o mix.safetensors")
    lorakit("convert loha.safetensors --as lora --energy 0.95 -o plain.safetensors")
    lorakit("extract base.safetensors tuned.safetensors --as dora --rank 4 -o dora.safetensors")
    lorakit("extract base.safetensors tuned.safetensors --rank 4 -o lora.safetensors")
    lorakit("merge dora.safetensors:0.5 character.safetensors -o both.safetensors", status=1)
    lorakit(
        "merge dora.safetensors:0.5 character.safetensors --against base.safetensors --rank 16"
        " -o both.safetensors"
    )
    lorakit("merge dora.safetensors --into base.safetensors -o one.safetensors --dtype fp32")
    lorakit("merge dora.safetensors:0.5 --into base.safetensors -o half.safetensors --dtype fp32")
    mixed = deltas("character")
    for layer, delta in loha_deltas("loha").items():
        mixed[layer] = mixed[layer] + 0.7 * delta
    one = between("base", "one")
    return {
        "error of the mix": error(deltas("mix"), mixed),
        "error of half the DoRA": error(between("base", "half"), times(one, 0.5)),
    }


def plant_loha(name: str, *, seed: int) -> None:
    """Write a LoHa: ΔW = alpha / rank · (w1a · w1b) ⊙ (w2a · w2b)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules("sd1", factor=FACTOR):
        if module.kind == "attention" and len(module.shape) == 2:
            rows, columns = module.shape
            stem = spelled(module, "sd1", "kohya")
            for role in ("hada_w1_a", "hada_w2_a"):
                tensors[f"{stem}.{role}"] = torch.randn(rows, RANK, generator=generator) * 0.1
            for role in ("hada_w1_b", "hada_w2_b"):
                tensors[f"{stem}.{role}"] = torch.randn(RANK, columns, generator=generator) * 0.1
            tensors[f"{stem}.alpha"] = torch.tensor(RANK / 2)
    write_lora(Path(f"{name}.safetensors"), tensors)


def loha_deltas(name: str) -> Deltas:
    """Return each layer's ΔW of a LoHa by the formula."""
    tensors, found = tensors_of(name), {}
    for module in modules("sd1", factor=FACTOR):
        stem = spelled(module, "sd1", "kohya")
        if f"{stem}.alpha" in tensors:
            left, right = (
                tensors[f"{stem}.hada_w{side}_a"].double()
                @ tensors[f"{stem}.hada_w{side}_b"].double()
                for side in (1, 2)
            )
            scale = float(tensors[f"{stem}.alpha"]) / RANK
            found[f"{module.component}.{module.path}"] = scale * left * right
    return found


if __name__ == "__main__":
    serve(cook)
