"""What is wrong in a model's weights: named, and nothing is written over it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.operations import verify_model
from tests.helpers import ran, refused, run, tensors_of

WEIGHT = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ODD = {
    "int8": lambda weight: weight.to(torch.int8),
    "int32": lambda weight: weight.to(torch.int32),
    "uint8": lambda weight: weight.to(torch.uint8),
    "bool": lambda weight: weight > 0,
    "complex": lambda weight: weight.to(torch.complex64),
}


def with_weight(sd15: Path, place: Path, weight: Tensor) -> Path:
    save_file({**tensors_of(sd15), WEIGHT: weight}, place)
    return place


@pytest.mark.parametrize("kind", ODD)
def test_a_lora_is_not_rounded_to_what_is_no_float(
    sd15: Path, sd15_lora: Path, tmp_path: Path, kind: str
) -> None:
    """To an integer it would be lost without a word."""
    model = with_weight(sd15, tmp_path / "odd.safetensors", ODD[kind](tensors_of(sd15)[WEIGHT]))
    out = tmp_path / "out.safetensors"
    for command in (
        ["merge", sd15_lora, "--into", model],
        ["merge", sd15_lora, "--into", model, "--dtype", "fp16"],
        ["extract", sd15, model],
        ["extract", model, sd15],
        ["resize", sd15_lora, "--rank", 1, "--against", model],
    ):
        words = refused(*command, "-o", out)
        assert "odd.safetensors" in words and WEIGHT in words and "found " in words
        assert "the model as fp16" in words or "the model to fp16" in words
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_added_to_what_is_no_number(
    sd15: Path, sd15_lora: Path, tmp_path: Path, value: float
) -> None:
    weight = tensors_of(sd15)[WEIGHT]
    weight[3, 1] = value
    model, out = with_weight(sd15, tmp_path / "odd.safetensors", weight), tmp_path / "out"
    for more in ([], ["--verify"], ["--dtype", "fp32"]):
        words = refused("merge", sd15_lora, "--into", model, "-o", f"{out}.safetensors", *more)
        assert "odd.safetensors" in words and WEIGHT in words and "found 1 that" in words
    inner = f"{model}+{sd15_lora}"
    words = refused(
        "merge", f"{sd15_lora}:te=1:unet=0", "--into", inner, "-o", f"{out}.safetensors"
    )
    assert "odd.safetensors" in words and "found 1 that" in words
    for sides in ([model, sd15], [sd15, model]):
        words = refused("extract", *sides, "-o", f"{out}.safetensors")
        assert "odd.safetensors" in words and LAYER in words and "NaN or infinity" in words
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd.safetensors"]


def test_a_mask_of_infinities_passes_beside_the_weights(
    sd15: Path, sd15_lora: Path, tmp_path: Path
) -> None:
    mask = torch.full((3, 3), float("-inf")).triu(1)
    model, out = tmp_path / "masked.safetensors", tmp_path / "out.safetensors"
    save_file({**tensors_of(sd15), "cond_stage_model.mask": mask}, model)
    for more in ([], ["--dtype", "fp32"]):
        ran("merge", sd15_lora, "--into", model, "-o", out, "--verify", "--overwrite", *more)
        assert torch.equal(tensors_of(out)["cond_stage_model.mask"], mask)


def test_a_nan_that_came_on_the_way_to_disk_is_found(
    sd15: Path, sd15_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's maximum of a number and NaN is the number."""
    blocks = verify_model._blocks

    def broken(stored, base, addends):  # type: ignore[no-untyped-def]
        for rows, part, value, delta in blocks(stored, base, addends):
            part = part.clone()
            part.view(-1)[0] = float("nan")
            yield rows, part, value, delta

    monkeypatch.setattr(verify_model, "_blocks", broken)
    out = tmp_path / "out.safetensors"
    result = run("merge", sd15_lora, "--into", sd15, "-o", out, "--verify")
    assert result.exit_code == 1 and "nan units in the last place" in result.output
    assert not out.exists()
