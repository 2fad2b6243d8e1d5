"""What does not make an adapter is refused: the message names what was expected and found."""

import math
import re

import pytest
import torch
from torch import Tensor

import lorakit
from lorakit.adapters import build
from lorakit.adapters.checks import finite
from lorakit.errors import AdapterError, NumericsError
from lorakit.linalg.factored import Factors

Tensors = dict[str, Tensor]


def ones(**shapes: tuple[int, ...]) -> Tensors:
    """Return tensors of ones by role."""
    return {role: torch.ones(shape) for role, shape in shapes.items()}


LOHA = ones(hada_w1_a=(8, 2), hada_w1_b=(2, 6), hada_w2_a=(8, 2), hada_w2_b=(2, 6), alpha=())
TUCKER = ones(
    hada_w1_a=(2, 8),
    hada_w1_b=(2, 6),
    hada_w2_a=(2, 8),
    hada_w2_b=(2, 6),
    hada_t1=(2, 2, 3, 3),
    hada_t2=(2, 2, 3, 3),
)
LOKR = ones(lokr_w1=(4, 2), lokr_w2_a=(2, 1), lokr_w2_b=(1, 3), alpha=())
LOKR_TUCKER = ones(lokr_w1=(4, 2), lokr_w2_a=(1, 2), lokr_w2_b=(1, 3), lokr_t2=(1, 1, 3, 3))
GLORA = ones(
    **{"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6)}, alpha=()
)
OFT = ones(oft_blocks=(4, 2, 2), rescale=(8, 1), alpha=())
BOFT = ones(oft_blocks=(2, 4, 2, 2), rescale=(8, 1))
IA3 = {**ones(weight=(8,)), "on_input": torch.zeros(())}
PEFT_IA3 = ones(ia3_l=(8, 1))
FULL = ones(diff=(8, 6))
SET = ones(set_weight=(8, 6))
DORA = ones(up=(8, 2), down=(2, 6), dora_scale=(8, 1), alpha=())
PEFT_DORA = ones(up=(8, 2), down=(2, 6), lora_magnitude_vector=(8,))
GOOD = {
    "loha": ("loha", LOHA),
    "loha tucker": ("loha", TUCKER),
    "lokr": ("lokr", LOKR),
    "lokr tucker": ("lokr", LOKR_TUCKER),
    "lokr with a kernel of one in w1": ("lokr", ones(lokr_w1=(4, 2, 1, 1), lokr_w2=(2, 3, 3, 3))),
    "glora": ("glora", GLORA),
    "oft": ("oft", OFT),
    "boft": ("oft", BOFT),
    "ia3": ("ia3", IA3),
    "ia3 of peft": ("ia3", PEFT_IA3),
    "full": ("full", FULL),
    "set": ("set", SET),
    "dora": ("lora dora", DORA),
    "dora of peft": ("lora dora", PEFT_DORA),
}

BAD = {
    "loha without a part": ("loha", {**LOHA, "hada_w2_b": None}, "no hada_w2_b beside"),
    "loha of two ranks": ("loha", {**LOHA, "hada_w1_b": (3, 6)}, "two products of one shape"),
    "loha of two inputs": ("loha", {**LOHA, "hada_w1_b": (2, 5)}, "two products of one shape"),
    "loha of two outputs": ("loha", {**LOHA, "hada_w2_a": (7, 2)}, "two products of one shape"),
    "loha of a vector": ("loha", {**LOHA, "hada_w1_a": (8,)}, "expected matrices"),
    "loha of a vector in b": ("loha", {**LOHA, "hada_w2_b": (2,)}, "expected matrices"),
    "loha of one core": ("loha", {**TUCKER, "hada_t2": None}, "two products of one shape"),
    "loha of a core of another rank": (
        "loha",
        {**TUCKER, "hada_t1": (3, 2, 3, 3)},
        "two products of one shape",
    ),
    "loha of two kernels": (
        "loha",
        {**TUCKER, "hada_t2": (2, 2, 1, 1)},
        "two products of one shape",
    ),
    "lokr without w1": ("lokr", {**LOKR, "lokr_w1": None}, "expected lokr_w1, or"),
    "lokr with both w2": ("lokr", {**LOKR, "lokr_w2": (2, 3)}, "expected lokr_w2, or"),
    "lokr with half of w2": ("lokr", {**LOKR, "lokr_w2_a": None}, "expected lokr_w2, or"),
    "lokr with t1": ("lokr", {**LOKR, "lokr_t1": (1, 1, 3, 3)}, "expected lokr_w1, or"),
    "lokr of two ranks": ("lokr", {**LOKR, "lokr_w2_b": (2, 3)}, "factors that fit each other"),
    "lokr of a vector": ("lokr", {**LOKR, "lokr_w1": (4,)}, "factors that fit each other"),
    "lokr of a kernel in a factor": (
        "lokr",
        {**LOKR, "lokr_w2_b": (1, 3, 3, 3)},
        "factors that fit each other",
    ),
    "lokr of a kernel in w1": (
        "lokr",
        {**LOKR, "lokr_w1": (4, 2, 3, 3)},
        "factors that fit each other",
    ),
    "lokr of a core of another rank": (
        "lokr",
        {**LOKR_TUCKER, "lokr_t2": (2, 1, 3, 3)},
        "factors that fit each other",
    ),
    "glora without a part": ("glora", {**GLORA, "a2.weight": None}, "no a2.weight beside"),
    "glora of a vector": ("glora", {**GLORA, "a1.weight": (6,)}, "GLoRA of four factors"),
    "glora with a core": ("glora", {**GLORA, "bm.weight": (2, 2, 3, 3)}, "GLoRA of four factors"),
    "glora of two ranks": ("glora", {**GLORA, "b1.weight": (8, 3)}, "factors that fit each other"),
    "glora of two inputs": ("glora", {**GLORA, "a1.weight": (5, 2)}, "factors that fit each other"),
    "glora of rank = inputs = outputs": (
        "glora",
        {role: (4, 4) for role in GLORA if role != "alpha"},
        "tell inputs from ranks",
    ),
    "oft of oblong blocks": ("oft", {**OFT, "oft_blocks": (4, 2, 3)}, "expected square blocks"),
    "oft of one block": ("oft", {**OFT, "oft_blocks": (2, 2)}, "expected square blocks"),
    "oft of a short rescale": ("oft", {**OFT, "rescale": (7, 1)}, "a rescale for every output"),
    "oft of peft alone": ("oft", {"oft_R": (4, 6)}, "PEFT's OFT .*adapter_config.json"),
    "oft of two forms": ("oft", {**OFT, "oft_diag": (4, 2, 2)}, "oft_blocks or oft_diag"),
    "boft of peft of an odd count": (
        "oft",
        {"boft_R": (2, 3, 4, 4), "boft_s": (8, 1)},
        "as many as every stage of BOFT",
    ),
    "boft of an odd size": ("oft", {"oft_blocks": (2, 4, 3, 3)}, "blocks of an even size"),
    "boft of too many stages": ("oft", {"oft_blocks": (5, 4, 2, 2)}, "every stage of BOFT"),
    "ia3 without its side": ("ia3", {"weight": (8,)}, "expected weight and on_input"),
    "ia3 of a matrix": ("ia3", {**IA3, "weight": (8, 6)}, "expected one long side"),
    "ia3 of two sides": ("ia3", {**IA3, "on_input": (2,)}, "expected one number as on_input"),
    "ia3 of peft of a kernel": ("ia3", {"ia3_l": (1, 8, 1, 1)}, r"expected \[out, 1\] or \[1, in"),
    "two differences": ("full", {**FULL, "w_norm": (8,)}, "expected one difference"),
    "no value": ("set", {"weight": (8, 6)}, "expected set_weight, found weight"),
    "dora of another size": ("lora dora", {**DORA, "dora_scale": (7, 1)}, "8 outputs or 6 inputs"),
    "dora of the inputs of peft": (
        "lora dora",
        {**PEFT_DORA, "lora_magnitude_vector": (1, 6)},
        "8 outputs or 6 inputs",
    ),
    "dora of two magnitudes": (
        "lora dora",
        {**DORA, "magnitude": (8,)},
        "expected one magnitude, found",
    ),
    "dora of glora": ("glora dora", {**GLORA, "dora_scale": (8, 1)}, "found it beside glora"),
    "two kinds": ("loha lokr", {**LOHA, **LOKR}, "expected one kind of adapter, found loha and"),
    "a magnitude alone": ("dora", {"dora_scale": (8, 1)}, "expected one kind of adapter"),
}


def made(parts: dict[str, Tensor | tuple[int, ...] | None]) -> Tensors:
    """Return the tensors, those that are given as a shape made of ones, None left out."""
    return {
        role: part if isinstance(part, Tensor) else torch.ones(part)
        for role, part in parts.items()
        if part is not None
    }


@pytest.mark.parametrize("name", GOOD)
def test_what_the_refusals_start_from_is_accepted(name: str) -> None:
    kinds, tensors = GOOD[name]
    adapter = build(kinds.split(), tensors, None)
    change = adapter.change(torch.ones(8, 6) if adapter.needs_base else None)
    sides = change.shape if isinstance(change, Factors) else tuple(change.shape)
    assert sides[0] == 8


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_in_words(name: str) -> None:
    kinds, parts, words = BAD[name]
    tensors = made(parts)
    with pytest.raises(AdapterError, match=words) as caught:
        build(kinds.split(), tensors, None)
    message = str(caught.value)
    assert any(role in message for role in tensors) or "glora" in message, "names what was found"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", GOOD)
def test_values_that_are_not_finite_are_refused_in_every_tensor(name: str, value: float) -> None:
    kinds, tensors = GOOD[name]
    for role, tensor in tensors.items():
        broken = tensor.clone()
        broken.view(-1)[-1] = value
        with pytest.raises(NumericsError, match=f"NaN or infinity in its {re.escape(role)};"):
            build(kinds.split(), {**tensors, role: broken}, None)


@pytest.mark.parametrize("name", GOOD)
def test_tensors_without_values_are_not_checked(name: str) -> None:
    kinds, tensors = GOOD[name]
    shapes = {
        role: tensor.to("meta") if tensor.ndim > 1 else tensor for role, tensor in tensors.items()
    }
    adapter, real = build(kinds.split(), shapes, None), build(kinds.split(), tensors, None)
    assert (adapter.shape, adapter.rank, adapter.kind) == (real.shape, real.rank, real.kind)


@pytest.mark.parametrize("name", ["loha", "loha tucker", "lokr", "lokr tucker", "full"])
def test_the_change_of_tensors_without_values_has_its_shape(name: str) -> None:
    kinds, tensors = GOOD[name]
    shapes = {r: t.to("meta") if t.ndim > 1 else t for r, t in tensors.items()}
    found = build(kinds.split(), shapes, None).change()
    expected = build(kinds.split(), tensors, None).change()
    assert found.shape == expected.shape


@pytest.mark.parametrize("name", [n for n, (k, _) in GOOD.items() if k not in ("loha", "lokr")])
def test_a_weight_of_another_model_is_refused(name: str) -> None:
    kinds, tensors = GOOD[name]
    adapter = build(kinds.split(), tensors, None)
    if adapter.needs_base and adapter.kind != "set_weight":
        with pytest.raises(AdapterError, match="the model that it was trained on"):
            adapter.change(torch.ones(7, 6))


def test_factors_of_a_linear_layer_are_not_spread_over_twice_as_many_inputs() -> None:
    adapter = build(["ia3"], ones(weight=(6,), on_input=()), None)
    with pytest.raises(AdapterError, match="expected 12 factors, found 6"):
        adapter.change(torch.ones(8, 12))


def test_what_cannot_be_cut_or_scaled_is_refused() -> None:
    lokr, oft = build(["lokr"], LOKR, None), build(["oft"], OFT, None)
    with pytest.raises(AdapterError, match="blocks of 2 outputs, found a cut at 3 and 4"):
        lokr.rows(3, 4)
    for adapter in (oft, build(["oft"], BOFT, None)):
        assert adapter.scaled(1.0) is adapter
        with pytest.raises(AdapterError, match="no strength but 0 and 1"):
            adapter.scaled(0.5)
        with pytest.raises(AdapterError, match="fused layer"):
            adapter.rows(1, 3)
    dora = build(["lora", "dora"], DORA, None)
    with pytest.raises(AdapterError, match="depends on the weight"):
        dora.scaled(0.5)


def test_a_dora_that_a_strength_turns_to_zero_is_refused() -> None:
    tensors = {**DORA, "up": torch.zeros(8, 2), "dora_scale": torch.full((8, 1), 0.5)}
    base = torch.eye(8)[:, :6] + torch.eye(8).flip(1)[:, :6]
    base = base / base.norm(dim=1, keepdim=True)
    with pytest.raises(AdapterError, match="strength 2 turns to zero in some output"):
        build(["lora", "dora"], tensors, None).scaled(2.0, base)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
)
def test_every_value_that_is_not_finite_is_seen_and_no_other(dtype: torch.dtype) -> None:
    # What fp32 cannot hold counts as infinite.
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    rows = [[0.0, -0.0, 1.5], [most, -most, torch.finfo(dtype).tiny]]
    usual = torch.tensor(rows, dtype=torch.float64).to(dtype)
    assert finite(usual)
    assert finite(usual.T)
    for odd in (math.nan, -math.nan, math.inf, -math.inf):
        values = usual.double()
        values[1, 1] = odd
        assert not finite(values.to(dtype)), odd


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.complex64])
def test_a_layer_that_is_stored_twice_has_to_be_the_same_and_of_floats(dtype: torch.dtype) -> None:
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    first, second = f"lora_unet_{module.replace('.', '_')}.lora", f"unet.{module}.lora"
    up, down = torch.eye(8, 2), torch.eye(2, 8)
    twice = {
        f"{first}_up.weight": up.to(dtype),
        f"{first}_down.weight": down,
        f"{second}_B.weight": up.to(dtype),
        f"{second}_A.weight": down,
    }
    if dtype.is_complex:
        with pytest.raises(AdapterError, match="expected floats in up, found torch"):
            lorakit.load_lora(twice)
    else:
        assert len(lorakit.load_lora(twice).adapters) == 1
    for other in ((2 * up).to(dtype), up if dtype.is_complex else up.to(torch.complex64)):
        with pytest.raises(AdapterError, match="stored twice with different values"):
            lorakit.load_lora(twice | {f"{second}_B.weight": other})
