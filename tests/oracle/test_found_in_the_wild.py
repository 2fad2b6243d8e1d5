"""Files as trainers and the web have them: every tensor has its place, none is lost."""

import pytest
import torch
from torch import Tensor

from lorakit.lorafile import load_lora
from lorakit.names.wan import WAN
from lorakit.operations.apply import apply
from lorakit.operations.choice import Choice
from lorakit.operations.extract import extract
from lorakit.operations.merge import merge
from lorakit.saving import stored_tensors
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.oracle.test_architectures import ends

WAN_MODEL = layouts.tiny_model(
    [name for name in ends(WAN) if name.component == "transformer" and "vace" not in name.module]
)
WAN_SINGLE = layouts.as_single_file(WAN, WAN_MODEL)
PREFIX = "model.diffusion_model."


def distilled() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file as LightX2V writes it, and ΔW of each tensor of the single file.

    Factors for the layers, `diff` for norms, `diff_b` for biases, `diff_m` for modulations.
    """
    generator = torch.Generator().manual_seed(0)
    file: dict[str, Tensor] = {}
    change: dict[str, Tensor] = {}
    for key, tensor in WAN_SINGLE.items():
        name = key.removeprefix("model.")
        change[key] = torch.randn(tensor.shape, generator=generator)
        if key.endswith("modulation"):
            file[name.replace("modulation", "diff_m")] = change[key]
        elif key.endswith(".bias"):
            file[name.replace(".bias", ".diff_b")] = change[key]
        elif tensor.ndim == 1:
            file[name.replace(".weight", ".diff")] = change[key]
        else:
            up, down = torch.randn(len(tensor), 2), torch.randn(2, tensor.shape[1])
            change[key] = up @ down
            file[name.replace(".weight", ".lora_up.weight")] = up
            file[name.replace(".weight", ".lora_down.weight")] = down
    return file, change


def test_a_distilled_wan_changes_every_tensor_of_the_model_and_its_modulations_too() -> None:
    file, change = distilled()
    assert any(key.endswith("blocks.0.diff_m") for key in file)
    assert "diffusion_model.head.diff_m" in file
    lora = load_lora(file)
    wanted = {key: WAN_SINGLE[key] + 0.5 * delta for key, delta in change.items()}
    applied, report = apply(DictSource(WAN_SINGLE), [(lora, 0.5)])
    assert not report.unmatched
    for key, value in wanted.items():
        torch.testing.assert_close(applied.get(key), value, rtol=1e-5, atol=1e-5)
    folder, _ = apply(DictSource(layouts.as_folder(WAN_MODEL)), [(lora, 0.5)])
    table = folder.get("transformer/blocks.0.scale_shift_table")
    torch.testing.assert_close(table, wanted[f"{PREFIX}blocks.0.modulation"], rtol=1e-5, atol=1e-5)


def test_a_modulation_is_merged_whole_and_extracted_with_the_norms() -> None:
    """It has no rank; ComfyUI reads `….modulation.diff`."""
    file, change = distilled()
    merged, _ = merge([(load_lora(file), 2.0)])
    stored = stored_tensors(merged, dialect="comfyui", dtype="F32")
    found = stored["diffusion_model.blocks.0.modulation.diff"]
    torch.testing.assert_close(found, 2 * change[f"{PREFIX}blocks.0.modulation"])
    base = DictSource(WAN_SINGLE)
    tuned, _ = apply(base, [(load_lora(stored), 0.5)])
    lora, report = extract(base, tuned, choice=Choice(kind="full"))
    assert not report.lost
    again, _ = apply(base, [(lora, 1.0)])
    for key in WAN_SINGLE:
        torch.testing.assert_close(again.get(key), tuned.get(key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", ["diff_m", "modulation.diff"])
def test_the_modulation_of_a_block_lies_in_its_block(role: str) -> None:
    file, _ = distilled()
    table = file["diffusion_model.blocks.0.diff_m"]
    rest = {key: tensor for key, tensor in file.items() if not key.endswith("diff_m")}
    lora = load_lora(rest | {f"diffusion_model.blocks.3.{role}": table})
    assert lora.block("transformer.blocks.3.scale_shift_table") == "B03"
    assert "transformer.blocks.3.scale_shift_table" in lora.adapters
