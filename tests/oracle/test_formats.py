"""What docs/formats.md says and no other test computes; and that each of its rows names a test."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.lorafile import load_lora
from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES
from lorakit.operations.apply import apply
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.helpers import dense, worst_error
from tests.reference import negative_control

ROOT = Path(__file__).parents[2]
BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
FLUX, SD1 = BY_ID["flux"], BY_ID["sd1"]
Z = "lora_unet_double_blocks_0_img_attn_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(architecture: Architecture, part: str) -> dict[str, Tensor]:
    """Return the modules of a tiny model whose names hold a part."""
    return layouts.tiny_model(name for name in architecture.build() if part in name.module)


@pytest.mark.parametrize("strength", [1.0, 0.25, -0.5])
def test_a_replaced_value_is_reached_at_1_and_passed_or_left_otherwise(strength: float) -> None:
    tensors = model(FLUX, "transformer_blocks.0.attn")
    source = DictSource(layouts.as_single_file(FLUX, tensors))
    stem = "double_blocks.0.img_attn"
    norm = f"model.diffusion_model.{stem}.norm.query_norm.scale"
    weight = f"model.diffusion_model.{stem}.proj.weight"
    values = {norm: random(len(source.get(norm))), weight: random(*source.get(weight).shape)}
    file = {f"{stem}.norm.query_norm.scale": values[norm], f"{Z}.set_weight": values[weight]}
    applied, _ = apply(source, [(load_lora(file), strength)])
    for key, value in values.items():
        before = source.get(key).double()
        expected = before + strength * (value.double() - before)

        def check(answer: Tensor, expected: Tensor = expected) -> None:
            torch.testing.assert_close(answer.double(), expected, rtol=1e-6, atol=1e-6)

        negative_control(check, applied.get(key))


def test_the_scale_of_diffusers_stands_in_the_header(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    file = {f"{stem}.lora_A.weight": random(4, 6, seed=1), f"{stem}.lora_B.weight": random(2, 4)}
    told = {"transformer.r": 4, "transformer.lora_alpha": 2}
    save_file(file, tmp_path / "plain.safetensors")
    save_file(file, tmp_path / "told.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    plain, half = (dense(load_lora(tmp_path / f"{name}.safetensors")) for name in ("plain", "told"))
    assert worst_error(half, {module: 0.5 * delta for module, delta in plain.items()}) < 1e-9


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_what_changed_the_base_when_it_began_is_refused(tmp_path: Path, start: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    stem = "base_model.model.q_proj"
    file = {f"{stem}.lora_A.weight": random(4, 6), f"{stem}.lora_B.weight": random(2, 4)}
    save_file(file, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"found {start}, which changed the base"):
        load_lora(tmp_path)
    plain = json.dumps(config | {"init_lora_weights": True})
    (tmp_path / "adapter_config.json").write_text(plain, encoding="utf-8")
    assert len(load_lora(tmp_path).adapters) == 1


def test_a_sparse_remainder_is_refused() -> None:
    file = {f"{Z}.lora_up.weight": random(6, 2), f"{Z}.lora_down.weight": random(2, 6)}
    rest = {f"{Z}.bias_indices": torch.zeros(2, 3), f"{Z}.bias_values": torch.zeros(3)}
    assert load_lora(file).adapters
    with pytest.raises(AdapterError, match="a sparse remainder"):
        load_lora(file | rest)


@pytest.mark.parametrize(
    "stem",
    [
        "clip_l.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.encoder.layers.0.mlp.fc1",
    ],
)
def test_a_text_encoder_has_one_layer_under_all_its_names(stem: str) -> None:
    factors = {"lora_up.weight": random(2, 2), "lora_down.weight": random(2, 6, seed=1)}
    denoiser = {f"{Z}.{role}": random(*value.shape) for role, value in factors.items()}
    twin = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    found, expected = (
        dense(load_lora(denoiser | {f"{name}.{role}": part for role, part in factors.items()}))
        for name in (stem, twin)
    )
    assert worst_error(found, expected) == 0
    assert any(module.startswith("text_encoder.") for module in found)


@pytest.mark.parametrize(("page", "tables"), [("formats.md", 4), ("architectures.md", 1)])
def test_each_row_of_kinds_dialects_files_and_architectures_leads_to_its_tests(
    page: str, tables: int
) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("## Metadata")[0]
    heads = re.findall(r"^(\|.*\|)\n\|[-|]+\|$", text, re.M)
    assert len(heads) == tables
    assert all(head.endswith("| test |") for head in heads)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    targets = [re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", line) for line in lines]
    assert sum(not found for found in targets) == 2 * tables, "a row without a test"
    for target in {target for found in targets for target in found}:
        assert "def test_" in (ROOT / target).read_text(encoding="utf-8"), target
