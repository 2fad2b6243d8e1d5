"""diffusers computes with lorakit's files what plain float64 arithmetic on the weights computes."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import synthetic
import torch

from tests.clients import models
from tests.helpers import ran, tensors_of

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
convert_ldm_unet_checkpoint = pytest.importorskip(
    "diffusers.loaders.single_file_utils"
).convert_ldm_unet_checkpoint
pytestmark = models.peers()

STRENGTHS = (0.7, -0.4)
STORED = 1e-6
"""Of a ΔW: factors in fp32, rank below 16. PEFT multiplies them in fp32 too."""
BAKED = 6e-6
"""Of a ΔW: W + ΔW is rounded to fp32 and ‖ΔW‖ is 2 % of ‖W‖ or more: 2^-24 / 0.02, with room."""
OUTPUT = 1e-7
"""Of an output; without the LoRA it is off by more than 1e-3."""
CONTROL = 1e-3


@dataclass(frozen=True)
class Twin:
    """A model, two LoRAs of different ranks, and what plain arithmetic makes of them."""

    folder: Path
    change: models.Deltas
    weights: models.Deltas
    without: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def twin(make_folder):  # type: ignore[no-untyped-def]
    """Return `twin(architecture)`."""

    @cache
    def make(architecture: str) -> Twin:
        folder = make_folder(architecture, dtype="F32")
        terms = [
            (models.deltas(architecture, "kohya", tensors), strength)
            for tensors, strength in zip(
                pair(architecture, "kohya", "kohya"), STRENGTHS, strict=True
            )
        ]
        change = models.summed(terms)
        assert len(change) == len(models.kept(architecture)) > 100
        parts = models.load_all(folder)
        weights, without = models.weights(parts, change), models.outputs(parts)
        expected = models.outputs(models.changed(parts, change))
        return Twin(folder, change, weights, without, expected)

    return make


def pair(architecture: str, *dialects: str) -> list[dict[str, torch.Tensor]]:
    """Return two LoRAs; ΔW is the same in every dialect."""
    return [
        models.lora(architecture, name, rank=rank, alpha=2, seed=rank, conv=conv, dtype="F32")
        for name, rank, conv in zip(dialects, (4, 3), (True, False), strict=True)
    ]


def stack(architecture: str, dialect: str, folder: Path) -> list[str]:
    """Write two LoRAs of different ranks and dialects; return them with their strengths."""
    other = "kohya" if dialect == "diffusers" else "diffusers"
    written = [
        synthetic.write_lora(folder / f"{index}.safetensors", tensors)
        for index, tensors in enumerate(pair(architecture, dialect, other))
    ]
    return [f"{path}:{strength}" for path, strength in zip(written, STRENGTHS, strict=True)]


def pipeline(parts: dict[str, torch.nn.Module]) -> diffusers.DiffusionPipeline:
    scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    rest = {"vae": diffusers.AutoencoderKL(), "scheduler": scheduler, "tokenizer": None}
    if "text_encoder_2" in parts:
        return diffusers.StableDiffusionXLPipeline(
            **parts, **rest, tokenizer_2=None, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def assert_same(parts: dict[str, torch.nn.Module], twin: Twin) -> None:
    found = models.outputs(parts)
    expected = {name: twin.expected[name] for name in found}
    off = models.distances(found, expected)
    without = models.distances({name: twin.without[name] for name in found}, expected)
    assert max(off.values()) < OUTPUT, off
    assert min(without.values()) > CONTROL, without


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_pipeline_runs_and_fuses_a_merged_lora(
    twin, tmp_path: Path, architecture: str, dialect: str
) -> None:  # type: ignore[no-untyped-def]
    merged, told = tmp_path / "merged.safetensors", twin(architecture)
    ran("merge", *stack(architecture, dialect, tmp_path), "-o", merged, "--dtype", "fp32")
    parts = models.load_all(told.folder)
    pipe = pipeline(parts)
    pipe.load_lora_weights(merged)
    assert_same(parts, told)
    assert models.worst_change(parts, told.weights, told.change) == 1.0, "nothing is fused yet"
    pipe.fuse_lora(components=list(parts))
    assert models.worst_change(parts, told.weights, told.change) < STORED


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
def test_a_baked_model_loads_and_gives_the_same(
    twin, make_checkpoint, tmp_path: Path, architecture: str
) -> None:  # type: ignore[no-untyped-def]
    """from_single_file asks a hub for configs; its converter alone does not."""
    told, arguments = twin(architecture), stack(architecture, "kohya", tmp_path)
    ran("merge", *arguments, "--into", told.folder, "-o", tmp_path / "baked")
    baked = models.load_all(tmp_path / "baked")
    assert_same(baked, told)
    assert models.worst_change(baked, told.weights, told.change) < BAKED

    file = tmp_path / "baked.safetensors"
    ran("merge", *arguments, "--into", make_checkpoint(architecture, dtype="F32"), "-o", file)
    unet = models.load(told.folder, "unet")
    converted = convert_ldm_unet_checkpoint(tensors_of(file), unet.config)
    unet.load_state_dict(converted)
    assert_same({"unet": unet}, told)
