"""A folder of inputs, and old outputs to be replaced."""

import shutil
from pathlib import Path

import pytest
import synthetic

from tests.cli.conftest import FACTOR
from tests.faults.scenes import FOLDERS
from tests.helpers import few, ran, slim_layout


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make inputs and old outputs; nothing in the folder may be changed."""
    folder = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate(("a", "b")):
        tensors = synthetic.lora_tensors("sd1", rank=3 + seed, alpha=2, seed=seed, factor=FACTOR)
        synthetic.write_lora(folder / f"{name}.safetensors", few(tensors))
    layout = slim_layout("sd1", factor=FACTOR)
    synthetic.write_checkpoint(folder / "base.safetensors", layout)
    synthetic.write_folder(folder / "pipeline", "sd1", factor=FACTOR)
    lora, half = folder / "a.safetensors", f"{folder / 'a.safetensors'}:0.5"
    ran("merge", half, "--into", folder / "base.safetensors", "-o", folder / "old.safetensors")
    ran("merge", half, "--into", folder / "pipeline", "-o", folder / "old-pipeline")
    ran("convert", lora, "--to", "peft", "--dtype", "bf16", "-o", folder / "old-peft")
    return folder


@pytest.fixture
def make_scene(made: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Return `make(scene)`: a folder with the scene's inputs and its old output."""

    def make(scene: str) -> Path:
        folder = tmp_path / scene.replace(" ", "-")
        folder.mkdir()
        for name in ("a.safetensors", "b.safetensors", "base.safetensors"):
            shutil.copy(made / name, folder)
        if scene in FOLDERS:
            old = "old-peft" if "PEFT" in scene else "old-pipeline"
            shutil.copytree(made / "pipeline", folder / "pipeline")
            shutil.copytree(made / old, folder / "out")
        else:
            shutil.copy(made / "old.safetensors", folder / "out.safetensors")
        return folder

    return make
