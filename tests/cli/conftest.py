"""A folder of inputs to make files of."""

import shutil
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import save_file

from tests.cli.inputs import FACE
from tests.helpers import few, ran, slim, slim_layout, tensors_of

FACTOR = 32


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of LoRAs and models; nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("a", "b")):
        rank = 3 + seed
        tensors = synthetic.lora_tensors("sd1", rank=rank, alpha=2, seed=seed, factor=FACTOR)
        metadata = synthetic.lora_metadata("sd1", rank=rank, alpha=2)
        synthetic.write_lora(folder / f"{name}.safetensors", few(tensors), metadata)
    foreign = {**tensors_of(folder / "a.safetensors"), "mystery.tensor": torch.ones(3)}
    save_file(foreign, folder / "foreign.safetensors")
    for seed, name in enumerate(("peft-a", "peft-b")):
        tensors = synthetic.lora_tensors("sd1", dialect="peft", rank=3, seed=seed, factor=FACTOR)
        synthetic.write_peft_folder(folder / name, few(tensors), rank=3)
    layout = slim_layout("sd1", factor=FACTOR)
    synthetic.write_checkpoint(folder / "base.safetensors", layout)
    synthetic.write_tuned(folder / "tuned.safetensors", layout)
    slim(folder / "base.safetensors", folder / "tuned.safetensors")
    parts = ["--as", "dora", "--rank", 2, "--only", "OUT0[3-4]"]
    models = [folder / f"{name}.safetensors" for name in ("base", "tuned")]
    ran("extract", *models, *parts, "-o", folder / "dora.safetensors")
    synthetic.write_folder(folder / "pipeline", "sd1", factor=FACTOR)
    (folder / "own.txt").write_text(f"FACE:{FACE}\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the inputs and go there."""
    place = tmp_path / "work"
    shutil.copytree(inputs, place)
    monkeypatch.chdir(place)
    return place
