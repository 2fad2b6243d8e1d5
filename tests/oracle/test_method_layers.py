"""What a layer is for a method where one LoRA names q, k and v as one and another apart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.fusing import is_split, split
from lorakit.linalg.factored import Factors
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, load_lora
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.operations.apply import apply
from lorakit.operations.merge import merge
from lorakit.tensorfile.source import DictSource
from tests.helpers import ran, refused
from tests.properties.test_method_invariants import in_each_space

WHOLE = "lora_unet_double_blocks_0_img_attn_qkv"
PART = "transformer.transformer_blocks.0.attn.to_{}"
RANK = RankRule(rank=40)
FP32 = 1e-5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_file() -> dict[str, Tensor]:
    return {
        f"{WHOLE}.lora_up.weight": random(48, 3, seed=1),
        f"{WHOLE}.lora_down.weight": random(3, 16, seed=2),
        f"{WHOLE}.alpha": torch.tensor(3.0),
    }


def split_file(*, parts: str = "qkv", kind: str = "lora") -> dict[str, Tensor]:
    found = {}
    for number, part in enumerate(parts):
        stem = PART.format(part)
        found[f"{stem}.lora_A.weight"] = random(2, 16, seed=10 + number)
        found[f"{stem}.lora_B.weight"] = random(16, 2, seed=20 + number)
        if kind == "dora":
            found[f"{stem}.lora_magnitude_vector"] = random(16, seed=30 + number).abs() + 1
    return found


KOHYA, DIFFUSERS = load_lora(whole_file()), load_lora(split_file())


def changes(file: LoraFile) -> Tensor:
    apart = split(file)
    found = []
    for part in "qkv":
        change = apart.adapters[PART.format(part)].change()
        assert isinstance(change, Factors)
        found.append(change.up @ change.down)
    return torch.cat(found)


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@in_each_space
def test_the_first_lora_does_not_decide_what_a_layer_is(name: str, space: str | None) -> None:
    method, stack = Method(name=name, space=space), [(KOHYA, 0.8), (DIFFUSERS, -0.6)]
    found, turned = (merge(s, method=method, rule=RANK)[0] for s in (stack, stack[::-1]))
    assert (found.dialect, turned.dialect) == ("kohya", "diffusers")
    if space == "full" and not MENU[name].random:
        apart = merge([(split(KOHYA), 0.8), (DIFFUSERS, -0.6)], method=method, rule=RANK)[0]
        assert off(changes(apart), changes(found)) > 0.01 or name == "sce"
    assert off(changes(turned), changes(found)) < FP32


@pytest.mark.parametrize("name", ["ties", "dare-linear", "karcher", "tsv"])
def test_a_model_that_fuses_the_layer_gets_what_a_lora_gets(name: str) -> None:
    model = DictSource({"double_blocks.0.img_attn.qkv.weight": torch.zeros(48, 16)})
    space = "core" if MENU[name].spaces else None
    method = Method(name=name, space=space)
    for stack in ([(KOHYA, 0.8), (DIFFUSERS, 0.6)], [(DIFFUSERS, 0.6), (KOHYA, 0.8)]):
        applied, _ = apply(model, stack, method=method)
        baked = applied.exact("double_blocks.0.img_attn.qkv.weight")
        assert off(baked, changes(merge(stack, method=method, rule=RANK)[0])) < FP32


@pytest.mark.parametrize("first", [0, 1])
def test_a_mixed_merge_is_written_and_verified(tmp_path: Path, first: int) -> None:
    files = [tmp_path / "whole.safetensors", tmp_path / "apart.safetensors"]
    save_file(whole_file(), files[0])
    save_file(split_file(), files[1])
    stack = [files[first], files[1 - first]]
    for name in ("ties", "linear"):
        out = tmp_path / f"{name}.safetensors"
        method = ("--method", name, "--dtype", "fp32")
        report = ran("merge", *stack, "-o", out, *method, "--verify")
        assert report["verified"]["largest"] < FP32
        assert is_split(load_lora(out)) == (first == 1)


def test_what_cannot_be_joined_is_merged_in_parts(tmp_path: Path) -> None:
    """Of a DoRA of q alone no DoRA of q, k and v can be made without the model."""
    files = [tmp_path / "whole.safetensors", tmp_path / "dora.safetensors"]
    save_file(whole_file(), files[0])
    save_file(split_file(parts="q", kind="dora"), files[1])
    base = tmp_path / "base.safetensors"
    weight = {"double_blocks.0.img_attn.qkv.weight": random(48, 16, seed=5)}
    save_file(weight, base)
    loras = [load_lora(file) for file in files]
    stack = [(lora, 1.0) for lora in loras]
    for turned in (stack, stack[::-1]):
        merged, _ = merge(turned, method=Method(name="ties"), against=DictSource(weight))
        assert is_split(merged)
    words = refused("merge", *files, "--method", "ties", "-o", tmp_path / "out.safetensors")
    assert "--against" in words and "--into" in words
