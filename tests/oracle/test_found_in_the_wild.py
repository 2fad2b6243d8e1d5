"""Files as trainers and the web have them: every tensor has its place, none is lost."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.errors import UnmatchedError
from lorakit.lorafile import load_lora
from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.families import ARCHITECTURES
from lorakit.names.flux import FLUX
from lorakit.names.wan import WAN
from lorakit.operations.apply import apply
from lorakit.operations.choice import Choice
from lorakit.operations.extract import extract
from lorakit.operations.merge import merge
from lorakit.saving import Output, save_lora, stored_tensors
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.helpers import tensors_of
from tests.oracle.test_architectures import ends, lora_file

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


FLUX_MODEL = layouts.tiny_model(
    [name for name in ends(FLUX) if name.component in ("transformer", "text_encoder")]
)


@pytest.mark.parametrize(
    ("denoiser", "text"),
    [
        ("base_model.model.transformer.", "base_model.model.text_encoder."),
        ("transformer.base_model.model.", "text_encoder.base_model.model."),
        ("transformer.diffusion_model.", "text_encoder."),
        ("base_model.model.diffusion_model.", "base_model.model.text_encoder."),
        ("base_model.model.transformer.diffusion_model.", "base_model.model.text_encoder."),
        ("pipe.dit.", "text_encoder."),
        ("model.diffusion_model.", "text_encoders.clip_l.transformer."),
    ],
)
@pytest.mark.parametrize("layout", ["single file", "diffusers"])
def test_a_trainer_that_wraps_a_pipeline_adds_prefixes_to_prefixes(
    denoiser: str, text: str, layout: str
) -> None:
    plain = lora_file(FLUX, "diffusers" if layout == "diffusers" else "comfyui", FLUX_MODEL)
    starts = {"transformer.": denoiser, "text_encoder.": text, "diffusion_model.": denoiser}
    starts["text_encoders.clip_l.transformer."] = text
    wrapped = {
        start + key.removeprefix(old): tensor
        for key, tensor in plain.items()
        for old, start in starts.items()
        if key.startswith(old)
    }
    assert len(wrapped) == len(plain)
    found, expected = load_lora(wrapped), load_lora(plain)
    assert found.architecture is FLUX
    assert found.adapters.keys() == expected.adapters.keys()


@pytest.mark.parametrize(
    ("in_lora", "in_model"),
    [
        ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.q_proj"),
        ("layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.q_proj"),
        ("model.layers.{}.self_attn.q_proj", "layers.{}.self_attn.q_proj"),
        ("language_model.model.layers.{}.q_proj", "model.language_model.layers.{}.q_proj"),
        ("transformer.h.{}.attn.query_key_value", "h.{}.attn.query_key_value"),
        ("h.{}.attn.query_key_value", "transformer.h.{}.attn.query_key_value"),
    ],
)
def test_the_class_around_a_language_model_does_not_matter(in_lora: str, in_model: str) -> None:
    """A LoRA of `AutoModel` fits the model with a head; transformers renamed the rest."""
    base = {f"{in_model.format(i)}.weight": torch.zeros(4, 6) for i in range(2)}
    base["model.visual.blocks.0.attn.q_proj.weight"] = torch.zeros(4, 6)
    file = {}
    for i in range(2):
        stem = f"base_model.model.{in_lora.format(i)}"
        file |= {
            f"{stem}.lora_A.weight": torch.ones(2, 6),
            f"{stem}.lora_B.weight": torch.ones(4, 2),
        }
    applied, report = apply(DictSource(base), [(load_lora(file), 1.0)])
    assert not report.unmatched
    changed = {key for key in base if not torch.equal(applied.get(key), base[key])}
    assert changed == {f"{in_model.format(i)}.weight" for i in range(2)}


def test_a_name_that_fits_two_models_in_one_is_not_guessed() -> None:
    base = {
        f"{place}.layers.0.fc.weight": torch.zeros(4, 6) for place in ("model", "language_model")
    }
    stem = "base_model.model.layers.0.fc"
    file = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(UnmatchedError, match="none of the LoRA's layers has a place"):
        apply(DictSource(base), [(load_lora(file), 1.0)])


def test_a_model_that_shares_half_its_names_with_another_is_not_taken_for_it() -> None:
    """HunyuanVideo 1.5 has the blocks of SD 3 but more of them, and much besides."""
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.0.proj", "ff.net.2", "norm1.linear")
    paths = [f"transformer_blocks.{i}.{name}" for i in range(54) for name in names]
    paths += [f"image_embedder.linear_{i}" for i in range(9)]
    index = index_checkpoint({f"{path}.weight": (4, 6) for path in paths})
    assert index.architecture is None
    assert index.layers == set(paths)
    file = {f"transformer.{path}.lora_{s}.weight": torch.ones(2, 2) for path in paths for s in "AB"}
    lora = load_lora(file)
    assert lora.architecture is None
    assert stored_tensors(lora, dialect="diffusers", dtype="F32").keys() == file.keys()


def test_layers_that_no_table_names_are_extracted_beside_those_that_it_does() -> None:
    """Wan Animate is a Wan with a face encoder; an embedding is no layer, its projection is one."""
    base = dict(WAN_SINGLE)
    for own in ("face_adapter.0.to_q.weight", "time_embedding_2.linear.weight"):
        base[PREFIX + own] = torch.zeros(4, 6)
    base[PREFIX + "token_embedding.weight"] = torch.zeros(4, 6)
    tuned = {key: tensor + torch.ones_like(tensor) for key, tensor in base.items()}
    lora, report = extract(DictSource(base), DictSource(tuned), dialect="comfyui")
    assert {"transformer.face_adapter.0.to_q", "transformer.time_embedding_2.linear"} <= (
        lora.adapters.keys()
    )
    assert PREFIX + "token_embedding.weight" in report.lost
    stored = stored_tensors(lora, dialect="comfyui", dtype="F32")
    again, _ = apply(DictSource(base), [(load_lora(stored), 1.0)])
    key = PREFIX + "face_adapter.0.to_q.weight"
    torch.testing.assert_close(again.get(key), tuned[key])


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("flux2", "mistral3_24b"), ("flux2-klein-4b", "qwen3_4b"), ("flux2-klein-9b", "qwen3_8b")],
)
def test_the_text_encoder_of_flux2_has_its_place(architecture: str, name: str) -> None:
    known = next(a for a in ARCHITECTURES if a.id == architecture)
    assert known.clips == {"text_encoder": name}
    layer = "layers.0.mlp.gate_proj"
    names = [name for name in ends(known) if name.component == "transformer"]
    denoiser = lora_file(known, "diffusers", layouts.tiny_model(names))
    for stem in (f"text_encoders.{name}.transformer.model.{layer}", f"text_encoder.model.{layer}"):
        file = denoiser | {f"{stem}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
        assert f"text_encoder.model.{layer}" in load_lora(file).adapters


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "comfyui"])
def test_a_bias_beside_factors_goes_where_the_dialect_has_it(dialect: str, tmp_path: Path) -> None:
    """`diff_b` has no scale, `lora_B.bias` has that of the factors; only PEFT keeps one."""
    stem = "diffusion_model.blocks.0.self_attn.q"
    q = WAN_SINGLE[f"{PREFIX}blocks.0.self_attn.q.weight"]
    file = {
        f"{stem}.lora_down.weight": torch.randn(2, q.shape[1]),
        f"{stem}.lora_up.weight": torch.randn(len(q), 2),
        f"{stem}.alpha": torch.tensor(0.6),
        f"{stem}.diff_b": torch.randn(len(q)),
    }
    out = tmp_path / ("adapter" if dialect == "peft" else "out.safetensors")
    lora = load_lora(file)
    save_lora(out, lora, output=Output(dialect=dialect, dtype="F32"))
    weights = out / "adapter_model.safetensors" if dialect == "peft" else out
    (bias,) = (key for key in tensors_of(weights) if key.endswith(("bias", "diff_b")))
    assert bias.endswith(".diff_b" if dialect == "comfyui" else ".attn1.to_q.lora_B.bias")
    for base in (DictSource(WAN_SINGLE), DictSource(layouts.as_folder(WAN_MODEL))):
        wanted, _ = apply(base, [(lora, 1.0)])
        found, _ = apply(base, [(load_lora(out), 1.0)])
        for key in base.specs:
            torch.testing.assert_close(found.get(key), wanted.get(key), rtol=1e-5, atol=1e-6)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def blocks_of(width: int, depth: int, *attentions: str) -> dict[str, Tensor]:
    """Return a LoRA of a stack of blocks under diffusers' usual names, of which many models are."""
    sides = {"lora_A": (4, width), "lora_B": (width, 4)}
    return {
        f"transformer.transformer_blocks.{block}.{attention}.{layer}.{side}.weight": torch.ones(
            shape
        )
        for block in range(depth)
        for attention in attentions
        for layer in ATTENTION
        for side, shape in sides.items()
    }


@pytest.mark.parametrize(
    ("width", "depth", "attentions", "title"),
    [
        (2048, 28, ("attn1", "attn2"), "LTX-Video 2B"),
        (4096, 48, ("attn1", "attn2"), "LTX-Video 13B"),
        (1152, 28, ("attn1", "attn2"), "PixArt alpha and sigma"),
        (2048 // 32, 28, ("attn1", "attn2"), "LTX-Video 2B"),
        (1920, 30, ("attn1",), None),
        (3072, 42, ("attn1",), None),
        (2240, 20, ("attn1", "attn2"), None),
    ],
    ids=["ltx", "ltx-13b", "pixart", "shrunken", "cogvideox-2b", "cogvideox-5b", "sana"],
)
def test_a_model_with_names_like_ltx_is_not_called_ltx(
    width: int, depth: int, attentions: tuple[str, ...], title: str | None
) -> None:
    lora = load_lora(blocks_of(width, depth, *attentions))
    assert (lora.architecture.title if lora.architecture else None) == title
    assert len(lora.adapters) == depth * len(attentions) * len(ATTENTION), "read by its own names"
