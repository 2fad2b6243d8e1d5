"""A language model from transformers, sharded, with PEFT's adapters: baked as PEFT merges them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import ran, refused

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
LAYERS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head and embedding": {"target_modules": [*LAYERS, "lm_head", "embed_tokens"]},
    "saved head and norms": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
    "biases": {"bias": "all"},
}


def model(folder: Path, *, tied: bool = False) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    found = transformers.Qwen2ForCausalLM(config)
    found.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def adapter(base: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Write a random adapter and return what PEFT merges it to."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | options
    wrapped = peft.get_peft_model(loaded, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                small = torch.randn_like(parameter) * 0.1
                parameter.copy_(
                    parameter * (1 + small) if "magnitude" in name else parameter + small
                )
    wrapped.save_pretrained(folder)
    merged: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def stored(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_sharded_model_takes_what_peft_merges(name: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    expected = adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    ran("merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "out")
    before, found = stored(base), stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    changed = [key for key in before if not torch.equal(before[key], expected[key])]
    assert len(changed) >= 2 * len(LAYERS)


def test_a_tied_embedding_changes_the_head_too_and_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tied=True)
    targets = [*LAYERS, "embed_tokens"]
    expected = adapter(base, tmp_path / "adapter", target_modules=targets)
    ran("merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = load(tmp_path / "out", dtype=torch.float32)
    head = found.lm_head.weight.detach()
    assert torch.equal(head, found.model.embed_tokens.weight)
    torch.testing.assert_close(head, expected["lm_head.weight"], rtol=1e-5, atol=1e-6)
    adapter(base, tmp_path / "head", target_modules=[*LAYERS, "lm_head"])
    words = refused("merge", tmp_path / "head", "--into", base, "-o", tmp_path / "other")
    assert "lm_head" in words and "ties" in words
