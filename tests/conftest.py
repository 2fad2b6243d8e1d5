"""Small files with real names, made once a session."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import few, slim

FACTOR = 32

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The bits of a QR or an SVD depend on the number of threads, and small ones run faster on one.
torch.set_num_threads(1)

MakeCheckpoint = Callable[..., Path]
MakeLora = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a graphics card where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return `make(architecture, *, seed, dtype, tuning, leftovers, metadata)`: a cached file."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(architecture: str, **options: object) -> Path:
        name = repr((architecture, sorted(options.items())))
        if name not in made:
            path = folder / f"{architecture}-{len(made)}.safetensors"
            tensors = synthetic.single_file(architecture, factor=FACTOR)
            made[name] = synthetic.write_checkpoint(path, tensors, **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return `make(architecture, *, seed, dtype, tuning)`: a cached diffusers folder."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("folders")

    def make(architecture: str, **options: object) -> Path:
        name = repr((architecture, sorted(options.items())))
        if name not in made:
            folder = root / f"{architecture}-{len(made)}"
            made[name] = synthetic.write_folder(folder, architecture, factor=FACTOR, **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_lora(tmp_path_factory: pytest.TempPathFactory) -> MakeLora:
    """Return `make(architecture, *, every, <options of synthetic.lora_tensors>)`: a cached file.

    `every` keeps one module of so many: the same work for every layer, and less of it.
    """
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("loras")

    def make(architecture: str, *, every: int = 1, **options: object) -> Path:
        name = repr((architecture, every, sorted(options.items())))
        if name not in made:
            path = folder / f"{architecture}-{len(made)}.safetensors"
            tensors = synthetic.lora_tensors(architecture, factor=FACTOR, **options)
            tensors = few(tensors, every=every)
            told = {k: options[k] for k in ("rank", "alpha", "conv") if k in options}
            metadata = synthetic.lora_metadata(architecture, **told)
            made[name] = synthetic.write_lora(path, tensors, metadata)
        return made[name]

    return make


@pytest.fixture(scope="session")
def sd15(make_checkpoint: MakeCheckpoint) -> Path:
    """Return an SD 1.5 checkpoint with the fp32 and int64 leftovers of old files."""
    return make_checkpoint("sd1", leftovers=True)


@pytest.fixture(scope="session")
def sd15_tuned(make_checkpoint: MakeCheckpoint) -> Path:
    """Return the same checkpoint, fine-tuned."""
    return make_checkpoint("sd1", leftovers=True, tuning=synthetic.Tuning(rank=4))


@pytest.fixture(scope="session")
def sd2(make_checkpoint: MakeCheckpoint) -> Path:
    """Return an SD 2.x checkpoint."""
    return make_checkpoint("sd2")


@pytest.fixture(scope="session")
def sdxl(make_checkpoint: MakeCheckpoint) -> Path:
    """Return an SDXL checkpoint."""
    return make_checkpoint("sdxl", metadata={"modelspec.title": "synthetic"})


@pytest.fixture(scope="session")
def sdxl_tuned(make_checkpoint: MakeCheckpoint) -> Path:
    """Return the same checkpoint, fine-tuned."""
    return make_checkpoint("sdxl", tuning=synthetic.Tuning(rank=4))


@pytest.fixture(scope="session")
def sd15_folder(make_folder: MakeCheckpoint) -> Path:
    """Return the weights of `sd15` as a diffusers folder."""
    return make_folder("sd1")


@pytest.fixture(scope="session")
def sdxl_folder(make_folder: MakeCheckpoint) -> Path:
    """Return the weights of `sdxl` as a diffusers folder."""
    return make_folder("sdxl")


@pytest.fixture(scope="session")
def sd15_lora(make_lora: MakeLora) -> Path:
    """Return a kohya LoRA for `sd15`: rank 4, alpha 2."""
    return make_lora("sd1", rank=4, alpha=2)


@pytest.fixture(scope="session")
def sdxl_lora(make_lora: MakeLora) -> Path:
    """Return a kohya LoRA for `sdxl`: rank 4, alpha 2."""
    return make_lora("sdxl", rank=4, alpha=2)


@pytest.fixture(scope="session")
def slim_lora(make_lora: MakeLora) -> Path:
    """Return every third module of `sd15_lora`, of all blocks and of the text encoder."""
    return make_lora("sd1", rank=4, alpha=2, every=3)


@pytest.fixture(scope="session")
def slim_sdxl_lora(make_lora: MakeLora) -> Path:
    """Return every fifth module of `sdxl_lora`, of all blocks and of both text encoders."""
    return make_lora("sdxl", rank=4, alpha=2, every=5)


@pytest.fixture(scope="session")
def slim_tuned(sd15: Path, sd15_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return `sd15` with every third layer of those fine-tuned that `sd15_tuned` changes."""
    path = tmp_path_factory.mktemp("slim") / "tuned.safetensors"
    path.write_bytes(sd15_tuned.read_bytes())
    return slim(sd15, path)
