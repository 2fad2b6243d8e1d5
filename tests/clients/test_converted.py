"""What convert writes, diffusers and PEFT load, and get the weights that our arithmetic says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.lorafile import load_lora
from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES
from lorakit.operations.apply import apply
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.helpers import dense, ran, worst_error
from tests.oracle.test_architectures import trained

diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
UNET = {
    "sample_size": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "layers_per_block": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "sd1": lambda: diffusers.UNet2DConditionModel(block_out_channels=(8, 8, 16, 16), **UNET),
    "sdxl": lambda: diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(0, 2, 2),
        use_linear_projection=True,
        **UNET,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "qwen-image": lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    ),
    "wan": lambda: diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=12,
        ffn_dim=24,
        num_layers=2,
    ),
}
FP32 = 2e-6
"""Sums of rank 4 in fp32, by torch and by us."""


def weights(architecture: Architecture, model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors under canonical names."""
    return {f"{architecture.denoiser}.{k}": v.clone() for k, v in model.state_dict().items()}


def kohya_file(architecture: Architecture, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make kohya's LoRA of every attention and MLP layer, ranks 2 to 4, alpha 1."""
    generator = torch.Generator().manual_seed(2)
    file: dict[str, Tensor] = {}
    for i, module in enumerate(trained(architecture, "kohya", held)):
        parts = architecture.fused.get(module, ((module, (0, 1, 1)),))
        shapes = [held[f"{part}.weight"].shape for part, _ in parts]
        if len(shapes[0]) > 2 or "block" not in module:
            continue
        rank = 2 + i % 3
        stem = layouts.spelled(architecture, module, "kohya")
        rows = sum(shape[0] for shape in shapes)
        file[f"{stem}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
        file[f"{stem}.lora_down.weight"] = torch.randn(rank, shapes[0][1], generator=generator)
        file[f"{stem}.alpha"] = torch.tensor(1.0)
    return file


def made(name: str, folder: Path) -> tuple[Architecture, Any, dict[str, Tensor], Path]:
    torch.manual_seed(0)
    architecture, model = BY_ID[name], MODELS[name]()
    held = weights(architecture, model)
    path = folder / "kohya.safetensors"
    metadata = {"ss_base_model_version": architecture.base_model_version}
    save_file(kohya_file(architecture, held), path, metadata=metadata)
    return architecture, model, held, path


def ours(held: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bake a LoRA with our own arithmetic into a folder's layout."""
    source = DictSource(layouts.as_folder(held))
    applied, report = apply(source, [(load_lora(path), 1.0)])
    assert not report.unmatched
    return {key.partition("/")[2]: applied.get(key) for key in source.specs}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_fuses_a_converted_file_to_our_weights(name: str, tmp_path: Path) -> None:
    architecture, model, held, kohya = made(name, tmp_path)
    out = tmp_path / "diffusers.safetensors"
    ran("convert", kohya, "--to", "diffusers", "-o", out, "--verify")
    expected = ours(held, kohya)
    model.load_lora_adapter(load_file(out), prefix=architecture.denoiser)
    model.fuse_lora()
    model.unload_lora()
    found = model.state_dict()
    changed = [
        key
        for key in found
        if not torch.equal(expected[key], held[f"{architecture.denoiser}.{key}"])
    ]
    assert len(changed) > 10
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("name", MODELS)
def test_peft_merges_a_converted_folder_to_our_weights(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, model, held, kohya = made(name, tmp_path)
    out = tmp_path / "peft"
    ran("convert", kohya, "--to", "peft", "-o", out, "--verify")
    expected = ours(held, kohya)
    found = peft.PeftModel.from_pretrained(model, out).merge_and_unload().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("dialect", ["diffusers", "comfyui", "peft"])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again_is_the_same_lora(name: str, dialect: str, tmp_path: Path) -> None:
    """No rank grows and no bit of ΔW is lost, whatever the way."""
    _, _, _, kohya = made(name, tmp_path)
    there = tmp_path / ("there" if dialect == "peft" else "there.safetensors")
    back = tmp_path / "back.safetensors"
    ran("convert", kohya, "--to", dialect, "-o", there)
    ran("convert", there, "--to", "kohya", "-o", back)
    before, after = load_lora(kohya), load_lora(back)
    assert {m: a.rank for m, a in after.adapters.items()} == {
        m: a.rank for m, a in before.adapters.items()
    }
    assert worst_error(dense(after), dense(before)) < (1e-7 if dialect == "diffusers" else 1e-15)
    assert load_file(back).keys() == load_file(kohya).keys()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_diffusers_computes_the_same_output(name: str, tmp_path: Path) -> None:
    """With the adapter on, and with our weights in its place."""
    architecture, model, held, kohya = made(name, tmp_path)
    out = tmp_path / "diffusers.safetensors"
    ran("convert", kohya, "--to", "diffusers", "-o", out)
    inputs = INPUTS[name]()
    model.eval()
    with torch.no_grad():
        model.load_lora_adapter(load_file(out), prefix=architecture.denoiser)
        with_adapter = model(**inputs).sample
        model.unload_lora()
        before = model(**inputs).sample
        model.load_state_dict(ours(held, kohya))
        baked = model(**inputs).sample
    torch.testing.assert_close(with_adapter, baked, rtol=1e-4, atol=1e-5)
    assert float((before - baked).norm()) > 1e-3 * float(before.norm())


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "flux": lambda: {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    },
    "wan": lambda: {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 3, 12),
    },
}
