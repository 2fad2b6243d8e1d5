"""Flux.1, Chroma and Flux.2: the tables hold every weight, where diffusers too finds it."""

import pytest
import realnames
import torch

from lorakit.names.flux import CHROMA, FLUX
from lorakit.names.flux2 import FLUX2, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from tests.layouts import original_layout

ALL = (FLUX, CHROMA, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2)
EACH = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.id)


def denoiser(architecture):
    return [name for name in architecture.build() if name.component == "transformer"]


def weights(layout):
    """Return a layout's shapes without biases and constants, under the model's own paths."""
    return {
        key.removeprefix(realnames.UNET): shape
        for key, shape in realnames.layout(layout).items()
        if key.endswith((".weight", ".scale"))
    }


def held(architecture):
    """Return the tensors of the single file, each with the modules that it holds in turn."""
    tensors = {}
    for name in denoiser(architecture):
        tensors.setdefault(name.original + name.parameter, []).append(name)
    return tensors


def assert_same_shapes(architecture, single, folder):
    """Assert that the modules' rows fill each tensor without a gap, and all else is equal."""
    for key, names in held(architecture).items():
        if key not in single:
            continue
        rows, *rest = single[key]
        parts = [name.part or (0, 1, 1) for name in names]
        starts, stops = ([rows * part[i] // part[2] for part in parts] for i in (0, 1))
        assert (starts[0], stops[-1]) == (0, rows)
        assert starts[1:] == stops[:-1]
        for name, start, stop in zip(names, starts, stops, strict=True):
            assert folder[f"{name.path}.weight"] == (stop - start, *rest), key
            assert name.norm == (not rest)


def thin(tensors):
    """Return random tensors with a model's rows and one column: converters only move rows."""
    draw = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(tensor.shape[:1] + (1,) * (tensor.ndim - 1), generator=draw)
        for key, tensor in tensors.items()
    }


def diffusers_weights(model, **config):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        tensors = getattr(diffusers, model)(**config).state_dict()
    return thin(tensors)


def assert_diffusers_reads(architecture, converter, tensors, constants=()):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = original_layout(denoiser(architecture), tensors) | dict(constants)
    converted = getattr(utils, f"convert_{converter}_transformer_checkpoint_to_diffusers")(original)
    assert converted.keys() == tensors.keys()
    assert [key for key in tensors if not torch.equal(converted[key], tensors[key])] == []


@pytest.mark.parametrize(
    ("architecture", "layout"), [(FLUX, "flux1_dev_bfl"), (CHROMA, "chroma_bfl")]
)
def test_the_table_holds_exactly_the_weights_of_the_single_file(architecture, layout):
    assert held(architecture).keys() == weights(layout).keys()


def test_the_table_holds_exactly_the_weights_of_the_folder():
    assert {f"{name.path}.weight" for name in denoiser(FLUX)} == weights(
        "flux1_dev_diffusers"
    ).keys()


def test_both_layouts_of_flux_have_the_same_shapes():
    assert_same_shapes(FLUX, weights("flux1_dev_bfl"), weights("flux1_dev_diffusers"))


@pytest.mark.peer
# diffusers' Chroma takes a class from where diffusers itself calls it deprecated.
@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "model", "converter", "config"),
    [
        (FLUX, "FluxTransformer2DModel", "flux", {"guidance_embeds": True}),
        (CHROMA, "ChromaTransformer2DModel", "chroma", {}),
        (
            FLUX2_KLEIN_4B,
            "Flux2Transformer2DModel",
            "flux2",
            {"num_layers": 5, "num_single_layers": 20, "guidance_embeds": False},
        ),
        (
            FLUX2_KLEIN_9B,
            "Flux2Transformer2DModel",
            "flux2",
            {"num_layers": 8, "num_single_layers": 24, "guidance_embeds": False},
        ),
        (FLUX2, "Flux2Transformer2DModel", "flux2", {}),
    ],
    ids=[architecture.id for architecture in ALL],
)
def test_diffusers_reads_our_single_file_as_its_own_model(architecture, model, converter, config):
    assert_diffusers_reads(architecture, converter, diffusers_weights(model, **config))


@pytest.mark.peer
@pytest.mark.parametrize("architecture", [FLUX, CHROMA], ids=lambda a: a.id)
def test_xlabs_names_hold_the_rows_that_diffusers_takes(architecture):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    places = {}
    for name in denoiser(architecture):
        for path, part in name.also:
            if ".processor." in path:
                places[f"{name.module}.lora_B.weight"] = (f"{path}.up.weight", part or (0, 1, 1))
    ups = {key: torch.rand(6, 1) for key, _ in places.values()}
    downs = {key.replace(".up.", ".down."): torch.rand(1, 1) for key in ups}
    converted = utils._convert_xlabs_flux_lora_to_diffusers({**downs, **ups})
    assert {key for key in converted if "lora_B" in key} == places.keys()
    for key, (path, (start, stop, of)) in places.items():
        assert torch.equal(converted[key], ups[path][6 * start // of : 6 * stop // of]), key


def test_comfyuis_linear1_qkv_is_linear1_without_the_mlp():
    names = {
        name.path.removeprefix("single_transformer_blocks.37."): (name.part, dict(name.also))
        for name in denoiser(FLUX)
        if name.original == "single_blocks.37.linear1"
    }
    alias = "single_blocks.37.linear1_qkv"
    assert {path: (part, also.get(alias)) for path, (part, also) in names.items()} == {
        "attn.to_q": ((0, 1, 7), (0, 1, 3)),
        "attn.to_k": ((1, 2, 7), (1, 2, 3)),
        "attn.to_v": ((2, 3, 7), (2, 3, 3)),
        "proj_mlp": ((3, 7, 7), None),
    }


def test_flux2_fuses_its_single_blocks_in_both_layouts():
    single = [name for name in denoiser(FLUX2) if name.module.startswith("transformer.single_tr")]
    assert all(name.part is None for name in single)


def test_flux2_takes_the_names_that_diffusers_writes_once_it_has_fused_them():
    also = dict(FLUX2.modules["transformer.transformer_blocks.7.attn.add_k_proj"].also)
    assert also == {
        "transformer_blocks.7.attn.to_added_qkv": (1, 2, 3),
        "sformer_blocks.7.attn.add_k_proj": None,
    }


@EACH
def test_only_the_last_modulation_is_swapped_and_nothing_is_transposed(architecture):
    names = denoiser(architecture)
    swapped = [] if architecture is CHROMA else ["transformer.norm_out.linear"]
    assert [name.module for name in names if name.swap] == swapped
    assert not any(name.transpose for name in names)


@EACH
def test_every_module_has_one_of_the_block_ids_fused_or_not(architecture):
    for name in denoiser(architecture):
        block = architecture.block(name.module)
        assert block in architecture.blocks
        if name.part is not None:
            assert architecture.block(f"transformer.{name.original}") == block
    assert set(architecture.text_blocks.values()) <= set(architecture.blocks)


def test_the_blocks_of_flux_are_those_of_lora_block_weight():
    assert len(FLUX.blocks) == 61
    assert FLUX.blocks[:4] == ("CLIP", "T5", "IN", "D00")
    assert FLUX.blocks[21:24] == ("D18", "S00", "S01")
    assert FLUX.blocks[-2:] == ("S37", "OUT")
    assert CHROMA.blocks == FLUX.blocks


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("transformer.time_text_embed.guidance_embedder.linear_2", "IN"),
        ("transformer.double_blocks.3.img_attn.qkv", "D03"),
        ("transformer.transformer_blocks.18.ff_context.net.2", "D18"),
        ("transformer.single_blocks.37.linear1", "S37"),
        ("transformer.single_transformer_blocks.7.proj_out", "S07"),
        ("transformer.norm_out.linear", "OUT"),
        ("transformer.proj_out", "OUT"),
        ("transformer.controlnet", "OTHER"),
    ],
)
def test_the_block_of_a_module(module, block):
    assert FLUX.block(module) == block


@EACH
def test_the_paths_of_all_layouts_begin_with_a_root(architecture):
    for name in denoiser(architecture):
        for path in (name.path, name.original, *(path for path, _ in name.also)):
            assert path.startswith(architecture.roots)
            assert path.replace(".", "_").startswith(architecture.roots)


@EACH
def test_no_two_modules_have_a_flat_name_in_common(architecture):
    assert set(architecture.flat.values()) == {*architecture.modules, *architecture.fused}


@pytest.mark.parametrize(
    ("module", "architecture"),
    [
        ("text_encoder.text_model.encoder.layers.11.mlp.fc2", FLUX),
        ("text_encoder_2.encoder.block.23.layer.1.DenseReluDense.wi_1", FLUX),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q", CHROMA),
    ],
)
def test_text_encoders_keep_their_names_in_the_single_file(module, architecture):
    name = architecture.modules[module]
    assert name.original == name.path
