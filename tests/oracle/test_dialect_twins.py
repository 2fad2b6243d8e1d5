"""One LoRA as every trainer spells it: each file bakes as its twin does, to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.lorafile import load_lora
from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES
from lorakit.operations.apply import apply
from lorakit.operations.merge import merge
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.helpers import dense, ran, refused, worst_error
from tests.oracle.test_architectures import ends, lora_file

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
File = dict[str, Tensor]
Spell = Callable[[str], str]


def model(architecture: Architecture) -> dict[str, Tensor]:
    return layouts.tiny_model(ends(architecture))


def baked(architecture: Architecture, file: File) -> File:
    source = DictSource(layouts.as_single_file(architecture, model(architecture)))
    applied, report = apply(source, [(load_lora(file), 1.0)])
    assert not report.unmatched
    return {key: applied.get(key) for key in source.specs}


def file_of(architecture: Architecture, dialect: str, *, denoiser: bool = True) -> File:
    """Return a LoRA of every module, or of the denoiser's, at scale 1."""
    file = lora_file(architecture, dialect, model(architecture))
    starts = ("unet.", "transformer.", "lora_unet_", "diffusion_model.")
    return {
        key: torch.tensor(2.0) if key.endswith("alpha") else value
        for key, value in file.items()
        if key.startswith(starts) or not denoiser
    }


def flat(prefix: str) -> Spell:
    def spell(key: str) -> str:
        stem, _, side = key.partition(".")[2].rpartition(".lora_")
        kind = {"A": "down", "B": "up"}[side[0]]
        return f"{prefix}{stem.replace('.', '_')}.lora_{kind}.weight"

    return spell


def swapped(old: str, new: str) -> Spell:
    return lambda key: key.replace(old, new)


def dotted(key: str) -> str:
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def processors(key: str) -> str:
    """Spell an attention layer as diffusers once did: attn1.processor.to_q_lora.down.weight."""
    stem, _, side = key.rpartition(".lora_")
    parent, _, layer = stem.removesuffix(".0").rpartition(".")
    return f"{parent}.processor.{layer}_lora.{'down' if side[0] == 'A' else 'up'}.weight"


SPELLINGS: dict[str, Spell] = {
    "OneTrainer": flat("lora_transformer_"),
    "SimpleTuner": flat("lycoris_"),
    "PEFT's keys": lambda key: f"base_model.model.{key.partition('.')[2]}",
    "PEFT's keys with a name": lambda key: f"base_model.model.{key.partition('.')[2]}".replace(
        ".weight", ".default.weight"
    ),
    "no prefix": lambda key: key.partition(".")[2],
    "no .weight": swapped(".weight", ""),
    "dotted": dotted,
    "ControlLoRA": lambda key: key.replace(".lora_A.weight", ".down").replace(
        ".lora_B.weight", ".up"
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("architecture", ["flux", "sd3", "qwen-image", "z-image", "wan"])
def test_a_trainers_spelling_bakes_as_diffusers_does(architecture: str, name: str) -> None:
    known = BY_ID[architecture]
    file = file_of(known, "diffusers")
    expected = baked(known, file)
    found = baked(known, {SPELLINGS[name](key): value for key, value in file.items()})
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def xlabs(key: str) -> str:
    parts = key.split("_")
    kind = "down" if "down" in key else "up"
    layer = "qkv" if "qkv" in key else "proj"
    stream = 1 if "img" in key else 2
    return f"double_blocks.{parts[4]}.processor.{layer}_lora{stream}.{kind}.weight"


def test_xlabs_bakes_as_kohya_does() -> None:
    flux = BY_ID["flux"]
    file = {
        key: value
        for key, value in file_of(flux, "kohya").items()
        if ("attn_qkv" in key or "attn_proj" in key) and not key.endswith("alpha")
    }
    found = baked(flux, {xlabs(key): value for key, value in file.items()})
    expected = baked(flux, file)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_xlabs_of_a_single_block_changes_q_k_and_v_and_not_the_mlp() -> None:
    flux = BY_ID["flux"]
    stem = "single_blocks.0.processor.qkv_lora"
    up, down = torch.randn(6, 2), torch.randn(2, 6)
    found = baked(flux, {f"{stem}.up.weight": up, f"{stem}.down.weight": down})
    before = layouts.as_single_file(flux, model(flux))
    key = "model.diffusion_model.single_blocks.0.linear1.weight"
    torch.testing.assert_close(found[key][:6], before[key][:6] + up @ down)
    assert torch.equal(found[key][6:], before[key][6:])


@pytest.mark.parametrize("architecture", ["wan", "flux", "flux2", "z-image", "lumina2"])
def test_ai_toolkit_and_musubi_bake_as_their_twins(architecture: str) -> None:
    """`diffusion_model.` with lora_A and lora_B, and kohya's names with a doubled underscore."""
    known = BY_ID[architecture]
    file = file_of(known, "comfyui")
    expected = baked(known, file)
    toolkit = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
        for key, value in file.items()
        if not key.endswith("alpha")
    }
    kohya = {
        f"lora_unet__{key.removeprefix('diffusion_model.').rpartition('.lora_')[0]}".replace(
            ".", "_"
        )
        + f".lora_{key.rpartition('.lora_')[2]}": value
        for key, value in file.items()
        if not key.endswith("alpha")
    }
    for twin in (toolkit, kohya):
        found = baked(known, twin)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("spell", [dotted, processors], ids=["traintrain", "attention processors"])
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_older_names_of_unets_bake_as_diffusers_does(architecture: str, spell: Spell) -> None:
    known = BY_ID[architecture]
    file = {k: v for k, v in file_of(known, "diffusers").items() if ".attn" in k}
    found = baked(known, {spell(key): value for key, value in file.items()})
    expected = baked(known, file)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer."])
def test_t5_of_flux_has_three_names(prefix: str) -> None:
    flux = BY_ID["flux"]
    path = "encoder.block.0.layer.0.SelfAttention.q"
    stem = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
    factors = {
        "lora_up.weight": torch.randn(2, 2),
        "lora_down.weight": torch.randn(2, 6),
    }
    lora = load_lora({f"{stem}.{role}": value for role, value in factors.items()})
    assert list(lora.adapters) == [f"text_encoder_2.{path}"] or prefix == "lora_te2_"
    both = {**file_of(flux, "kohya"), **{f"{stem}.{role}": v for role, v in factors.items()}}
    assert f"text_encoder_2.{path}" in load_lora(both).adapters


def test_the_web_uis_scale_takes_the_place_of_alpha() -> None:
    file = file_of(BY_ID["flux"], "kohya")
    scaled = {
        k.replace(".alpha", ".scale"): torch.tensor(0.5) if k.endswith("alpha") else v
        for k, v in file.items()
    }
    found, expected = dense(load_lora(scaled)), dense(load_lora(file))
    assert worst_error(found, {key: 0.5 * value for key, value in expected.items()}) == 0


@pytest.mark.parametrize("first", ["kohya", "diffusers"])
def test_one_lora_in_two_dialects_is_one_entry_a_module(first: str) -> None:
    """Fused and split modules meet under the first LoRA's names, and the sum is exact."""
    flux = BY_ID["flux"]
    second = "diffusers" if first == "kohya" else "kohya"
    one, other = (load_lora(file_of(flux, dialect)) for dialect in (first, second))
    merged, _ = merge([(one, 1.0), (other, 0.5)])
    assert merged.adapters.keys() == one.adapters.keys()
    source = DictSource(layouts.as_single_file(flux, model(flux)))
    together = apply(source, [(one, 1.0), (other, 0.5)])[0]
    alone = apply(source, [(merged, 1.0)])[0]
    for key in source.specs:
        torch.testing.assert_close(alone.get(key), together.get(key), rtol=1e-5, atol=1e-5)


def split_qkv(alpha: float) -> File:
    """Return what sd-scripts writes with split_qkv: three LoRAs of rank 2 in blocks."""
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.block_diag(*[torch.randn(2, 2) for _ in range(3)])  # type: ignore[no-untyped-call]
    proj = "lora_unet_double_blocks_0_img_attn_proj"
    return {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": torch.randn(6, 6),
        f"{stem}.alpha": torch.tensor(alpha),
        f"{proj}.lora_up.weight": torch.randn(4, 2),
        f"{proj}.lora_down.weight": torch.randn(2, 6),
        f"{proj}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize(("alpha", "factor"), [(1.0, 3.0), (3.0, 1.0)])
def test_split_qkv_is_mended_where_its_alpha_was_left(
    alpha: float, factor: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    file, out = tmp_path / "split.safetensors", tmp_path / "out.safetensors"
    save_file(split_qkv(alpha), file)
    report = ran("convert", file, "--repair", "-o", out)
    assert any("strength" in note for note in report["notes"]) == (factor != 1)
    before, after = dense(load_lora(file)), dense(load_lora(out))
    whole = "transformer.double_blocks.0.img_attn.qkv"
    expected = {key: value * (factor if key == whole else 1) for key, value in before.items()}
    assert worst_error(after, expected) < 1e-6


def test_missing_alpha_dead_layers_and_stale_hashes_are_mended_and_said(tmp_path: Path) -> None:
    file, out = tmp_path / "old.safetensors", tmp_path / "out.safetensors"
    at = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    tensors = {
        f"{at}{layer}.lora_{side}.weight": torch.ones(4, 4)
        * (0 if (layer, side) == ("k", "up") else 1)
        for layer in "qkv"
        for side in ("up", "down")
    }
    save_file(tensors, file, metadata={"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8})
    report = ran("convert", file, "--repair", "-o", out, "--verify")
    words = " ".join(report["notes"])
    assert "no alpha" in words and "to_k" in words and "sshs_model_hash" in words
    assert len(load_lora(out).adapters) == 2
    assert not ran("convert", out, "--repair", "-o", tmp_path / "again.safetensors")["notes"]


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfyui"])
@pytest.mark.parametrize("architecture", ["sd1", "flux", "wan", "z-image"])
def test_a_tensor_that_nobody_claims_stops_the_command_and_is_named(
    architecture: str, dialect: str, tmp_path: Path
) -> None:
    file = file_of(BY_ID[architecture], dialect) | {"what.is.this": torch.ones(2)}
    path, out = tmp_path / "odd.safetensors", tmp_path / "out.safetensors"
    save_file({key: value.contiguous() for key, value in file.items()}, path)
    for command in (["merge", path], ["convert", path, "--to", "comfyui"]):
        words = refused(*command, "-o", out)
        assert "what.is.this" in words and "odd.safetensors" in words
        assert not out.exists()
    report = ran("convert", path, "--to", "comfyui", "-o", out, "--allow-unmatched")
    assert any("what.is.this" in name for name in report["unmatched"])


@pytest.mark.parametrize("architecture", ["flux", "sd3", "wan", "sdxl"])
def test_a_layer_that_the_model_lacks_stops_the_command_and_is_named(
    architecture: str, tmp_path: Path
) -> None:
    known = BY_ID[architecture]
    file = file_of(known, "diffusers")
    stem = f"{known.denoiser}.mid_block_of_another.attn.to_q"
    file |= {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(2, 2)}
    path, base = tmp_path / "odd.safetensors", tmp_path / "base.safetensors"
    save_file({key: value.contiguous() for key, value in file.items()}, path)
    single = layouts.as_single_file(known, model(known))
    save_file({key: value.contiguous() for key, value in single.items()}, base)
    words = refused("merge", path, "--into", base, "-o", tmp_path / "out.safetensors")
    assert "mid_block_of_another" in words
