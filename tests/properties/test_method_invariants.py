"""What holds for every merge method, from LoRA files to the merged file or model."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorakit
from lorakit.errors import LorakitError, SpecError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, load_lora
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.operations.merge import merge
from lorakit.tensorfile.source import DictSource
from tests.helpers import ran, weighted, worst_error

ATTN = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FF = "mid_block_attentions_0_transformer_blocks_0_ff_net_2"
CONV = "down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES: Mapping[str, tuple[int, ...]] = {
    f"lora_unet_{ATTN}": (40, 40),
    f"lora_unet_{FF}": (40, 72),
    f"lora_unet_{CONV}": (24, 20, 3, 3),
    TEXT: (48, 32),
}
MODEL = {
    f"lora_unet_{ATTN}": f"unet/{ATTN}",
    f"lora_unet_{FF}": f"unet/{FF}",
    f"lora_unet_{CONV}": f"unet/{CONV}",
    TEXT: "text_encoder/text_model.encoder.layers.0.mlp.fc1",
}
METHODS = [name for name in MENU if name != "linear"]
ELEMENTWISE = [name for name in METHODS if MENU[name].family == "elementwise"]
AVERAGING = ("ties", "dare-ties", "della-ties", "breadcrumbs-ties", "sce", "tsv")
"""What averages by itself: LoRAs at strength 1 each give their mean, not their sum."""
SPACED = [(name, space) for name in METHODS for space in MENU[name].spaces or (None,)]
EXACT = 2e-6
"""Factors come back in fp32."""
FLIPS = 0.03
"""A value at the threshold may fall on its other side by the last bit of a product in fp32."""

in_each_space = pytest.mark.parametrize(("name", "space"), SPACED)
each_method = pytest.mark.parametrize("name", METHODS)


def tensors(seed: int, rank: int, *, leave: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        if name in leave:
            continue
        kernel = (1, 1) if len(shape) > 2 else ()
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *kernel, generator=generator)
        found[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator)
        found[f"{name}.alpha"] = torch.tensor(float(rank))
    return found


def lora(seed: int, rank: int = 4, *, leave: tuple[str, ...] = ()) -> LoraFile:
    return load_lora(tensors(seed, rank, leave=leave))


A, B = lora(1, 4), lora(2, 6)
C = lora(3, 3, leave=(TEXT,))


def stack_for(name: str) -> list[tuple[LoraFile, float]]:
    return [(A, 0.8), (B, -0.5)] if name == "slerp" else [(A, 0.8), (B, -0.5), (C, 1.2)]


def merged(
    stack: list[tuple[LoraFile, float]], method: Method, rule: RankRule | None = None
) -> dict[str, Tensor]:
    found, _ = merge(stack, method=method, rule=rule)
    changes = {module: adapter.change() for module, adapter in found.adapters.items()}
    return {module: change.up @ change.down for module, change in changes.items()}  # type: ignore[union-attr]


def of(lora: LoraFile) -> dict[str, Tensor]:
    return {m: a.change().up @ a.change().down for m, a in lora.adapters.items()}  # type: ignore[union-attr]


FULL = RankRule(rank=400)
"""A dense result keeps all its directions."""


@in_each_space
def test_one_lora_at_strength_1_is_itself(name: str, space: str | None) -> None:
    method = Method(name=name, space=space)
    assert worst_error(merged([(A, 1.0)], method), of(A)) < EXACT


@in_each_space
def test_one_lora_at_a_strength_is_itself_times_it(name: str, space: str | None) -> None:
    method = Method(name=name, space=space)
    assert worst_error(merged([(A, -0.3)], method), weighted([(of(A), -0.3)])) < EXACT


@in_each_space
def test_the_mean_of_a_lora_with_itself_is_itself(name: str, space: str | None) -> None:
    method = Method(name=name, space=space)
    weight = 1.0 if name in AVERAGING else 0.5
    assert worst_error(merged([(A, weight), (A, weight)], method), of(A)) < EXACT


@in_each_space
def test_negating_all_strengths_negates(name: str, space: str | None) -> None:
    method, stack = Method(name=name, space=space), stack_for(name)
    found = merged(stack, method, FULL)
    negated = merged([(file, -s) for file, s in stack], method, FULL)
    assert worst_error(negated, weighted([(found, -1.0)])) < 2 * EXACT
    assert max(float(delta.norm()) for delta in found.values()) > 0


@in_each_space
def test_the_order_of_the_loras_changes_nothing(name: str, space: str | None) -> None:
    method, stack = Method(name=name, space=space), stack_for(name)
    found = merged(stack, method, FULL)
    turned = merged(stack[::-1], method, FULL)
    assert all(torch.equal(found[module], turned[module]) for module in found)


@in_each_space
@pytest.mark.parametrize("gauge", [4.0, 10.0])
def test_how_a_lora_is_factored_changes_nothing(name: str, space: str | None, gauge: float) -> None:
    method, stack = Method(name=name, space=space), stack_for(name)
    files = [file for file, _ in stack]
    again = [_regauged(file, gauge) for file in files]
    found = merged(stack, method, FULL)
    turned = merged([(g, s) for g, (_, s) in zip(again, stack, strict=True)], method, FULL)
    exact = gauge == 4.0 or space != "full"
    assert worst_error(turned, found) < (10 * EXACT if exact else FLIPS)


def _regauged(file: LoraFile, gauge: float) -> LoraFile:
    found: dict[str, Tensor] = {}
    for seed, rank in ((1, 4), (2, 6), (3, 3)):
        plain = tensors(seed, rank, leave=(TEXT,) if seed == 3 else ())
        if file is (A, B, C)[seed - 1]:
            found = plain
    for key, tensor in found.items():
        if key.endswith("up.weight"):
            found[key] = tensor * gauge
        elif key.endswith("down.weight"):
            found[key] = tensor / gauge
    return load_lora(found)


@each_method
def test_the_dialect_of_a_file_changes_nothing(name: str, tmp_path: Path) -> None:
    stack = stack_for(name)
    folder = tmp_path / "adapter"
    lorakit.save_lora(folder, A, output=lorakit.Output(dialect="peft", dtype="F32"))
    found = merged(stack, Method(name=name), FULL)
    turned = merged([(load_lora(folder), stack[0][1]), *stack[1:]], Method(name=name), FULL)
    assert worst_error(turned, found) < 20 * EXACT


@each_method
def test_layers_that_only_some_loras_have_and_ranks_of_all_sizes(name: str) -> None:
    stack = [(lora(5, 1, leave=(TEXT,)), 1.0), (lora(6, 16), 0.5)]
    found = merged(stack, Method(name=name), FULL)
    if name != "model-stock":
        # Of LoRAs that oppose each other model-stock leaves nothing.
        assert set(found) == set(stack[1][0].adapters)
    # Where one LoRA acts alone there is nothing to reconcile.
    text = next(module for module in found if module.startswith("text"))
    alone = {text: 0.5 * of(stack[1][0])[text]}
    assert worst_error({text: found[text]}, alone) < EXACT


@each_method
def test_strength_is_linear(name: str) -> None:
    stack = stack_for(name)
    twice = merged([(file, 2 * s) for file, s in stack], Method(name=name), FULL)
    once = merged(stack, Method(name=name), FULL)
    assert worst_error(twice, weighted([(once, 2.0)])) < 2 * EXACT
    scaled = merged(stack, Method(name=name, lambda_=2.0), FULL)
    assert worst_error(scaled, weighted([(once, 2.0)])) < EXACT


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_into_a_model_is_the_dense_result_added(name: str) -> None:
    """Streamed by tiles into the weights, or whole as a LoRA of full rank: the same ΔW."""
    stack, method = stack_for(name), Method(name=name, space="full")
    base = {}
    for number, (module, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(90 + number)
        base[_path(module)] = torch.randn(shape, generator=generator)
    applied, _ = lorakit.apply(DictSource(base), stack, method=method)
    deltas = merged(stack, method, FULL)
    for module, delta in deltas.items():
        key = next(k for k in base if _same(k, module))
        expected = base[key].double().flatten(1) + delta
        torch.testing.assert_close(
            applied.exact(key).flatten(1), expected, rtol=1e-5, atol=1e-5 * float(delta.norm())
        )


def _path(module: str) -> str:
    paths = {
        f"lora_unet_{ATTN}": "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        f"lora_unet_{FF}": "unet/mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        f"lora_unet_{CONV}": "unet/down_blocks.0.resnets.0.conv1",
        TEXT: "text_encoder/text_model.encoder.layers.0.mlp.fc1",
    }
    return paths[module] + ".weight"


def _same(key: str, module: str) -> bool:
    return key.replace("/", ".").removesuffix(".weight") == module


@each_method
def test_strengths_of_blocks_and_text_encoders_count(name: str) -> None:
    weights = lorakit.Strength(unet=0.8, te=0.0, blocks={"IN01": 0.0})
    stack = [(A, weights), (B, 0.7)]
    found = merged(stack, Method(name=name), FULL)  # type: ignore[arg-type]
    text = next(module for module in found if module.startswith("text"))
    assert worst_error({text: found[text]}, {text: 0.7 * of(B)[text]}) < EXACT


def files(folder: Path) -> list[str]:
    for number, (seed, rank) in enumerate(((1, 4), (2, 6), (3, 3))):
        save_file(tensors(seed, rank), folder / f"l{number}.safetensors")
    return [f"{folder / f'l{number}.safetensors'}:{s}" for number, s in enumerate((0.8, -0.5, 1.2))]


@pytest.mark.parametrize("space", ["core", "full", "knots"])
@pytest.mark.parametrize("name", ["ties", "dare-ties", "della"])
def test_threads_and_memory_change_no_byte(tmp_path: Path, name: str, space: str) -> None:
    terms = files(tmp_path)
    common = ("--method", name, "--space", space, "--rank", 8, "--no-metadata")
    outs = [tmp_path / f"out{number}.safetensors" for number in range(2)]
    ran("merge", *terms, "-o", outs[0], *common, "--threads", 1)
    ran("merge", *terms, "-o", outs[1], *common, "--threads", 3, "--memory", "1M")
    assert bool(outs[0].read_bytes() == outs[1].read_bytes())


def test_the_hash_seed_of_python_changes_no_byte(tmp_path: Path) -> None:
    terms, found = files(tmp_path), []
    for seed in ("1", "2"):
        out = tmp_path / f"seed{seed}.safetensors"
        command = [sys.executable, "-m", "lorakit", "merge", *terms, "-o", str(out), "-q"]
        more = ["--method", "dare-ties", "--no-metadata", "--rank", "8"]
        done = subprocess.run(
            command + more, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        found.append(out.read_bytes())
    assert bool(found[0] == found[1])


def test_a_seed_gives_other_masks() -> None:
    stack = stack_for("dare-linear")
    one, two = (merged(stack, Method(name="dare-linear", seed=seed), FULL) for seed in (0, 1))
    assert worst_error(one, two) > 0.1


def test_layers_of_one_shape_have_masks_of_their_own() -> None:
    """A peer seeds its masks by key: every layer of one shape gets the same one."""
    up, down = torch.randn(40, 4), torch.randn(4, 40)
    names = [f"lora_unet_{ATTN}".replace("to_q", part) for part in ("to_q", "to_k")]
    same = {f"{n}.lora_{side}.weight": t for n in names for side, t in (("up", up), ("down", down))}
    twin = {key: tensor * 1e-5 for key, tensor in same.items()}
    stack = [(load_lora(same), 1.0), (load_lora(twin), 1.0)]
    found = merged(stack, Method(name="dare-linear", space="full"), FULL)
    query, key = (found[m] for m in sorted(found) if m.endswith(("to_q", "to_k")))
    dropped = [delta.abs() < 1e-4 for delta in (query, key)]
    assert 0.45 < float(dropped[0].double().mean()) < 0.55
    assert 0.45 < float((dropped[0] ^ dropped[1]).double().mean()) < 0.55


def test_slerp_takes_two() -> None:
    with pytest.raises(SpecError, match="slerp takes two LoRAs, found 3"):
        merge([(A, 1.0), (B, 1.0), (C, 1.0)], method=Method(name="slerp"))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ({"name": "nothing"}, "Method 'nothing' is unknown; there are linear, ties"),
        ({"name": "linear", "density": 0.5}, "linear takes no density"),
        ({"name": "karcher", "space": "core"}, "karcher is not elementwise"),
        ({"name": "ties", "density": 1.5}, "density must lie between 0 and 1, found 1.5"),
        ({"name": "ties", "density": 0.0}, "keeps nothing"),
        ({"name": "sce", "flavor": "peft"}, "sce has no flavor 'peft'"),
        ({"name": "ties", "votes": "loud"}, "votes must be one of mass, frequency"),
        ({"name": "ties", "lambda_": float("nan")}, "lambda must be a finite number"),
        ({"name": "dare-ties", "seed": -1}, "seed must lie between"),
    ],
)
def test_what_a_method_refuses(method: dict[str, object], sentence: str) -> None:
    with pytest.raises(LorakitError, match=sentence):
        Method(**method)  # type: ignore[arg-type]
