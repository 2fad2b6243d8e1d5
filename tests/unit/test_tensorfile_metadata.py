"""Metadata: hashes that are true of the written file, training keys that are true of the LoRA."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lorakit.errors import SpecError
from lorakit.tensorfile import sinks
from lorakit.tensorfile.hashes import LEGACY_HASH, MODEL_HASH
from lorakit.tensorfile.header import save_order
from lorakit.tensorfile.metadata import (
    model_hash,
    recipe_json,
    true_metadata,
)
from lorakit.tensorfile.source import DictSource, open_source
from lorakit.tensorfile.writer import write_safetensors

EMPTY = hashlib.sha256(b"").hexdigest()[:8]


def kohya_hash(tensors) -> str:
    """The twin: SHA-256 of what follows the header of safetensors' serialisation."""
    content = save(tensors)
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def old_webui_hash(path) -> str:
    """The twin: the web UI's short hash, of 64 KiB at 1 MiB of the file as it is."""
    return hashlib.sha256(path.read_bytes()[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def lora(elements: int) -> DictSource:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "b.up": torch.randn(elements, generator=generator).half(),
        "a.down": torch.randn(elements // 2 + 1, generator=generator).half(),
        "alpha": torch.tensor(4.0),
        "none": torch.zeros(0),
    }
    specs = DictSource(tensors).specs
    return DictSource({key: tensors[key] for key in save_order(specs)})


def test_the_model_hash_is_kohyas_from_memory_and_from_a_file(tmp_path):
    source = lora(1000)
    expected = kohya_hash({key: source.get(key) for key in source.specs})
    assert model_hash(source) == expected
    write_safetensors(tmp_path / "a", source)
    assert model_hash(open_source(tmp_path / "a")) == expected
    assert model_hash(lora(1001)) != expected


def written(source: DictSource, metadata: dict[str, str], path: Path) -> dict[str, str]:
    tensors = {key: source.get(key) for key in source.specs}
    found = write_safetensors(path, DictSource(tensors, metadata, hashed=True))
    assert found.nbytes == path.stat().st_size
    stored = open_source(path)
    assert all(torch.equal(stored.get(key), tensor) for key, tensor in tensors.items())
    return dict(stored.metadata)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("elements", [10, 300_000, 400_000, 370_000, 1_000_000])
def test_the_hashes_are_those_of_the_written_file(tmp_path, elements, direct, monkeypatch):
    if direct:
        monkeypatch.setattr(sinks, "LEAST", 0)
    source = lora(elements)
    path = tmp_path / "a.safetensors"
    given = {"ss_tag": "x" * 100, MODEL_HASH: "stale", LEGACY_HASH: "old"}
    metadata = written(source, given, path)
    assert metadata[LEGACY_HASH] == old_webui_hash(path)
    assert metadata[MODEL_HASH] == kohya_hash({key: source.get(key) for key in source.specs})
    assert (metadata[LEGACY_HASH] == EMPTY) == (path.stat().st_size <= 0x100000)
    assert metadata["ss_tag"] == "x" * 100
    assert written(source, metadata, tmp_path / "again.safetensors") == metadata


def test_a_header_that_reaches_into_the_window_is_hashed_too(tmp_path):
    metadata = written(lora(100_000), {"zz": "y" * 0x108000}, tmp_path / "a")
    assert metadata[LEGACY_HASH] == old_webui_hash(tmp_path / "a")


@pytest.mark.parametrize(
    ("length", "there"),
    [(0x100000 - 70, True), (0x100000 - 30, False), (0x10F000, False), (0x110000, True)],
)
def test_a_legacy_hash_that_would_lie_in_its_own_window_is_left_out(tmp_path, length, there):
    source = lora(100_000)
    metadata = written(source, {"aa": "y" * length}, tmp_path / "a")
    assert (LEGACY_HASH in metadata) == there
    assert not there or metadata[LEGACY_HASH] == old_webui_hash(tmp_path / "a")
    assert metadata[MODEL_HASH] == kohya_hash({key: source.get(key) for key in source.specs})


def test_a_file_tells_its_hashes_only_where_it_is_asked_to(tmp_path):
    write_safetensors(tmp_path / "a", DictSource({"a": torch.ones(2)}, {"format": "pt"}))
    assert open_source(tmp_path / "a").metadata == {"format": "pt"}


TRAINED = {
    "ss_network_dim": "128",
    "ss_network_alpha": "64.0",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps(
        {"algo": "loha", "conv_dim": "8", "conv_alpha": "4", "loraplus_lr_ratio": "16"}
    ),
    "ss_tag_frequency": '{"cat": 3}',
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "sshs_model_hash": "stale",
    "sshs_legacy_hash": "stale",
    "modelspec.hash_sha256": "0xstale",
    "modelspec.date": "2024-01-01",
    "modelspec.title": "old",
    "modelspec.trigger_phrase": "a cat",
    "lorakit.recipe": "{}",
    "format": "pt",
}


def test_training_keys_stay_and_what_changed_is_made_true():
    new = true_metadata(
        TRAINED,
        rank=16,
        alpha=16.0,
        conv_rank=4,
        conv_alpha=2.5,
        base_model_version="sdxl_base_v1-0",
        modelspec_architecture="stable-diffusion-xl-v1-base",
        title="new",
    )
    assert new == {
        "ss_network_dim": "16",
        "ss_network_alpha": "16",
        "ss_network_module": "networks.lora",
        "ss_network_args": '{"loraplus_lr_ratio": "16", "conv_dim": "4", "conv_alpha": "2.5"}',
        "ss_tag_frequency": '{"cat": 3}',
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "new",
        "modelspec.trigger_phrase": "a cat",
        "format": "pt",
    }


def test_ranks_that_differ_are_dynamic_and_unknown_bases_keep_theirs():
    new = true_metadata(TRAINED, rank=None, alpha=None)
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert new["ss_base_model_version"] == "sd_v1"
    assert new["ss_network_args"] == '{"loraplus_lr_ratio": "16"}'


def test_nothing_known_gives_only_what_is_true():
    new = true_metadata({}, rank=8, alpha=0.5, title="x")
    assert new == {
        "ss_network_dim": "8",
        "ss_network_alpha": "0.5",
        "ss_network_module": "networks.lora",
    }
    assert true_metadata({}, rank=8, alpha=8, base_model_version="sd_v2_v")["ss_v2"] == "True"


@pytest.mark.parametrize("args", ["", "None", "[1]", '{"algo"', "[" * 100_000])
def test_network_args_that_are_no_json_object_are_replaced(args):
    new = true_metadata({"ss_network_args": args}, rank=8, alpha=8, conv_rank=2)
    assert new["ss_network_args"] == '{"conv_dim": "2"}'


def test_another_of_kohyas_modules_is_kept():
    old = {"ss_network_module": "networks.lora_flux"}
    new = true_metadata(old, rank=8, alpha=8, modelspec_architecture="flux-1-dev")
    assert new["ss_network_module"] == "networks.lora_flux"
    assert new["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert new["modelspec.architecture"] == "flux-1-dev/lora"


def test_a_recipe_is_the_same_text_whatever_the_order():
    first = recipe_json({"b": [1, 2.5], "a": {"é": None, "d": True}})
    assert first == '{"a":{"d":true,"é":null},"b":[1,2.5]}'
    assert first == recipe_json({"a": {"d": True, "é": None}, "b": [1, 2.5]})
    for value in (math.nan, {1, 2}):
        with pytest.raises(SpecError, match="Recipe"):
            recipe_json({"x": value})
