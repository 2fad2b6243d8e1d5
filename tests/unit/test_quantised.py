"""Scaled fp8 checkpoints: read as plain ones, and written back with a change."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import FileFormatError, NumericsError
from lorakit.tensorfile.quantised import Dequantised, Requantised, dequantised, dequantised_of
from lorakit.tensorfile.source import DictSource, TensorSource, open_source
from lorakit.tensorfile.writer import write_safetensors
from tests.helpers import metadata_of, tensors_of

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4: 448.0, E5: 57344.0}
PREFIX = "model.diffusion_model."
QKV = f"{PREFIX}double_blocks.0.img_attn.qkv"
PROJ = f"{PREFIX}double_blocks.0.img_attn.proj"
MLP = f"{PREFIX}double_blocks.0.img_mlp.0"
NORM = f"{PREFIX}double_blocks.0.img_attn.norm.query_norm.scale"
SHAPES = {QKV: (48, 16), PROJ: (16, 16), MLP: (64, 16)}
QUANTIZATION = "_quantization_metadata"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def text(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def quantised(weight: Tensor, kind: torch.dtype, scale: Tensor) -> Tensor:
    quotient = weight.double() / scale.double().reshape(-1, *(1,) * (weight.dim() - 1))
    return quotient.clamp(-TOP[kind], TOP[kind]).to(kind)


def checkpoint(
    form: str, kind: torch.dtype = E4, stored: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Make three scaled layers, a bias, a norm, and a layer that is not scaled."""
    g = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    row = form == "row"
    for layer, shape in SHAPES.items():
        weight = torch.randn(shape, generator=g) * 0.03
        amax = weight.abs().amax(1, keepdim=True) if row else weight.abs().max()
        scale = (amax / TOP[kind]).to(stored)
        tensors[f"{layer}.weight"] = quantised(weight, kind, scale)
        tensors[f"{layer}.{'scale_weight' if form == 'v1' else 'weight_scale'}"] = scale
        tensors[f"{layer}.{'scale_input' if form == 'v1' else 'input_scale'}"] = torch.tensor(0.5)
        tensors[f"{layer}.bias"] = torch.randn(shape[0], generator=g).bfloat16()
        if form == "new":
            name = "float8_e4m3fn" if kind == E4 else "float8_e5m2"
            tensors[f"{layer}.comfy_quant"] = text({"format": name})
    tensors[NORM] = torch.ones(8)
    tensors[f"{PREFIX}img_in.weight"] = torch.randn(16, 8, generator=g).to(E4)
    metadata = {"modelspec.title": "as it was"}
    if form == "v1":
        tensors[f"{PREFIX}scaled_fp8"] = torch.empty(0, dtype=kind)
    if form == "new":
        layers = {layer: {"format": name} for layer in SHAPES}
        metadata[QUANTIZATION] = json.dumps({"format_version": "1.0", "layers": layers})
    return tensors, metadata


def viewed(source: TensorSource) -> Dequantised:
    view = dequantised(source)
    assert isinstance(view, Dequantised)
    return view


class Changed:
    """A view with low-rank changes added in float64, as `Applied` adds them."""

    def __init__(self, view: TensorSource, layers: list[str], size: float = 0.01) -> None:
        self.base = view
        self.name = view.name
        self.specs = view.specs
        self.metadata = {**view.metadata, "added": "by the test"}
        g = torch.Generator().manual_seed(11)
        self.changes = {
            f"{layer}.weight": size
            * torch.randn(SHAPES[layer][0], 2, generator=g).double()
            @ torch.randn(2, SHAPES[layer][1], generator=g).double()
            for layer in layers
        }

    def merged(self, key: str) -> Tensor:
        return self.base.get(key).double() + self.changes[key]

    def get(self, key: str) -> Tensor:
        return self.merged(key).float() if key in self.changes else self.base.get(key)

    def extent(self, key: str) -> object:
        return None if key in self.changes else self.base.extent(key)


def requantised(view: Dequantised, layers: list[str], size: float = 0.01) -> Requantised:
    changed = Changed(view, layers, size)
    return Requantised(
        view=view, changed=changed, touched=changed.changes.keys(), merged=changed.merged
    )


FORMS = [
    (form, kind, stored)
    for form in ("v1", "new", "row")
    for kind in (E4, E5)
    for stored in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("form", "kind", "stored"), FORMS)
def test_scaled_weights_look_like_plain_ones(
    form: str, kind: torch.dtype, stored: torch.dtype
) -> None:
    tensors, metadata = checkpoint(form, kind, stored)
    source = DictSource(tensors, metadata, name="flux.safetensors")
    view = viewed(source)
    plain = [k for k in tensors if k.endswith((".weight", ".bias", NORM))]
    assert list(view.specs) == plain
    assert all(view.specs[key] == source.specs[key] for key in plain)
    assert view.metadata == {"modelspec.title": "as it was"}
    for layer, shape in SHAPES.items():
        ending = "scale_weight" if form == "v1" else "weight_scale"
        expected = tensors[f"{layer}.weight"].double() * tensors[f"{layer}.{ending}"].double()
        found = view.get(f"{layer}.weight")
        assert found.dtype == torch.float32
        assert found.shape == shape
        assert torch.equal(found, expected.float())
        assert view.extent(f"{layer}.weight") is None
    assert torch.equal(bits(view.get(f"{PREFIX}img_in.weight")), bits(tensors[plain[-1]]))
    assert dequantised(view) is view
    assert dequantised_of(Changed(view, [QKV])) is view
    assert dequantised_of(source) is None


def test_a_plain_source_is_returned_as_it_is() -> None:
    source = DictSource({f"{QKV}.weight": torch.zeros(4, 4).to(E4), "a.bias": torch.zeros(4)})
    assert dequantised(source) is source


def test_a_marker_alone_is_hidden() -> None:
    source = DictSource({"a.weight": torch.zeros(4, 4).to(E4), "scaled_fp8": torch.zeros(2).to(E4)})
    assert list(dequantised(source).specs) == ["a.weight"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("weight_shape", [(1, 6), (6, 1), (6, 5), (6, 5, 3, 3), (6,)])
def test_one_number_may_have_any_shape(
    shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> None:
    weight = torch.randn(weight_shape).to(E4)
    source = DictSource({"a.weight": weight, "a.weight_scale": torch.full(shape, 0.25)})
    view = viewed(source)
    assert torch.equal(view.get("a.weight"), weight.float() * 0.25)
    value = view.get("a.weight").double() * 1.5
    back = Requantised(view=view, changed=view, touched=("a.weight",), merged=lambda _: value)
    assert back.get("a.weight_scale").shape == shape
    assert back.get("a.weight").shape == weight_shape
    expected = value.abs().max() / 448
    assert float(back.get("a.weight_scale")) == pytest.approx(float(expected))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_a_row_multiplies_rows(shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(6, 6).to(E4), torch.rand(6) + 0.1
    source = DictSource({"a.weight": weight, "a.weight_scale": scale.reshape(shape)})
    view = viewed(source)
    assert torch.equal(view.get("a.weight"), weight.float() * scale[:, None])
    back = Requantised(view=view, changed=view, touched=("a.weight",), merged=view.get)
    rows = view.get("a.weight").abs().amax(1) / 448
    torch.testing.assert_close(back.get("a.weight_scale").reshape(6), rows)
    kernel = DictSource(
        {"a.weight": torch.randn(6, 5, 3, 3).to(E4), "a.weight_scale": scale.reshape(6, 1, 1, 1)}
    )
    assert viewed(kernel).scale("a.weight").shape == (6, 1, 1, 1)


@pytest.mark.parametrize(("form", "kind", "stored"), FORMS)
def test_a_change_is_rounded_once_under_a_fresh_scale(
    form: str, kind: torch.dtype, stored: torch.dtype
) -> None:
    tensors, metadata = checkpoint(form, kind, stored)
    view = viewed(DictSource(tensors, metadata))
    back = requantised(view, [QKV, MLP])
    exact = Changed(view, [QKV, MLP])
    assert list(back.specs) == list(tensors)
    ending = "scale_weight" if form == "v1" else "weight_scale"
    for layer in (QKV, MLP):
        value = exact.merged(f"{layer}.weight")
        scale = back.get(f"{layer}.{ending}")
        weight = back.get(f"{layer}.weight")
        assert (scale.dtype, scale.shape) == (stored, tensors[f"{layer}.{ending}"].shape)
        amax = value.abs().amax(1, keepdim=True) if form == "row" else value.abs().max()
        least = 2.0**-19 if stored == torch.float16 else 0.0
        assert torch.equal(scale, (amax / TOP[kind]).clamp_min(least).to(stored))
        assert (weight.dtype, weight.shape) == (kind, value.shape)
        inner = value / scale.double()
        unit = torch.ldexp(
            torch.full_like(inner, torch.finfo(kind).eps),
            (torch.frexp(inner)[1] - 1).clamp_min(-6 if kind == E4 else -14),
        )
        off = (weight.double() - inner).abs() / unit
        assert float(off.max()) <= 0.5 * (1 + 1e-9)
        assert not torch.equal(bits(weight), bits(tensors[f"{layer}.weight"]))
        used = weight.float().abs().max()
        # A scale in fp16 that is too small for its normal numbers leaves room at the top.
        assert stored == torch.float16 or used >= TOP[kind] / (1 + torch.finfo(kind).eps)


@pytest.mark.parametrize("form", ["v1", "new", "row"])
@pytest.mark.parametrize("kind", [E4, E5])
def test_a_written_file_keeps_all_that_is_untouched(
    form: str, kind: torch.dtype, tmp_path: Path
) -> None:
    tensors, metadata = checkpoint(form, kind)
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, path, metadata)
    view = viewed(open_source(path))
    back = requantised(view, [QKV])
    write_safetensors(out, back)
    before, after = tensors_of(path), tensors_of(out)
    assert list(open_source(path).specs) == list(open_source(out).specs)
    ending = "scale_weight" if form == "v1" else "weight_scale"
    changed = {f"{QKV}.weight", f"{QKV}.{ending}"}
    for key, tensor in before.items():
        assert torch.equal(bits(after[key]), bits(tensor)) != (key in changed), key
        assert (back.extent(key) is None) == (key in changed), key
    assert metadata_of(out) == {**metadata, "added": "by the test"}
    again = viewed(open_source(out))
    step = float(after[f"{QKV}.{ending}"].max()) * TOP[kind] * torch.finfo(kind).eps
    exact = Changed(view, [QKV]).merged(f"{QKV}.weight")
    assert float((again.get(f"{QKV}.weight").double() - exact).abs().max()) <= 0.51 * step


def test_plain_tensors_come_from_the_changed_model() -> None:
    tensors, metadata = checkpoint("v1")
    view = viewed(DictSource(tensors, metadata))
    changed = Changed(view, [QKV])
    bias = f"{QKV}.bias"
    changed.changes[bias] = torch.ones(48).double()
    back = Requantised(
        view=view, changed=changed, touched=changed.changes.keys(), merged=changed.merged
    )
    assert torch.equal(back.get(bias), tensors[bias].float() + 1)
    assert torch.equal(bits(back.get(f"{PROJ}.weight")), bits(tensors[f"{PROJ}.weight"]))
    assert torch.equal(back.get(f"{PROJ}.scale_weight"), tensors[f"{PROJ}.scale_weight"])


@pytest.mark.parametrize("form", ["v1", "row"])
def test_zeros_keep_the_scale_1(form: str) -> None:
    tensors, metadata = checkpoint(form)
    view = viewed(DictSource(tensors, metadata))
    key, ending = f"{QKV}.weight", "scale_weight" if form == "v1" else "weight_scale"
    value = torch.zeros(48, 16, dtype=torch.float64)
    if form == "row":
        value[3] = 3.5
    back = Requantised(view=view, changed=view, touched=(key,), merged=lambda _: value)
    scale = back.get(f"{QKV}.{ending}").double().reshape(-1)
    zero = value.abs().amax(1) == 0 if form == "row" else torch.tensor([True])
    assert bool((scale[zero] == 1.0).all())
    assert torch.equal(back.get(key).double() * (scale[:, None] if form == "row" else 1.0), value)


def test_an_empty_weight_and_a_tiny_one_do_no_harm() -> None:
    for value in (torch.zeros(0, 4), torch.full((3, 4), 1e-12)):
        tensors = {"a.weight": value.to(E4), "a.scale_weight": torch.tensor(1.0).half()}
        view = viewed(DictSource(tensors))
        merged = {"a.weight": value.double()}
        back = Requantised(view=view, changed=view, touched=merged, merged=merged.__getitem__)
        assert back.get("a.weight").shape == value.shape
        assert bool(back.get("a.weight").float().isfinite().all())
        assert 0.0 < float(back.get("a.scale_weight")) <= 1.0


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error(odd: float) -> None:
    tensors, metadata = checkpoint("v1")
    view = viewed(DictSource(tensors, metadata))
    value = torch.zeros(48, 16, dtype=torch.float64)
    value[2, 3] = odd
    for key in (f"{QKV}.weight", f"{QKV}.scale_weight"):
        back = Requantised(
            view=view, changed=view, touched=(f"{QKV}.weight",), merged=lambda _: value
        )
        with pytest.raises(NumericsError, match=r"qkv\.weight.*finite"):
            back.get(key)


@pytest.mark.parametrize("form", ["v1", "new", "row"])
def test_the_order_of_questions_does_not_matter(form: str) -> None:
    tensors, metadata = checkpoint(form)
    view = viewed(DictSource(tensors, metadata))
    layers = list(SHAPES)
    forward, backward = requantised(view, layers), requantised(view, layers)
    first = {key: forward.get(key) for key in tensors}
    second = {key: backward.get(key) for key in reversed(tensors)}
    crowd = requantised(view, layers)
    keys = list(tensors) * 8
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(crowd.get, keys))
    for key in tensors:
        assert torch.equal(bits(first[key]), bits(second[key])), key
    assert all(torch.equal(bits(a), bits(first[k])) for k, a in zip(keys, many, strict=True))


def test_weight_and_scale_belong_together_even_where_the_sum_wavers() -> None:
    tensors, metadata = checkpoint("v1")
    view = viewed(DictSource(tensors, metadata))
    key, calls = f"{QKV}.weight", iter(range(1, 100))
    base = view.get(key).double()
    back = Requantised(
        view=view, changed=view, touched=(key,), merged=lambda _: base * (1 + 1e-4 * next(calls))
    )
    scale, weight = back.get(f"{QKV}.scale_weight").double(), back.get(key).double()
    assert float((weight * scale - base).abs().max()) <= float(base.abs().max()) / 20
    assert torch.equal(back.get(f"{QKV}.scale_weight").double(), scale)


REFUSED = {
    "nvfp4": ({"a.weight_scale_2": torch.tensor(1.0)}, {}, "nvfp4"),
    "blocks, inverse": ({"a.weight_scale_inv": torch.ones(2, 2)}, {}, "a scale a block"),
    "blocks": ({"a.weight_scale": torch.ones(2, 2)}, {}, r"\[2, 2\] for \[8, 8\]"),
    "columns": ({"a.weight_scale": torch.ones(1, 8)}, {}, r"\[1, 8\]"),
    "uint8 scale": ({"a.weight_scale": torch.ones((), dtype=torch.uint8)}, {}, "in U8"),
    "int8": ({"a.weight": torch.zeros(8, 8, dtype=torch.int8)}, {}, "int8"),
    "bnb int8": ({"a.SCB": torch.ones(8)}, {}, "bitsandbytes"),
    "bnb absmax": ({"a.weight.absmax": torch.ones(8)}, {}, "bitsandbytes"),
    "bnb map": ({"a.weight.quant_map": torch.ones(16)}, {}, "bitsandbytes"),
    "bnb state": (
        {"a.weight.quant_state.bitsandbytes__nf4": torch.ones(8, dtype=torch.uint8)},
        {},
        "bitsandbytes",
    ),
    "smoothed": ({"a.pre_quant_scale": torch.ones(8)}, {}, "smoothed"),
    "packed": ({"a.qweight": torch.ones(8, dtype=torch.int32)}, {}, "packed"),
    "no weight": ({"b.scale_weight": torch.tensor(1.0)}, {}, "without b.weight"),
    "wide weight": (
        {"a.weight": torch.zeros(8, 8), "a.scale_weight": torch.tensor(1.0)},
        {},
        "F32",
    ),
    "two scales": (
        {"a.scale_weight": torch.tensor(1.0), "a.weight_scale": torch.tensor(1.0)},
        {},
        "two scales",
    ),
    "format": ({"a.comfy_quant": text({"format": "nvfp4"})}, {}, "format nvfp4"),
    "other fp8": ({"a.comfy_quant": text({"format": "float8_e5m2"})}, {}, "calls float8_e5m2"),
    "rotated": (
        {
            "a.weight_scale": torch.tensor(1.0),
            "a.comfy_quant": text({"format": "float8_e4m3fn", "params": {"convrot": True}}),
        },
        {},
        "rotated",
    ),
    "no scale": ({"a.comfy_quant": text({"format": "float8_e4m3fn"})}, {}, "without a scale"),
    "no JSON": ({"a.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, {}, "no JSON"),
    "no bytes": ({"a.comfy_quant": torch.ones(2)}, {}, "in F32"),
    "a list": ({"a.comfy_quant": text([1])}, {}, "format None"),
    "the header": (
        {},
        {QUANTIZATION: json.dumps({"layers": {"a": {"format": "int8_blockwise"}}})},
        "int8_blockwise",
    ),
    "the header, no JSON": ({}, {QUANTIZATION: "{"}, "no JSON"),
    "the header, no layers": ({}, {QUANTIZATION: "{}"}, "without layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_quantised_otherwise_is_refused_in_one_sentence(case: str) -> None:
    extra, metadata, found = REFUSED[case]
    tensors = {"a.weight": torch.zeros(8, 8).to(E4), **extra}
    with pytest.raises(FileFormatError, match=found) as error:
        dequantised(DictSource(tensors, metadata, name="model.safetensors"))
    sentence = str(error.value)
    assert sentence.startswith("model.safetensors: ")
    assert ": expected plain weights, or fp8" in sentence
    assert sentence.endswith("; convert the model to fp16 or bf16 first.")
    assert "\n" not in sentence


def test_a_scale_that_is_not_finite_is_damage() -> None:
    tensors, metadata = checkpoint("v1")
    tensors[f"{QKV}.scale_weight"] = torch.tensor(float("nan"))
    view = viewed(DictSource(tensors, metadata))
    with pytest.raises(FileFormatError, match=r"qkv\.scale_weight: expected a finite scale"):
        view.get(f"{QKV}.weight")
