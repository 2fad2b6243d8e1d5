"""Files of several adapter kinds, from the file to the model and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit.errors import AdapterError, FileFormatError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile, load_lora
from lorakit.names.flux import FLUX
from lorakit.names.sd import SD1
from lorakit.operations.apply import apply
from lorakit.operations.choice import Choice
from lorakit.operations.convert import convert
from lorakit.operations.cut_blocks import cut_blocks
from lorakit.operations.extract import extract
from lorakit.operations.merge import merge
from lorakit.saving import save_lora, save_model, stored_tensors
from lorakit.tensorfile.source import DictSource, open_source
from tests import layouts, reference
from tests.helpers import ran, refused, tensors_of

NAMES = tuple(name for name in FLUX.build() if ".0." in name.module and "text" not in name.module)
MODEL = layouts.tiny_model(NAMES)
FOLDER = DictSource(layouts.as_folder(MODEL))
SINGLE = DictSource(layouts.as_single_file(FLUX, MODEL))
BLOCK = "transformer_blocks.0"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def mixed() -> dict[str, Tensor]:
    """Return one file with a kind a layer, in diffusers' names under ComfyUI's roles."""
    at = f"lora_transformer_{BLOCK.replace('.', '_')}"
    return {
        f"{at}_attn_to_q.lora_up.weight": random(2, 2, seed=1),
        f"{at}_attn_to_q.lora_down.weight": random(2, 6, seed=2),
        f"{at}_attn_to_q.alpha": torch.tensor(1.0),
        f"{at}_attn_to_k.hada_w1_a": random(2, 1, seed=3),
        f"{at}_attn_to_k.hada_w1_b": random(1, 6, seed=4),
        f"{at}_attn_to_k.hada_w2_a": random(2, 1, seed=5),
        f"{at}_attn_to_k.hada_w2_b": random(1, 6, seed=6),
        f"{at}_attn_to_v.lokr_w1": random(1, 2, seed=7),
        f"{at}_attn_to_v.lokr_w2": random(2, 3, seed=8),
        f"{at}_attn_to_out_0.lora_up.weight": random(4, 2, seed=9),
        f"{at}_attn_to_out_0.lora_down.weight": random(2, 6, seed=10),
        f"{at}_attn_to_out_0.dora_scale": random(4, 1, seed=11).abs() + 1,
        f"{at}_attn_to_out_0.diff_b": random(4, seed=12),
        f"{at}_attn_to_add_out.diff": random(4, 6, seed=13),
        f"{at}_ff_net_2.oft_blocks": random(2, 2, 2, seed=14),
        f"{at}_attn_norm_q.w_norm": random(4, seed=15),
        f"{at}_ff_net_0_proj.weight": random(4, seed=16),
        f"{at}_ff_net_0_proj.on_input": torch.tensor(0.0),
        "bundle_emb.mine.string_to_param.*": random(2, 8, seed=17),
    }


def loaded() -> LoraFile:
    return load_lora(mixed())


def rows(value: Tensor, key: str) -> Tensor:
    """Cut a file's small tensor to the rows that the tiny model has there."""
    return value[: len(MODEL[key])]


def expected() -> dict[str, Tensor]:
    """Return each touched tensor of the model at strength 1, by the plain formulas."""
    at = f"transformer.{BLOCK}"
    file = {key.rpartition("_" + BLOCK.replace(".", "_") + "_")[2]: v for key, v in mixed().items()}
    weight = {key: value.double() for key, value in MODEL.items()}
    q = 0.5 * file["attn_to_q.lora_up.weight"] @ file["attn_to_q.lora_down.weight"]
    k = (file["attn_to_k.hada_w1_a"] @ file["attn_to_k.hada_w1_b"]) * (
        file["attn_to_k.hada_w2_a"] @ file["attn_to_k.hada_w2_b"]
    )
    v = torch.kron(file["attn_to_v.lokr_w1"], file["attn_to_v.lokr_w2"])
    out = f"{at}.attn.to_out.0"
    direction = (
        weight[f"{out}.weight"]
        + (file["attn_to_out_0.lora_up.weight"] @ file["attn_to_out_0.lora_down.weight"]).double()
    )
    direction = direction / direction.norm(dim=1, keepdim=True)
    skew = file["ff_net_2.oft_blocks"].double()
    skew = skew - skew.transpose(1, 2)
    one = torch.eye(2, dtype=torch.float64)
    turns = [((one + s) @ torch.linalg.inv(one - s)).T for s in skew]
    turn = torch.block_diag(*turns)  # type: ignore[no-untyped-call]
    return {
        f"{at}.attn.to_q.weight": weight[f"{at}.attn.to_q.weight"] + q,
        f"{at}.attn.to_k.weight": weight[f"{at}.attn.to_k.weight"] + k,
        f"{at}.attn.to_v.weight": weight[f"{at}.attn.to_v.weight"] + v,
        f"{out}.weight": direction * file["attn_to_out_0.dora_scale"].double(),
        f"{out}.bias": weight[f"{out}.bias"] + file["attn_to_out_0.diff_b"],
        f"{at}.attn.to_add_out.weight": weight[f"{at}.attn.to_add_out.weight"]
        + file["attn_to_add_out.diff"],
        f"{at}.ff.net.2.weight": turn @ weight[f"{at}.ff.net.2.weight"],
        f"{at}.attn.norm_q.weight": weight[f"{at}.attn.norm_q.weight"] + file["attn_norm_q.w_norm"],
        f"{at}.ff.net.0.proj.weight": weight[f"{at}.ff.net.0.proj.weight"]
        * (1 + file["ff_net_0_proj.weight"].double()[:, None]),
    }


def after(source: DictSource, stack: list[tuple[LoraFile, float]]) -> dict[str, Tensor]:
    applied, _ = apply(source, stack)
    return {key: applied.get(key).double() for key in source.specs}


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.8])
def test_every_kind_of_one_file_is_baked_alike_into_both_layouts(strength: float) -> None:
    wanted = {key: value.double() for key, value in MODEL.items()}
    for key, value in expected().items():
        wanted[key] = wanted[key] + strength * (value - wanted[key])
    for source, named in (
        (FOLDER, layouts.as_folder(wanted)),
        (SINGLE, layouts.as_single_file(FLUX, wanted)),
    ):
        found = after(source, [(loaded(), strength)])
        assert found.keys() == named.keys()
        for key, value in named.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_a_mix_becomes_one_lora_on_its_model_and_bakes_the_same() -> None:
    merged, report = merge([(loaded(), 0.7), (loaded(), -0.2)], against=FOLDER)
    assert {a.kind for a in merged.adapters.values()} == {"lora", "vector"}
    assert not report.dropped
    found, wanted = after(FOLDER, [(merged, 1.0)]), after(FOLDER, [(loaded(), 0.5)])
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert list(merged.carried) == ["bundle_emb.mine.string_to_param.*"]


def test_a_mix_without_its_model_names_the_layer_that_needs_it() -> None:
    with pytest.raises(AdapterError, match=r"attn\.to_out\.0 is dora.*--against.*--into"):
        merge([(loaded(), 1.0)])


def test_a_mix_is_written_and_read_as_it_was() -> None:
    lora = loaded()
    again = load_lora(stored_tensors(lora, dialect="kohya-diffusers", dtype="F32"))
    assert again.adapters.keys() == lora.adapters.keys()
    wanted = after(FOLDER, [(lora, 1.0)])
    assert all(torch.equal(v, wanted[k]) for k, v in after(FOLDER, [(again, 1.0)]).items())
    assert again.carried.keys() == lora.carried.keys()


def test_a_weighted_block_of_dora_is_a_dora_on_its_model() -> None:
    out = f"transformer.{BLOCK}.attn.to_out.0"
    lora = loaded()
    only = LoraFile(name="x", adapters={out: lora.adapters[out]}, architecture=FLUX)
    cut, _ = cut_blocks(only, blocks={"D00": -0.5}, against=FOLDER)
    assert cut.adapters[out].kind == "dora"
    found, wanted = after(FOLDER, [(cut, 1.0)]), after(FOLDER, [(only, -0.5)])
    key = f"transformer/{BLOCK}.attn.to_out.0.weight"
    torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match=r"depends on the weight.*--against"):
        cut_blocks(only, blocks={"D00": 0.5}, measure=False)


def test_convert_makes_a_plain_lora_of_every_kind() -> None:
    plain, report = convert(loaded(), plain=True, against=FOLDER)
    assert {a.kind for a in plain.adapters.values()} == {"lora", "vector"}
    wanted = after(FOLDER, [(loaded(), 1.0)])
    for key, value in after(FOLDER, [(plain, 1.0)]).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-5)
    assert len(report.rows) == len(plain.adapters)


def tuned(seed: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {k: v + 0.2 * torch.randn(v.shape, generator=g) for k, v in MODEL.items()}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_full_extraction_holds_norms_and_biases_and_gives_the_tuned_model(dialect: str) -> None:
    for base, theirs in (
        (FOLDER, DictSource(layouts.as_folder(tuned()))),
        (SINGLE, DictSource(layouts.as_single_file(FLUX, tuned()))),
    ):
        lora, report = extract(base, theirs, choice=Choice(kind="full"), dialect=dialect)
        assert not report.lost
        found = after(base, [(lora, 1.0)])
        for key in theirs.specs:
            torch.testing.assert_close(found[key], theirs.get(key).double(), rtol=1e-5, atol=1e-5)


def test_a_dora_of_a_rank_is_never_further_off_than_the_lora() -> None:
    theirs = DictSource(layouts.as_folder(tuned()))
    rule = RankRule(rank=1)
    lora, plain = extract(FOLDER, theirs, rule=rule)
    dora, report = extract(FOLDER, theirs, rule=rule, choice=Choice(kind="dora"))
    assert {a.kind for a in dora.adapters.values()} == {"dora"}
    errors = {row.module: row.error or 0.0 for row in plain.rows}
    assert all((row.error or 0.0) <= errors[row.module] + 1e-9 for row in report.rows)
    assert (report.error or 1.0) < (plain.error or 0.0)
    found = after(FOLDER, [(dora, 1.0)])
    key = f"transformer/{BLOCK}.attn.to_out.0.weight"
    row = next(row for row in report.rows if row.module.endswith("_blocks.0.attn.to_out.0"))
    off = found[key] - theirs.get(key).double()
    change = theirs.get(key).double() - FOLDER.get(key).double()
    assert abs(float(off.norm() / change.norm()) - (row.error or 0.0)) < 1e-5
    assert lora.adapters.keys() == dora.adapters.keys()


def test_the_first_layer_of_an_inpainting_model_gets_what_the_lora_knows(tmp_path: Path) -> None:
    names = tuple(name for name in SD1.build() if name.component == "unet")
    model = {f"unet/{n.path}.weight": torch.zeros(4, 4) for n in names if not n.norm}
    model["unet/conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    lora = load_lora(
        {
            "lora_unet_conv_in.lora_up.weight": random(8, 2, 1, 1),
            "lora_unet_conv_in.lora_down.weight": random(2, 4, 3, 3),
        }
    )
    applied, report = apply(DictSource(model), [(lora, 1.0)])
    found = applied.get("unet/conv_in.weight")
    up, down = random(8, 2), random(2, 36)
    torch.testing.assert_close(found[:, :4].flatten(1), up @ down)
    assert not found[:, 4:].any()
    assert "4 of its 9 inputs" in report.rows[0].note


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_a_lora_is_baked_into_scaled_fp8(tmp_path: Path, kind: str) -> None:
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=dtype)}
    for key, value in layouts.as_single_file(FLUX, MODEL).items():
        bare = key.removeprefix("model.diffusion_model.")
        if value.ndim == 2:
            scale = value.abs().max() / torch.finfo(dtype).max
            stored[bare] = (value / scale).to(dtype)
            stored[f"{bare.removesuffix('.weight')}.scale_weight"] = scale
        else:
            stored[bare] = value
    file, lora, out = (tmp_path / f"{n}.safetensors" for n in ("base", "lora", "out"))
    save_file(stored, file)
    save_lora(lora, loaded())
    report = ran("merge", f"{lora}:0.9", "--into", file, "-o", out, "--verify")
    assert report["verified"]["rounding"] <= 0.5 + 1e-6
    result = tensors_of(out)
    assert result.keys() == stored.keys()
    assert all(result[key].dtype == value.dtype for key, value in stored.items())
    applied, _ = apply(open_source(file), [(load_lora(lora), 0.9)])
    wide = tmp_path / "wide.safetensors"
    save_model(wide, applied, dtype="F32")
    plain = tensors_of(wide)
    assert "scaled_fp8" not in plain
    key = "double_blocks.0.img_attn.proj"
    found = result[f"{key}.weight"].double() * result[f"{key}.scale_weight"].double()
    step = float(torch.finfo(dtype).eps)
    assert reference.relative_error(found, plain[f"{key}.weight"].double()) < step


def test_sharded_scaled_fp8_becomes_plain_bf16(tmp_path: Path) -> None:
    folder = tmp_path / "base" / "transformer"
    folder.mkdir(parents=True)
    stored: dict[str, Tensor] = {}
    for key, value in layouts.as_folder(MODEL).items():
        bare = key.removeprefix("transformer/")
        stored[bare] = value
        if value.ndim == 2:
            scale = value.abs().max() / 448
            stored[bare] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{bare.removesuffix('.weight')}.weight_scale"] = scale
    names = sorted(stored)
    shards = {"a": names[::2], "b": names[1::2]}
    stem = "diffusion_pytorch_model"
    for shard, keys in shards.items():
        save_file({k: stored[k].contiguous() for k in keys}, folder / f"{stem}-{shard}.safetensors")
    table = {
        "metadata": {"total_size": sum(t.nbytes for t in stored.values())},
        "weight_map": {k: f"{stem}-{s}.safetensors" for s, keys in shards.items() for k in keys},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")
    lora = tmp_path / "lora.safetensors"
    save_lora(lora, loaded())
    for dtype, scaled in (("keep", True), ("bf16", False)):
        out = tmp_path / dtype
        arguments = ["--into", folder.parent, "-o", out, "--dtype", dtype, "--verify"]
        ran("merge", f"{lora}:0.9", *arguments)
        index = json.loads(next(out.rglob("*.index.json")).read_text("utf-8"))
        found = open_source(out)
        assert ("transformer/transformer_blocks.0.attn.to_q.weight_scale" in found.specs) == scaled
        assert len(index["weight_map"]) == len(found.specs)
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in found.specs.values())


def test_a_layer_that_is_there_whole_and_in_parts_is_refused() -> None:
    file = {
        f"{stem}.{role}": value
        for stem in (
            "lora_unet_double_blocks_0_img_attn_qkv",
            "transformer.transformer_blocks.0.attn.to_q",
        )
        for role, value in {
            "lora_up.weight": random(6 if "qkv" in stem else 2, 2),
            "lora_down.weight": random(2, 6),
        }.items()
    }
    with pytest.raises(FileFormatError, match=r"whole and in parts .*attn\.to_q"):
        load_lora(file)


def test_a_block_wise_scale_is_refused(tmp_path: Path) -> None:
    file, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    bare = layouts.as_single_file(FLUX, MODEL)
    save_file({**bare, "double_blocks.0.img_attn.qkv.weight_scale_inv": torch.ones(2, 2)}, file)
    save_lora(lora, loaded())
    words = refused("merge", lora, "--into", file, "-o", tmp_path / "out.safetensors")
    assert "weight_scale_inv" in words or "block" in words


def test_the_command_line_takes_doras_on_their_model(tmp_path: Path) -> None:
    """A difference, a cut, a smaller rank, a plain LoRA and a sum, each of files with a DoRA."""
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file({key: SINGLE.get(key).contiguous() for key in SINGLE.specs}, base)
    save_lora(lora, loaded())
    for name, arguments in {
        "difference": ["extract", base, f"{base}+{lora}:0.5"],
        "cut": ["cut-blocks", lora, "--elements", "D00:proj:0", "--against", base],
        "resized": ["resize", lora, "--rank", 4, "--against", base],
        "plain": ["convert", lora, "--as", "lora", "--against", base],
        "merged": ["merge", f"{lora}:0.5", "--against", base],
    }.items():
        report = ran(*arguments, "-o", tmp_path / f"{name}.safetensors", "--verify")
        assert report["verified"]["layers"] > 0, name
    half = after(SINGLE, [(load_lora(tmp_path / "difference.safetensors"), 1.0)])
    same = after(SINGLE, [(load_lora(tmp_path / "merged.safetensors"), 1.0)])
    for key, value in after(SINGLE, [(loaded(), 0.5)]).items():
        torch.testing.assert_close(half[key], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same[key], value, rtol=1e-5, atol=1e-5)
