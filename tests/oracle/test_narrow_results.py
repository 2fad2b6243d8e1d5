"""What is only saved is rounded as it is made: the same bytes on disk, half of them in memory."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit import saving
from lorakit.compute import Compute
from lorakit.errors import NumericsError
from lorakit.lorafile import LoraFile
from lorakit.saving import Output
from tests.helpers import few, ran

WIDE = Compute(threads=2, together=4)
NARROW = replace(WIDE, narrow=True)
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
RULE = lorakit.RankRule(rank=3)


def dtypes(lora: LoraFile) -> set[torch.dtype]:
    """Return the dtypes of a LoRA's tensors, those of alphas and the like left out."""
    tensors = (tensor for a in lora.adapters.values() for tensor in a.tensors().values())
    return {tensor.dtype for tensor in tensors if tensor.ndim}


def check_same_bytes(wide: LoraFile, narrow: LoraFile, folder: Path, dialect: str) -> None:
    files = [folder / name / "lora.safetensors" for name in ("wide", "narrow")]
    for file, lora in zip(files, (wide, narrow), strict=True):
        lorakit.save_lora(file, lora, output=Output(dialect=dialect))
    for first, second in pairwise(files):
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_extraction_has_the_same_bytes(
    slim_tuned: Path, sd15: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    models = lorakit.open_source(sd15), lorakit.open_source(slim_tuned)
    choice = lorakit.Choice(kind=kind, dtype=dtype)
    wide, _ = lorakit.extract(*models, rule=RULE, choice=choice, compute=WIDE)
    narrow, _ = lorakit.extract(*models, rule=RULE, choice=choice, compute=NARROW)
    assert (dtypes(wide), dtypes(narrow)) == ({torch.float32}, {DTYPES[dtype]})
    check_same_bytes(wide, narrow, tmp_path, "kohya")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft", "comfyui"])
def test_resized_and_merged_loras_have_the_same_bytes(
    slim_lora: Path, tmp_path: Path, dialect: str
) -> None:
    lora = lorakit.load_lora(slim_lora)
    for place, compute in enumerate((WIDE, NARROW)):
        resized, _ = lorakit.resize(lora, rule=RULE, compute=compute)
        merged, _ = lorakit.merge([(lora, 0.5), (resized, -0.3)], compute=compute)
        expected = DTYPES["F16"] if place else torch.float32
        assert dtypes(resized) == dtypes(merged) == {expected}
    pairs = (
        [lorakit.resize(lora, rule=RULE, compute=compute)[0] for compute in (WIDE, NARROW)],
        [lorakit.merge([(lora, 0.5), (lora, 2)], compute=compute)[0] for compute in (WIDE, NARROW)],
    )
    for name, (wide, narrow) in zip(("resized", "merged"), pairs, strict=True):
        check_same_bytes(wide, narrow, tmp_path / name, dialect)


def test_what_another_alpha_may_rescale_or_fp32_is_to_hold_stays_in_fp32(
    slim_tuned: Path, sd15: Path, slim_lora: Path
) -> None:
    models = lorakit.open_source(sd15), lorakit.open_source(slim_tuned)
    assert dtypes(lorakit.extract(*models, rule=RULE, alpha=1.0, compute=NARROW)[0]) == {
        torch.float32
    }
    lora = replace(lorakit.load_lora(slim_lora), dtype="F32")
    assert dtypes(lorakit.resize(lora, rule=RULE, compute=NARROW)[0]) == {torch.float32}


def test_what_overflows_is_still_told_by_its_name(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = few(synthetic.lora_tensors("sd1", rank=4, factor=32))
    tensors = {key: t.float() * (1 if t.ndim == 0 else 3e6) for key, t in tensors.items()}
    lora = replace(lorakit.load_lora(tensors), dtype="F16")
    narrow, _ = lorakit.resize(lora, rule=lorakit.RankRule(rank=2), compute=NARROW)
    with pytest.raises(NumericsError, match=r"lora_\w+\.weight.* overflows F16"):
        lorakit.save_lora(tmp_path / "lora.safetensors", narrow)


def test_commands_hold_what_they_save_in_16_bits(
    slim_lora: Path, slim_tuned: Path, sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[torch.dtype]] = []
    save = saving.save_lora

    def looked_at(path: Path, lora: LoraFile, **options: Any) -> saving.Written:
        seen.append(dtypes(lora))
        return save(path, lora, **options)

    monkeypatch.setattr(saving, "save_lora", looked_at)
    ran("resize", slim_lora, "--rank", 2, "-o", tmp_path / "a.safetensors")
    ran("merge", slim_lora, slim_lora, "-o", tmp_path / "b.safetensors")
    ran("extract", sd15, slim_tuned, "--rank", 2, "-o", tmp_path / "c.safetensors")
    ran("resize", slim_lora, "--rank", 2, "--dtype", "fp32", "-o", tmp_path / "d.safetensors")
    assert seen == [{torch.float16}] * 3 + [{torch.float32}]
