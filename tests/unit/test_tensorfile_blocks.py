"""Tensors block by block: the same elements, and no whole tensor in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.errors import FileFormatError
from lorakit.linalg.tiles import squared_distance, subtracted
from lorakit.models import open_model
from lorakit.tensorfile import blocks as module
from lorakit.tensorfile.blocks import blocks
from lorakit.tensorfile.plain import DictSource, FileSource, TensorSource
from lorakit.tensorfile.writer import write_safetensors

SIZE = 1000


def stored(path: Path, dtype: torch.dtype, seed: int = 0) -> FileSource:
    g = torch.Generator().manual_seed(seed)
    tensors = {"first": torch.zeros(3), "w": torch.randn(40, SIZE // 40, generator=g).to(dtype)}
    write_safetensors(path, DictSource(tensors))
    return FileSource.of(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)


@pytest.mark.parametrize("span", [(0, SIZE), (0, 64), (63, 65), (128, 192), (999, SIZE), (5, 5)])
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_elements_of_a_span_come_in_their_order(
    tmp_path: Path, span: tuple[int, int], in_memory: bool
) -> None:
    source: TensorSource = stored(tmp_path / "a.safetensors", torch.float16)
    whole = source.get("w").reshape(-1)
    if in_memory:
        source = DictSource({"w": whole})
    found = [block.clone() for block in blocks(source, "w", *span)]
    assert all(len(block) <= 64 for block in found)
    assert torch.equal(torch.cat([*found, whole[:0]]), whole[slice(*span)])


def test_a_file_that_changed_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    source = stored(tmp_path / "a.safetensors", torch.float16)
    with open(source.path, "ab") as file:
        file.write(b"more")
    with pytest.raises(FileFormatError, match=r"a\.safetensors: expected the file as it was"):
        list(blocks(source, "w", 0, SIZE))


@pytest.mark.parametrize("first", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("second", [torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_differences_are_taken_in_fp32_whatever_the_dtypes(
    tmp_path: Path, first: torch.dtype, second: torch.dtype
) -> None:
    one, two = (
        stored(tmp_path / f"{seed}.safetensors", dtype, seed)
        for seed, dtype in enumerate((first, second))
    )
    expected = one.get("w").float() - two.get("w").float()

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(blocks(one, "w", 0, SIZE), blocks(two, "w", 0, SIZE), strict=True)

    assert torch.equal(subtracted(pairs(), torch.empty(40, SIZE // 40)), expected)
    square = float(expected.double().norm() ** 2)
    assert squared_distance(pairs()) == pytest.approx(square, rel=1e-6)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_models_in_files_are_subtracted_without_a_whole_tensor(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = synthetic.single_file(architecture, factor=32)
    synthetic.write_checkpoint(tmp_path / "a.safetensors", layout)
    synthetic.write_tuned(tmp_path / "b.safetensors", layout)
    one, two = (open_model(lorakit.open_source(tmp_path / f"{x}.safetensors")) for x in "ab")
    modules = sorted(one.index.layers)
    expected = {m: two.weight(m) - one.weight(m) for m in modules}
    monkeypatch.setattr(FileSource, "get", None)
    # OpenCLIP's projection is stored turned, the only one that has to be read whole.
    turned = {m for m in modules if (slot := one.slot(m)) is not None and slot.transpose}
    assert len(turned) <= 1
    for name in modules:
        if name not in turned:
            two.difference(name, one, found := torch.empty_like(expected[name]))
            assert torch.equal(found, expected[name]), name
