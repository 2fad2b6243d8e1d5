"""ΔW of every adapter kind against the library that made it; its strength, negation, rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import Adapter, build, magnitude_for
from lorakit.errors import AdapterError, UnmatchedError
from lorakit.linalg.factored import Factors, dense
from lorakit.lorafile import LoraFile
from lorakit.names.dialects import parse_key
from lorakit.names.sd import SD1
from lorakit.operations.apply import apply
from lorakit.operations.cut_blocks import cut_blocks
from lorakit.tensorfile.source import DictSource
from tests import reference

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),
]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16, bias=False),
    "square": lambda: nn.Linear(16, 16, bias=False),
    "1x1": lambda: nn.Conv2d(24, 16, 1, bias=False),
    "3x3": lambda: nn.Conv2d(24, 16, 3, padding=1, bias=False),
}
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("LoConModule", {"lora_dim": 4, "alpha": 2}),
    "locon tucker": ("LoConModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}),
    "rslora": ("LoConModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "dora by output": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    "dora by input": (
        "LoConModule",
        {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "dora by input of a core": (
        "LoConModule",
        {
            "lora_dim": 4,
            "alpha": 2,
            "use_tucker": True,
            "weight_decompose": True,
            "wd_on_out": False,
        },
    ),
    "loha": ("LohaModule", {"lora_dim": 3, "alpha": 2}),
    "loha rs": ("LohaModule", {"lora_dim": 3, "alpha": 2, "rs_lora": True}),
    "loha tucker": ("LohaModule", {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "dora of loha": ("LohaModule", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "dora by input of loha": (
        "LohaModule",
        {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "lokr": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "dora of lokr": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 1, "factor": 4, "weight_decompose": True},
    ),
    "lokr whole": ("LokrModule", {"lora_dim": 10000, "alpha": 1, "factor": 4}),
    "lokr both": ("LokrModule", {"lora_dim": 1, "alpha": 2, "factor": 4, "decompose_both": True}),
    "lokr tucker": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 4, "use_tucker": True}),
    "glora": ("GLoRAModule", {"lora_dim": 4, "alpha": 2}),
    "oft": ("DiagOFTModule", {"lora_dim": 4, "alpha": 0}),
    "oft constraint": ("DiagOFTModule", {"lora_dim": 4, "alpha": 0.01, "constraint": 0.01}),
    "oft rescale": ("DiagOFTModule", {"lora_dim": 4, "alpha": 0, "rescaled": True}),
    "boft": ("ButterflyOFTModule", {"lora_dim": 4, "alpha": 0}),
    "boft constraint": (
        "ButterflyOFTModule",
        {"lora_dim": 4, "alpha": 0.01, "constraint": 0.01},
    ),
    "boft rescale": ("ButterflyOFTModule", {"lora_dim": 4, "alpha": 0, "rescaled": True}),
    "ia3": ("IA3Module", {"lora_dim": 4, "alpha": 1}),
    "ia3 on input": ("IA3Module", {"lora_dim": 4, "alpha": 1, "train_on_input": True}),
    "full": ("FullModule", {"lora_dim": 4, "alpha": 1}),
}
FP32 = 2e-5
"""LyCORIS works in fp32, with an inverse or a norm in between."""


def lycoris_module(name: str, layer: nn.Module) -> nn.Module:
    modules = pytest.importorskip("lycoris.modules")
    kind, settings = ALGORITHMS[name]
    torch.manual_seed(3)
    module: nn.Module = getattr(modules, kind)("m", layer, multiplier=1.0, **settings)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "org_module" in key or "scalar" in key:
                continue
            noise = torch.randn(parameter.shape) * 0.3
            parameter.copy_(parameter + noise if "dora" in key or "rescale" in key else noise)
    return module


def weight_of(forward: Callable[[Tensor], Tensor], layer: nn.Module) -> Tensor:
    """Read the weight that a layer acts with, [out, in · kh · kw], from its answers."""
    with torch.no_grad():
        inputs: int = layer.weight.shape[1]  # type: ignore[index, assignment]
        if isinstance(layer, nn.Linear):
            return forward(torch.eye(inputs)).T.double()
        pulses = torch.zeros(inputs, inputs, 5, 5)
        pulses[torch.arange(inputs), torch.arange(inputs), 2, 2] = 1.0
        answers = forward(pulses).transpose(0, 1).double()
        kernel = layer.weight.shape[2]  # type: ignore[index]
        around = slice(2 - kernel // 2, 3 + kernel // 2)
        return answers[:, :, around, around].flip(2, 3).flatten(1)


def made(name: str, kernel: str) -> tuple[Adapter, Tensor, Tensor]:
    """Return our adapter of LyCORIS's file, the weight, and LyCORIS's ΔW."""
    layer = LAYERS[kernel]()
    module = lycoris_module(name, layer)
    base = weight_of(layer, layer)
    after = weight_of(module, layer)
    if name == "full":
        return build({"full"}, {"diff": module.weight.detach()}, None), base.float(), after - base  # type: ignore[operator]
    kinds, tensors = set(), {}
    state = {k: v for k, v in module.state_dict().items() if "org_module" not in k}
    for key, tensor in state.items():
        if key == "weight":
            kinds.add("ia3")
            tensors["weight"] = tensor
            continue
        parsed = parse_key(f"lora_unet_mid.{key}")
        if parsed is None:
            continue
        tensors[parsed.role] = tensor
        if parsed.role != "alpha":
            kinds.add("full" if parsed.kind == "bias" else parsed.kind)
    return build(kinds, tensors, None), base.float(), after - base


def change(adapter: Adapter, base: Tensor) -> Tensor:
    found = adapter.change(base if adapter.needs_base else None)
    return dense(found) if isinstance(found, Factors) else found.double()


@pytest.mark.parametrize("kernel", LAYERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_change_is_that_of_lycoris(name: str, kernel: str) -> None:
    adapter, base, expected = made(name, kernel)

    def check(answer: Tensor) -> None:
        torch.testing.assert_close(answer, expected, rtol=FP32, atol=FP32 * float(expected.norm()))

    reference.negative_control(check, change(adapter, base))


@pytest.mark.parametrize("kernel", LAYERS)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("strength", [0.7, -1.0, -0.4, 2.0])
def test_strength_is_linear_and_exact_for_every_kind(
    name: str, kernel: str, strength: float
) -> None:
    adapter, base, _ = made(name, kernel)
    if adapter.kind in ("oft", "boft", "dora of loha", "dora of lokr"):
        with pytest.raises(AdapterError, match="no strength but 0 and 1"):
            adapter.scaled(strength, base)
        return
    scaled = adapter.scaled(strength, base)
    assert scaled.rank == adapter.rank
    assert type(scaled) is type(adapter)
    found = change(scaled, base)
    assert reference.relative_error(found, change(adapter, base) * strength) < 1e-5


@pytest.mark.parametrize("kernel", LAYERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_are_those_of_the_change(name: str, kernel: str) -> None:
    adapter, base, _ = made(name, kernel)
    whole = change(adapter, base)
    if adapter.kind == "boft" or name == "oft constraint" or "by input" in name:
        with pytest.raises(AdapterError, match="fused layer"):
            adapter.rows(4, 12)
        return
    part = adapter.rows(4, 12)
    assert reference.relative_error(change(part, base[4:12]), whole[4:12]) < 1e-5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_stored_is_read_as_the_same(name: str) -> None:
    adapter, base, _ = made(name, "3x3")
    kinds = {"dora by output": {"lora", "dora"}, "dora by input": {"lora", "dora"}}
    tensors = adapter.tensors()
    kind = {k.kind for r in tensors if r != "alpha" and (k := parse_key(f"lora_unet_x.{r}"))}
    own = {"up", "down", "mid"} & tensors.keys()
    kind = kind | {"lora"} if own else kind or {"ia3"}
    assert kinds.get(name, kind) == kind
    again = build(kind, tensors, None)
    assert torch.equal(change(again, base), change(adapter, base))


@pytest.mark.parametrize("name", ["glora", "oft", "boft", "ia3", "dora by output"])
def test_what_depends_on_the_base_says_so(name: str) -> None:
    adapter, _, _ = made(name, "linear")
    assert adapter.needs_base
    with pytest.raises(AdapterError, match=r"depends on the weight .* --against"):
        adapter.change(None)


def dora(outputs: int, inputs: int, **magnitude: Tensor) -> tuple[Adapter, Tensor, Tensor]:
    """Return a DoRA of rank 2, ΔW of its factors, and a weight."""
    numbers = torch.Generator().manual_seed(7)
    up, down, base = (
        torch.randn(sides, generator=numbers)
        for sides in ((outputs, 2), (2, inputs), (outputs, inputs))
    )
    found = build(["lora", "dora"], {"up": up, "down": down, **magnitude}, None)
    return found, up.double() @ down.double(), base


@pytest.mark.parametrize("inputs", [4, 12, 24])
@pytest.mark.parametrize("sides", [(), (3, 3)])
def test_glora_of_the_first_layout_is_the_transposed(inputs: int, sides: tuple[int, ...]) -> None:
    numbers = torch.Generator().manual_seed(5)
    rank, outputs = 6, 12
    a1, a2, b1, b2, base = (
        torch.randn(shape, generator=numbers)
        for shape in (
            (rank, inputs),
            (inputs, rank),
            (rank, inputs, *sides),
            (outputs, rank),
            (outputs, inputs, *sides),
        )
    )
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    adapter = build(["glora"], tensors, 3.0)
    inside = torch.einsum("oi...,ir,rj->oj...", base.double(), a2.double(), a1.double())
    expected = 0.5 * (inside.flatten(1) + b2.double() @ b1.double().flatten(1))

    def check(answer: Tensor) -> None:
        assert reference.relative_error(answer, expected) < 1e-12

    assert (adapter.rank, adapter.shape) == (rank, (outputs, inputs, *sides))
    reference.negative_control(check, change(adapter, base.flatten(1)))


def test_oft_of_the_first_lycoris_stores_the_rotations_themselves() -> None:
    """R of today's blocks, stored as `oft_diag`, is the same change; its alpha bounds nothing."""
    numbers = torch.Generator().manual_seed(2)
    skew, base = torch.randn(4, 3, 3, generator=numbers), torch.randn(12, 8, generator=numbers)
    now = build(["oft"], {"oft_blocks": skew}, None)
    turned = (skew - skew.transpose(1, 2)).double()
    one = torch.eye(3, dtype=torch.float64)
    rotations = (one + turned) @ torch.linalg.inv(one - turned)
    first = build(["oft"], {"oft_diag": rotations.float(), "alpha": torch.tensor(0.01)}, None)
    assert reference.relative_error(change(first, base), change(now, base)) < 1e-5
    assert first.tensors().keys() == {"oft_diag"}


def test_a_rotation_of_inputs_turns_the_rows_of_a_fused_layer_alike() -> None:
    numbers = torch.Generator().manual_seed(2)
    tensors = {
        "boft_R": torch.randn(2, 4, 2, 2, generator=numbers),
        "boft_s": torch.rand(12, 1, generator=numbers),
    }
    adapter, base = build(["oft"], tensors, None), torch.randn(12, 8, generator=numbers)
    whole = change(adapter, base)
    part = change(adapter.rows(4, 8), base[4:8])
    assert reference.relative_error(part, whole[4:8]) < 1e-12
    with pytest.raises(AdapterError, match="no strength but 0 and 1"):
        adapter.scaled(0.5, base)
    with pytest.raises(AdapterError, match="expected a weight of 8 inputs, found 6"):
        adapter.change(base[:, :6])


def test_a_row_that_dora_takes_to_zero_stays_finite() -> None:
    adapter = build(
        ["lora", "dora"],
        {
            "up": torch.tensor([[0.0], [1.0]]),
            "down": torch.ones(1, 8),
            "lora_magnitude_vector": torch.tensor([0.0, 4.0]),
        },
        None,
    )
    found = change(adapter, torch.zeros(2, 8))
    assert torch.equal(found[0], torch.zeros(8, dtype=torch.float64))
    assert float(found[1].norm()) == pytest.approx(4.0)


def test_the_name_decides_the_axis_of_a_square_layer_and_then_the_shape() -> None:
    ones = torch.ones(8)
    for magnitude, axis in (
        ({"lora_magnitude_vector": ones}, 1),
        ({"lora_magnitude_vector": ones.reshape(1, 8)}, 1),
        ({"magnitude": ones}, 1),
        ({"dora_scale": ones}, 1),
        ({"dora_scale": ones.reshape(8, 1)}, 1),
        ({"dora_scale": ones.reshape(1, 8)}, 0),
    ):
        adapter, _, base = dora(8, 8, **magnitude)
        after = base.double() + change(adapter, base)
        lengths = torch.linalg.vector_norm(after, dim=axis)
        # LyCORIS adds fp32's eps to norms of about 5.
        torch.testing.assert_close(lengths, ones.double(), rtol=1e-6, atol=0)
        assert float((torch.linalg.vector_norm(after, dim=1 - axis) - 1).abs().max()) > 0.01


def test_one_output_has_a_dora_by_input() -> None:
    adapter, delta, base = dora(1, 8, dora_scale=torch.full((1, 8), 3.0))
    expected = 3.0 * torch.sign(base.double() + delta)
    assert reference.relative_error(base.double() + change(adapter, base), expected) < 1e-5


def test_no_magnitude_is_nearer_than_the_one_that_is_chosen() -> None:
    numbers = torch.Generator().manual_seed(11)
    base, delta, tuned = (torch.randn(6, 8, generator=numbers).double() for _ in range(3))
    tuned[0] = -tuned[0].abs() * torch.sign((base + delta)[0])
    chosen = magnitude_for(base, delta, tuned)
    direction = torch.nn.functional.normalize(base + delta, dim=1)

    def distances(magnitude: Tensor) -> Tensor:
        return (magnitude[:, None] * direction - tuned).norm(dim=1)

    least = distances(chosen)
    assert float(chosen[0]) < 0, "a row that turned round has a negative magnitude"
    for other in (chosen * 1.01, chosen * 0.99, tuned.norm(dim=1), (base + delta).norm(dim=1)):
        assert bool((distances(other) > least).all())


PLACES = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "square": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "1x1": "mid_block.attentions.0.proj_in",
    "3x3": "down_blocks.0.resnets.0.conv1",
}


@pytest.mark.parametrize("kernel", LAYERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_kind_is_baked_at_a_strength_and_cut_with_its_block(name: str, kernel: str) -> None:
    """W + s · (W' − W), LyCORIS's W'; nothing once the block is cut."""
    adapter, base, expected = made(name, kernel)
    shape = LAYERS[kernel]().weight.shape
    key, module = f"unet/{PLACES[kernel]}.weight", f"unet.{PLACES[kernel]}"
    other = {f"unet/{path}.weight": torch.zeros(4, 4) for path in set(PLACES.values())}
    source = DictSource(other | {key: base.reshape(shape)})
    lora = LoraFile(name="one", adapters={module: adapter}, architecture=SD1)
    applied, _ = apply(source, [(lora, -0.5)])
    wanted = base.double() - 0.5 * expected
    atol = FP32 * float(expected.norm())
    torch.testing.assert_close(applied.get(key).flatten(1).double(), wanted, rtol=FP32, atol=atol)
    with pytest.raises(UnmatchedError, match="cut all"):
        cut_blocks(lora, blocks={lora.block(module): 0.0}, measure=False)
