"""Bake a LoRA by sd-mecha: BASE LORA OUT STRENGTH ARCHITECTURE. Runs in a process of its own."""

import sys
from importlib import import_module
from pathlib import Path

CONFIGS = {
    "sd1": ("sd1-ldm", "sd1-kohya_kohya_lora"),
    "sdxl": ("sdxl-sgm", "sdxl-kohya_kohya_lora"),
}


def main(base: str, lora: str, out: str, strength: str, architecture: str) -> None:
    """Add strength · ΔW in fp32, sd-mecha's faster precision, and store fp16 as the base does."""
    torch, sd_mecha = import_module("torch"), import_module("sd_mecha")
    # Its conversion of SD 1.x LoRAs asks this class for an item that it holds as an attribute
    # (1.1.8), and fails; with the item there it does what that of SDXL does.
    relation = import_module("sd_mecha.keys_map").RealizedKeyRelation
    relation.__getitem__ = lambda self, name: self.inputs[name]
    add_difference = import_module(
        "sd_mecha.extensions.builtin.merge_methods.linear"
    ).add_difference
    model, network = CONFIGS[architecture]
    before = sd_mecha.model(Path(base), model)
    change = sd_mecha.convert(sd_mecha.model(Path(lora), network), model)
    recipe = add_difference(before, change, alpha=float(strength)) | before
    sd_mecha.merge(recipe, output=Path(out), merge_dtype=torch.float32, output_dtype=torch.float16)


if __name__ == "__main__":
    main(*sys.argv[1:])
