"""merge --into against the float64 sum rounded once; all other bytes the same."""

import json
from pathlib import Path

import pytest
import synthetic
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorakit
from tests import reference
from tests.helpers import dense, metadata_of, ran, tensors_of

Places = dict[str, tuple[str, tuple[int, int] | None]]


def expected_sums(
    architecture: str, base: dict[str, Tensor], terms: list[tuple[Path, float]]
) -> dict[str, Tensor]:
    """Return the float64 sums of the touched tensors, by the places of synthetic names."""
    sums = {key: tensor.double() for key, tensor in base.items()}
    touched: set[str] = set()
    deltas = [(dense(path), strength) for path, strength in terms]
    for module in synthetic.modules(architecture, factor=32):
        name, place = f"{module.component}.{module.path}", module.place
        for delta, strength in deltas:
            if name in delta:
                start, stop = synthetic.row_range(place, tuple(base[place.key].shape))
                rows = sums[place.key][start:stop]
                rows += strength * delta[name].reshape(rows.shape)
                touched.add(place.key)
    return {key: sums[key] for key in touched}


def is_rounded_once(stored: Tensor, exact: Tensor) -> bool:
    """Tell whether no number of the dtype is nearer; a tie to float64's last digit may go up."""
    best = reference.round_once(exact.numpy(), stored.dtype)
    further = (stored.double() - exact).abs() - (best.double() - exact).abs()
    return bool((further <= 1e-17).all())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
def test_every_touched_tensor_is_the_exact_sum_rounded_once(
    make_checkpoint, make_lora, tmp_path: Path, architecture: str, dtype: str
) -> None:  # type: ignore[no-untyped-def]
    base = make_checkpoint(architecture, dtype=dtype, metadata={"modelspec.title": "as it was"})
    loras = [
        (make_lora(architecture, rank=8, alpha=4, seed=1, conv=True), 0.7),
        (make_lora(architecture, rank=4, alpha=1, seed=2, dialect="diffusers"), -0.4),
    ]
    out = tmp_path / "baked.safetensors"
    arguments = [f"{path}:{strength}" for path, strength in loras]
    report = ran("merge", *arguments, "--into", base, "-o", out, "--verify")
    before, after = tensors_of(base), tensors_of(out)
    expected = expected_sums(architecture, before, loras)
    assert list(before) == list(after)
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        if key in expected:
            assert is_rounded_once(tensor, expected[key]), key
            assert not torch.equal(tensor, before[key]), "the check would miss a lost ΔW"
            assert not is_rounded_once(before[key], expected[key])
        else:
            assert torch.equal(tensor, before[key]), key
    assert len(expected) > 100
    assert report["verified"]["untouched"] == len(before) - len(expected)
    assert metadata_of(out)["modelspec.title"] == "as it was"


def test_the_second_text_encoders_rows_are_not_lost(
    sdxl: Path, sdxl_lora: Path, tmp_path: Path
) -> None:
    """supermerger looks up '<...q_proj>_q_proj', finds nothing and says nothing."""
    te2 = {k: t for k, t in tensors_of(sdxl_lora).items() if k.startswith("lora_te2_")}
    lora = synthetic.write_lora(tmp_path / "te2.safetensors", te2)
    out = tmp_path / "baked.safetensors"
    ran("merge", lora, "--into", sdxl, "-o", out)
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    before, after = tensors_of(sdxl)[key].double(), tensors_of(out)[key].double()
    deltas = dense(lora)
    names = [f"text_encoder_2.text_model.encoder.layers.0.self_attn.{x}_proj" for x in "qkv"]
    change = torch.cat([deltas[name] for name in names])
    step = 2.0**-11 * torch.maximum(before.abs(), after.abs()).clamp_min(2**-14)
    assert bool(((after - before - change).abs() <= step * 1.01).all())


def test_a_folder_and_a_single_file_get_the_same_weights(
    make_checkpoint, make_folder, make_lora, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    single, folder = make_checkpoint("sdxl"), make_folder("sdxl")
    lora = make_lora("sdxl", rank=4, seed=3, conv=True)
    ran("merge", lora, "--into", single, "-o", tmp_path / "single.safetensors")
    ran("merge", lora, "--into", folder, "-o", tmp_path / "folder", "--verify")
    found = tensors_of(tmp_path / "single.safetensors")
    inside = {
        f"{file.parent.name}/{name}": tensor
        for file in (tmp_path / "folder").glob("*/*.safetensors")
        for name, tensor in tensors_of(file).items()
    }
    for key, place in synthetic.folder_places("sdxl").items():
        start, stop = synthetic.row_range(place, tuple(found[place.key].shape))
        expected = found[place.key]
        if place.rows is not None:
            expected = expected[start:stop]
        if place.transposed:
            expected = expected.T
        assert torch.equal(inside[key], expected), key
    assert (tmp_path / "folder" / "model_index.json").exists()
    assert (tmp_path / "folder" / "unet" / "config.json").exists()


def test_a_model_on_paper_is_the_merged_model_unrounded(
    sd15: Path, make_lora, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    first, second = (make_lora("sd1", rank=4, seed=seed, every=2) for seed in (1, 2))
    out, paper = tmp_path / "both.safetensors", tmp_path / "paper.safetensors"
    ran("merge", f"{first}:0.7", f"{second}:0.2", "--into", sd15, "-o", out, "--no-metadata")
    ran("merge", f"{second}:0.2", "--into", f"{sd15}+{first}:0.7", "-o", paper, "--no-metadata")
    one, other = tensors_of(out), tensors_of(paper)
    off = [key for key in one if not torch.equal(one[key], other[key])]
    # On paper the inner sum is fp32, so a value may lie on the other side of a tie, rarely.
    assert sum(int((one[key] != other[key]).sum()) for key in off) < 1000


def test_the_python_api_gives_the_same_tensors(sd15: Path, slim_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "cli.safetensors"
    ran("merge", f"{slim_lora}:0.7", "--into", sd15, "-o", out, "--no-metadata")
    base = lorakit.open_source(tensors_of(sd15))
    applied, report = lorakit.apply(base, [(lorakit.load_lora(slim_lora), 0.7)])
    stored = tensors_of(out)
    for key in stored:
        assert torch.equal(applied.get(key).to(stored[key].dtype), stored[key]) or (
            (applied.get(key) - stored[key].float()).abs().max() < 1e-3
        )
    assert len(report.rows) == len(dense(slim_lora))


def test_dtype_stores_the_whole_checkpoint_otherwise(
    sd15: Path, slim_lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full.safetensors"
    ran("merge", slim_lora, "--into", sd15, "-o", out, "--dtype", "fp32", "--verify")
    before, after = tensors_of(sd15), tensors_of(out)
    assert {t.dtype for t in after.values() if t.is_floating_point()} == {torch.float32}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert torch.equal(after[positions], before[positions])
    expected = expected_sums("sd1", before, [(slim_lora, 1.0)])
    assert all(is_rounded_once(after[key], exact) for key, exact in expected.items())


def test_shards_and_pickles_are_models_too(sd15: Path, slim_lora: Path, tmp_path: Path) -> None:
    tensors = tensors_of(sd15)
    expected = tmp_path / "expected.safetensors"
    ran("merge", slim_lora, "--into", sd15, "-o", expected, "--no-metadata")

    shards = tmp_path / "shards"
    shards.mkdir()
    names = {
        key: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, key in enumerate(tensors)
    }
    for name in set(names.values()):
        save_file({k: t for k, t in tensors.items() if names[k] == name}, shards / name)
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    ran("merge", slim_lora, "--into", shards, "-o", tmp_path / "out", "--verify")
    found = {
        k: t
        for file in (tmp_path / "out").glob("*.safetensors")
        for k, t in tensors_of(file).items()
    }
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors_of(expected).items())

    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "global_step": 7}, pickled)
    ran("merge", slim_lora, "--into", pickled, "-o", tmp_path / "from-ckpt.safetensors", "--verify")
    found = tensors_of(tmp_path / "from-ckpt.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors_of(expected).items())

    out = tmp_path / "lora.safetensors"
    report = ran("extract", shards, tmp_path / "out", "--rank", 4, "-o", out)
    assert len(report["rows"]) >= len(dense(slim_lora)) and out.exists()
