"""The synthetic checkpoints and LoRAs that every other test trusts."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
import synthetic
import torch
from safetensors.torch import load_file, save

from tests import reference

MODULES = {
    "sd1": {"attention": 192, "conv": 86, "text": 72},
    "sd2": {"attention": 192, "conv": 86, "text": 138},
    "sdxl": {"attention": 722, "conv": 66, "text": 264},
}
FULL_SIZE = {"sd1": 1_066_235_307, "sdxl": 3_468_837_868}


@pytest.mark.parametrize("architecture", MODULES)
def test_kohyas_module_counts(architecture):
    kinds = Counter(module.kind for module in synthetic.modules(architecture))
    assert kinds == MODULES[architecture]


@pytest.mark.parametrize("architecture", FULL_SIZE)
def test_full_size_is_the_real_number_of_parameters(architecture):
    tensors = synthetic.single_file(architecture)
    assert sum(math.prod(shape) for shape in tensors.values()) == FULL_SIZE[architecture]


@pytest.mark.parametrize("architecture", MODULES)
@pytest.mark.parametrize("factor", [1, 32])
def test_both_spellings_of_the_unet_have_the_same_shapes(architecture, factor):
    original = synthetic.single_file(architecture, factor=factor)
    diffusers = synthetic.folder_layout(architecture, factor=factor)
    names = {"sd1": "sd15", "sd2": "sd2", "sdxl": "sdxl"}
    unet = synthetic.layout(f"{names[architecture]}_unet_diffusers")
    assert {f"unet/{key}" for key in unet} == {k for k in diffusers if k.startswith("unet/")}
    assert (
        diffusers | {f"unet/{key}": shape for key, shape in synthetic.shrink(unet, factor).items()}
        == diffusers
    )
    mapped = {place.key for place in synthetic.folder_places(architecture).values()}
    assert {k for k in original if k.startswith("model.diffusion_model.")} <= mapped


@pytest.mark.parametrize("architecture", MODULES)
def test_a_shrunken_layout_keeps_sums_and_thirds(architecture):
    full, small = (synthetic.single_file(architecture, factor=f) for f in (1, 32))
    assert list(full) == list(small)
    for key, shape in full.items():
        assert len(small[key]) == len(shape)
        if not key.startswith("first_stage_model."):
            for before, after in zip(shape, small[key], strict=True):
                assert after == (before if before in (1, 3, 4, 77) else before // 32)


def test_a_factor_that_breaks_sums_is_refused():
    with pytest.raises(ValueError, match="factor 3"):
        synthetic.single_file("sd1", factor=3)


def test_the_file_is_what_safetensors_would_have_written(tmp_path, make_lora):
    path = make_lora("sdxl", rank=4, alpha=2)
    tensors = load_file(path)
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    again = save(tensors, metadata=metadata)
    data = 8 + int.from_bytes(again[:8], "little")
    assert again[data:] == header[data:]
    assert metadata["sshs_model_hash"] == hashlib.sha256(again[data:]).hexdigest()


def test_a_checkpoint_mixes_dtypes_and_is_small(sd15, sdxl):
    tensors = load_file(sd15)
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    assert dtypes == {torch.float16: 1130, torch.float32: 1, torch.int64: 1}
    assert max(sd15.stat().st_size, sdxl.stat().st_size) < 20e6
    weight = tensors["model.diffusion_model.middle_block.1.proj_in.weight"].float()
    assert 0.02 < float(weight.std()) < 0.04


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    tensors = synthetic.single_file("sd1", factor=32)
    files = [
        synthetic.write_checkpoint(tmp_path / f"{i}.safetensors", tensors, seed=seed)
        for i, seed in enumerate((5, 5, 6))
    ]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second != other


def test_the_tuned_checkpoint_differs_by_decaying_low_rank_and_a_little_noise(sdxl, sdxl_tuned):
    before, after = load_file(sdxl), load_file(sdxl_tuned)
    places = {module.place.key for module in synthetic.modules("sdxl")}
    for key, tensor in before.items():
        assert (key in places) != torch.equal(tensor, after[key]), key
    key = "model.diffusion_model.output_blocks.0.0.in_layers.2.weight"
    change = (after[key].double() - before[key].double()).flatten(1)
    assert 0.005 < float(change.norm() / before[key].double().norm()) < 0.02
    assert reference.relative_error(reference.best_rank(change, 4), change) < 0.2
    assert int(torch.linalg.matrix_rank(change)) == min(change.shape)


@pytest.mark.parametrize("architecture", MODULES)
def test_the_folder_holds_the_weights_of_the_file(architecture, make_checkpoint, make_folder):
    tuning = synthetic.Tuning(rank=2)
    single = load_file(make_checkpoint(architecture, tuning=tuning))
    folder = make_folder(architecture, tuning=tuning)
    q = {"sd1": None, "sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        unet["up_blocks.1.attentions.2.proj_out.weight"],
        single["model.diffusion_model.output_blocks.5.1.proj_out.weight"],
    )
    if prefix := q[architecture]:
        component = "text_encoder_2" if architecture == "sdxl" else "text_encoder"
        text = load_file(folder / component / "model.safetensors")
        fused = single[f"{prefix}transformer.resblocks.3.attn.in_proj_weight"]
        parts = [
            text[f"text_model.encoder.layers.3.self_attn.{x}_proj.weight"] for x in ("q", "k", "v")
        ]
        assert torch.equal(torch.cat(parts), fused)
        assert torch.equal(text["text_projection.weight"].T, single[f"{prefix}text_projection"])


def _deltas(tensors: dict[str, torch.Tensor], up: str, down: str) -> list[torch.Tensor]:
    stems = sorted(key.removesuffix(f".{up}") for key in tensors if key.endswith(f".{up}"))
    alphas = {stem: tensors.get(f"{stem}.alpha") for stem in stems}
    return [
        reference.delta(
            tensors[f"{stem}.{up}"],
            tensors[f"{stem}.{down}"],
            None if alphas[stem] is None else float(alphas[stem]),
        )
        for stem in stems
    ]


@pytest.mark.parametrize("dialect", [d for d in synthetic.DIALECTS if d != "peft"])
@pytest.mark.parametrize("architecture", MODULES)
def test_every_dialect_holds_the_same_delta(architecture, dialect):
    options = {"rank": 4, "alpha": 2.0, "seed": 3, "conv": True, "dtype": "F32"}
    kohya = synthetic.lora_tensors(architecture, **options)
    other = synthetic.lora_tensors(architecture, dialect=dialect, **options)
    suffixes = ("lora_up.weight", "lora_down.weight")
    spelled = ("lora_B.weight", "lora_A.weight") if dialect == "diffusers" else suffixes
    ours, theirs = _deltas(kohya, *suffixes), _deltas(other, *spelled)
    assert len(ours) == sum(MODULES[architecture].values())
    # The order of names differs between dialects: compare the sets through their norms.
    expected = sorted(float(change.norm()) for change in ours)
    assert sorted(float(change.norm()) for change in theirs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("architecture", "dialect", "key"),
    [
        ("sd1", "kohya", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"),
        ("sd1", "comfyui", "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight"),
        ("sdxl", "kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha"),
        ("sdxl", "kohya", "lora_unet_output_blocks_2_2_conv.lora_down.weight"),
        ("sdxl", "kohya-diffusers", "lora_unet_up_blocks_0_upsamplers_0_conv.lora_down.weight"),
        ("sdxl", "kohya", "lora_te1_text_model_encoder_layers_11_self_attn_q_proj.alpha"),
        ("sdxl", "diffusers", "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.lora_A.weight"),
        ("sdxl", "peft", "base_model.model.mid_block.resnets.1.conv2.lora_B.weight"),
        (
            "sdxl",
            "comfyui",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.alpha",
        ),
    ],
)
def test_names_as_they_are_in_the_wild(architecture, dialect, key):
    assert key in synthetic.lora_tensors(architecture, dialect=dialect, rank=2, conv=True)


def test_a_lora_changes_its_weights_by_about_one_percent(sd15, make_lora):
    lora, base = load_file(make_lora("sd1", rank=8, alpha=4)), load_file(sd15)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    change = reference.delta(
        lora[f"{module}.lora_up.weight"], lora[f"{module}.lora_down.weight"], alpha=4
    )
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
    assert 0.005 < float(change.norm() / base[key].double().norm()) < 0.02
    spectrum = torch.linalg.svdvals(change)[:8]
    assert float(spectrum[7] / spectrum[0]) < 0.4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_once_agrees_with_a_search_among_neighbours(dtype):
    values = np.random.default_rng(0).standard_normal(2000) * 1e-3
    near = torch.from_numpy(values).to(dtype)
    candidates = torch.stack([near, *(_step(near, by) for by in (-1, 1))]).double().numpy()
    best = np.abs(candidates - values).min(0)
    assert (np.abs(reference.round_once(values, dtype).double().numpy() - values) == best).all()
    tie = 1 + np.array([1.0, 3.0]) * torch.finfo(dtype).eps / 2
    even = 1 + np.array([0.0, 2.0]) * torch.finfo(dtype).eps
    assert reference.round_once(tie, dtype).double().tolist() == even.tolist()
    assert reference.round_once(tie[:1] + 2**-50, dtype).double().item() > 1


def _step(tensor: torch.Tensor, by: int) -> torch.Tensor:
    integer = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return (tensor.view(integer) + by).view(tensor.dtype)


def test_the_tucker_twin_is_three_convolutions():
    generator = torch.Generator().manual_seed(0)
    up, mid, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 3, 1, 1), (3, 3, 3, 3), (3, 4, 1, 1))
    )
    image = torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    chained = conv(conv(conv(image, down), mid), up) * (2 / 3)
    torch.testing.assert_close(conv(image, reference.delta(up, down, 2, mid)), chained)


def test_a_negative_control_catches_a_check_that_cannot_fail():
    with pytest.raises(pytest.fail.Exception):
        reference.negative_control(lambda answer: None, torch.ones(2))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", MODULES)
def test_diffusers_and_transformers_load_the_folder(architecture, make_folder):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = make_folder(architecture)
    unet, told = diffusers.UNet2DConditionModel.from_pretrained(
        folder / "unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(told.values()), told
    loaded = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {k: v.shape for k, v in unet.state_dict().items()} == {
        k: v.shape for k, v in loaded.items()
    }
    _, told = transformers.CLIPTextModel.from_pretrained(
        folder / "text_encoder", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"], told
