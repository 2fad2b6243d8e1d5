"""Every architecture, in every dialect: all modules found, baked alike into both layouts, back."""

import re

import pytest
import torch
from torch import Tensor

from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import load_lora
from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.families import ARCHITECTURES
from lorakit.names.lorakeys import read_keys
from lorakit.operations.apply import apply
from lorakit.operations.choice import Choice
from lorakit.operations.extract import extract
from lorakit.saving import stored_tensors
from lorakit.tensorfile.source import DictSource
from tests import layouts
from tests.helpers import dense, worst_error

_BLOCK = re.compile(r"(?P<kind>.*?[a-z]\w*)\.(?P<number>\d+)\.")
DIALECTS = ("kohya", "diffusers", "comfyui")
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
IN_EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)


def ends(architecture: Architecture) -> tuple[ModuleName, ...]:
    """Return the modules outside of blocks, and those of the first and the last block of a kind."""
    names = architecture.build()
    numbered = [(name, _BLOCK.match(name.module)) for name in names]
    last: dict[str, int] = {}
    for _, found in numbered:
        if found:
            last[found["kind"]] = max(last.get(found["kind"], 0), int(found["number"]))
    return tuple(
        name
        for name, found in numbered
        if not found or int(found["number"]) in (0, last[found["kind"]])
    )


def trained(architecture: Architecture, dialect: str, model: dict[str, Tensor]) -> list[str]:
    """Return the modules of a model that a trainer of this dialect changes: fused, or parts."""
    fused = dialect == "comfyui" or (dialect == "kohya" and architecture.kohya_original)
    modules = [
        module
        for module, name in architecture.modules.items()
        if f"{module}.weight" in model and not name.norm and "text_projection" not in module
    ]
    if not fused:
        return modules
    wholes = {w: parts for w, parts in architecture.fused.items() if architecture.original_fused(w)}
    wholes = {w: parts for w, parts in wholes.items() if f"{parts[0][0]}.weight" in model}
    inside = {part for parts in wholes.values() for part, _ in parts}
    return [m for m in modules if m not in inside] + list(wholes)


def rows_of(architecture: Architecture, module: str, model: dict[str, Tensor]) -> int:
    parts = architecture.fused.get(module, ((module, None),))
    return sum(len(model[f"{part}.weight"]) for part, _ in parts)


def lora_file(
    architecture: Architecture, dialect: str, model: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Make a LoRA of rank 2 and alpha 1 on every module that the dialect names."""
    up, down = (
        ("lora_B.weight", "lora_A.weight")
        if dialect == "diffusers"
        else ("lora_up.weight", "lora_down.weight")
    )
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for module in trained(architecture, dialect, model):
        stem = layouts.spelled(architecture, module, dialect)
        tensors[f"{stem}.{up}"] = torch.randn(
            rows_of(architecture, module, model), 2, generator=generator
        )
        tensors[f"{stem}.{down}"] = torch.randn(2, 6, generator=generator)
        if dialect != "diffusers":
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def by_part(architecture: Architecture, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the ΔW of fused modules into those of their parts."""
    found: dict[str, Tensor] = {}
    for module, delta in deltas.items():
        for part, (start, stop, of) in architecture.fused.get(module, ((module, (0, 1, 1)),)):
            found[part] = delta[len(delta) * start // of : len(delta) * stop // of]
    return found


@EACH
@IN_EACH_DIALECT
def test_every_module_of_the_whole_model_has_its_place(
    architecture: Architecture, dialect: str
) -> None:
    model = layouts.tiny_model(architecture.build())
    keys = lora_file(architecture, dialect, model)
    found = read_keys({key: tuple(tensor.shape) for key, tensor in keys.items()}, {})
    assert set(found.modules) == set(trained(architecture, dialect, model))
    assert not found.unclaimed
    parts = {p for m in found.modules for p, _ in architecture.fused.get(m, ((m, (0, 1, 1)),))}
    for source in (layouts.as_folder(model), layouts.as_single_file(architecture, model)):
        index = index_checkpoint({key: tuple(tensor.shape) for key, tensor in source.items()})
        assert all(index.find(part) is not None for part in parts)


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model."]
)
@EACH
def test_a_single_file_may_have_any_prefix(architecture: Architecture, prefix: str) -> None:
    names = [name for name in architecture.build() if name.component == architecture.denoiser]
    bare = layouts.original_layout(names, as_paths(layouts.tiny_model(names)))
    index = index_checkpoint({prefix + key: tuple(t.shape) for key, t in bare.items()})
    assert all(index.find(name.module) is not None for name in names)


def as_paths(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.partition(".")[2]: tensor for key, tensor in model.items()}


@EACH
@IN_EACH_DIALECT
def test_every_module_is_found_and_baked_alike_into_both_layouts(
    architecture: Architecture, dialect: str
) -> None:
    model = layouts.tiny_model(architecture.build())
    lora = load_lora(lora_file(architecture, dialect, model))
    assert set(lora.adapters) == set(trained(architecture, dialect, model))
    deltas = by_part(architecture, dense(lora))
    expected = {
        key: tensor.double() + 0.7 * deltas.get(key.removesuffix(".weight"), torch.zeros(()))
        for key, tensor in model.items()
    }
    single = layouts.as_single_file(architecture, model)
    for source, named in (
        (layouts.as_folder(model), layouts.as_folder(expected)),
        (single, layouts.as_single_file(architecture, expected)),
    ):
        applied, report = apply(DictSource(source), [(lora, 0.7)])
        assert not report.unmatched
        assert set(source) == set(named)
        touched = [key for key in source if not torch.equal(applied.get(key), source[key])]
        weights = {key for key in named if not torch.equal(named[key], source[key].double())}
        assert set(touched) == weights
        for key, value in named.items():
            torch.testing.assert_close(applied.get(key).double(), value, rtol=1e-5, atol=1e-5)


@EACH
@IN_EACH_DIALECT
def test_what_was_baked_is_extracted_again_from_either_layout(
    architecture: Architecture, dialect: str
) -> None:
    model = layouts.tiny_model(architecture.build())
    lora = load_lora(lora_file(architecture, dialect, model))
    expected = dense(lora)
    single, folder = layouts.as_single_file(architecture, model), layouts.as_folder(model)
    for base in (single, folder):
        tuned, _ = apply(DictSource(base), [(lora, 1.0)])
        found, _ = extract(
            DictSource(base),
            tuned,
            rule=RankRule(rank=6),
            choice=Choice(convs=False),
            dialect=dialect,
        )
        assert worst_error(dense(found), expected) < 1e-4
        again = load_lora(stored_tensors(found, dialect=dialect, dtype="F32"))
        assert worst_error(dense(again), expected) < 1e-4
