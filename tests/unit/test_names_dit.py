"""Transformers of images: the tables hold every weight, where diffusers too finds it.

What holds for every table is tested here for those of videos too.
"""

import pytest
import torch

from lorakit.names.anima import ANIMA
from lorakit.names.auraflow import AURAFLOW
from lorakit.names.decoder import decoder
from lorakit.names.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from lorakit.names.ltx import LTX, LTX2, LTX_13B
from lorakit.names.lumina import LUMINA2, Z_IMAGE
from lorakit.names.pixart import PIXART
from lorakit.names.qwen_image import QWEN_IMAGE
from lorakit.names.wan import WAN, WAN_SMALL
from tests.layouts import original_layout
from tests.unit.test_names_flux import denoiser, diffusers_weights

ALL = (
    *(WAN_SMALL, WAN, HUNYUAN_VIDEO, HUNYUAN_IMAGE, LTX, LTX_13B, LTX2),
    *(QWEN_IMAGE, LUMINA2, Z_IMAGE, PIXART, AURAFLOW, ANIMA),
)
EACH = pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.id)
COSMOS = {"num_attention_heads": 16, "extra_pos_embed_type": None, "num_layers": 28}


def paths(architecture):
    """Return the paths of all modules by the component that a flat name tells."""
    for name in architecture.build():
        whole = [(name.path, None), (name.original, name.part), *name.also]
        yield name, [path for path, part in whole if part is None]


def claimed(architecture):
    return {name.path if name.bare else f"{name.path}.weight" for name in denoiser(architecture)}


def layers_and_norms(tensors):
    return {key for key in tensors if key.endswith(".weight")}


def assert_diffusers_reads(architecture, converter, tensors, constants=()):
    """Assert that diffusers makes its model of our single file.

    Args:
        architecture: whose table makes the single file.
        converter: name of diffusers' function.
        tensors: of the model.
        constants: what no table names, under the single file's names.
    """
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    original = original_layout(denoiser(architecture), tensors) | dict(constants)
    converted = getattr(utils, converter)(original)
    assert converted.keys() == tensors.keys()
    assert [key for key in tensors if not torch.equal(converted[key], tensors[key])] == []


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "model", "converter", "config"),
    [
        (LUMINA2, "Lumina2Transformer2DModel", "convert_lumina2_to_diffusers", {}),
        (
            Z_IMAGE,
            "ZImageTransformer2DModel",
            "convert_z_image_transformer_checkpoint_to_diffusers",
            {},
        ),
        (
            AURAFLOW,
            "AuraFlowTransformer2DModel",
            "convert_auraflow_transformer_checkpoint_to_diffusers",
            {},
        ),
        (
            ANIMA,
            "CosmosTransformer3DModel",
            "convert_cosmos_transformer_checkpoint_to_diffusers",
            COSMOS,
        ),
    ],
    ids=["lumina2", "z-image", "auraflow", "anima"],
)
def test_diffusers_reads_our_single_file_as_its_own_model(architecture, model, converter, config):
    tensors = diffusers_weights(model, **config)
    constants = {
        {"pos_embed.pos_embed": "positional_encoding"}.get(key, key): tensor
        for key, tensor in tensors.items()
        if key.endswith(("_token", "_tokens", "pos_embed.pos_embed"))
    }
    assert_diffusers_reads(architecture, converter, tensors, constants)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "model", "config"),
    [
        (QWEN_IMAGE, "QwenImageTransformer2DModel", {}),
        (LUMINA2, "Lumina2Transformer2DModel", {}),
        (Z_IMAGE, "ZImageTransformer2DModel", {}),
        (PIXART, "PixArtTransformer2DModel", {"caption_channels": 4096}),
        (AURAFLOW, "AuraFlowTransformer2DModel", {}),
    ],
    ids=["qwen-image", "lumina2", "z-image", "pixart", "auraflow"],
)
def test_the_table_holds_exactly_the_layers_and_norms_of_the_model(architecture, model, config):
    assert claimed(architecture) == layers_and_norms(diffusers_weights(model, **config))


@pytest.mark.peer
def test_the_table_of_anima_holds_those_of_the_model_and_of_its_adapter():
    adapter = {
        f"llm_adapter.{key}"
        for key in layers_and_norms(diffusers_weights("AnimaTextConditioner"))
        if key != "embed.weight"
    }
    model = layers_and_norms(diffusers_weights("CosmosTransformer3DModel", **COSMOS))
    assert claimed(ANIMA) == model | adapter


@pytest.mark.peer
def test_diffusers_reads_loras_of_anima_and_of_its_adapter_under_our_names():
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = {
        f"diffusion_model.{name.original}": name.also[0][0] if name.also else name.module
        for name in denoiser(ANIMA)
        if not name.norm
    }
    converted = utils._convert_non_diffusers_anima_lora_to_diffusers({key: key for key in names})
    assert {key: module for module, key in converted.items()} == names


def test_qwen_image_has_one_layout():
    assert all(name.original == name.path for name in denoiser(QWEN_IMAGE))


@pytest.mark.parametrize(
    ("architecture", "fused", "parts"),
    [
        (LUMINA2, "layers.25.attention.qkv", {"q": (0, 3, 5), "k": (3, 4, 5), "v": (4, 5, 5)}),
        (Z_IMAGE, "layers.29.attention.qkv", {"q": (0, 1, 3), "k": (1, 2, 3), "v": (2, 3, 3)}),
        (PIXART, "blocks.27.attn.qkv", {"q": (0, 1, 3), "k": (1, 2, 3), "v": (2, 3, 3)}),
        (PIXART, "blocks.27.cross_attn.kv_linear", {"k": (0, 1, 2), "v": (1, 2, 2)}),
    ],
)
def test_the_rows_of_a_fused_layer(architecture, fused, parts):
    held = [name for name in denoiser(architecture) if name.original == fused]
    assert {name.path.rpartition("to_")[2]: name.part for name in held} == parts


@pytest.mark.parametrize(
    ("architecture", "flat", "path"),
    [
        (QWEN_IMAGE, "transformer_blocks_0_img_mlp_net_0_proj", None),
        (LUMINA2, "noise_refiner_1_adaLN_modulation_1", "noise_refiner.1.norm1.linear"),
        (LUMINA2, "context_refiner_0_feed_forward_w3", "context_refiner.0.feed_forward.linear_3"),
        (LUMINA2, "final_layer_adaLN_modulation_1", "norm_out.linear_1"),
        (Z_IMAGE, "layers_0_attention_to_q", "layers.0.attention.to_q"),
        (Z_IMAGE, "layers_0_attention_out", "layers.0.attention.to_out.0"),
        (ANIMA, "blocks_27_cross_attn_output_proj", "transformer_blocks.27.attn2.to_out.0"),
        (ANIMA, "blocks_0_adaln_modulation_mlp_2", "transformer_blocks.0.norm3.linear_2"),
        (ANIMA, "llm_adapter_blocks_5_self_attn_o_proj", "llm_adapter.blocks.5.self_attn.o_proj"),
    ],
)
def test_a_name_as_kohya_and_musubi_write_it(architecture, flat, path):
    module = architecture.flat["transformer", flat]
    assert module == f"transformer.{path or 'transformer_blocks.0.img_mlp.net.0.proj'}"


@pytest.mark.peer
@pytest.mark.parametrize(
    ("model", "start"),
    [("Gemma2ForCausalLM", "model."), ("Qwen3ForCausalLM", "model."), ("LlamaModel", "")],
)
def test_a_decoder_holds_exactly_the_linear_layers_of_its_kind(model, start):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, model)
    with torch.device("meta"):
        tensors = kind(kind.config_class(num_hidden_layers=2)).state_dict()
    found = {key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.ndim > 1}
    names = list(decoder("text_encoder", 2))
    ours = {
        path
        for name in names
        for path in (name.path, *(path for path, _ in name.also))
        if path.startswith(f"{start}layers.")
    }
    assert found - {"lm_head", f"{start}embed_tokens"} == ours
    assert len(ours) == len(names)


def test_a_decoder_may_be_part_of_a_model_that_sees():
    module = QWEN_IMAGE.modules["text_encoder.model.layers.27.mlp.down_proj"]
    assert ("model.language_model.layers.27.mlp.down_proj", None) in module.also
    assert ("layers.27.mlp.down_proj", None) in module.also


@EACH
def test_every_module_has_one_of_the_block_ids_fused_or_not(architecture):
    for name in denoiser(architecture):
        block = architecture.block(name.module)
        assert block in architecture.blocks
        for path in (name.original, *(path for path, _ in name.also)):
            assert architecture.block(f"transformer.{path}") == block
    assert {architecture.block(name.module) for name in denoiser(architecture)} == {
        block for block in architecture.blocks if block != "BASE"
    }


@EACH
@pytest.mark.parametrize("module", ["transformer.controlnet", "transformer", "vae.blocks"])
def test_what_is_no_part_of_the_model_is_in_no_block(architecture, module):
    assert architecture.block(module) == "OTHER"


@pytest.mark.parametrize(
    ("architecture", "module", "block"),
    [
        (QWEN_IMAGE, "transformer.transformer_blocks.59.img_mod.1", "B59"),
        (LUMINA2, "transformer.layers.3.attention.qkv", "B03"),
        (Z_IMAGE, "transformer.context_refiner.1.attention.to_q", "IN"),
        (Z_IMAGE, "transformer.all_final_layer.2-1.linear", "OUT"),
        (PIXART, "transformer.blocks.27.cross_attn.kv_linear", "B27"),
        (AURAFLOW, "transformer.joint_transformer_blocks.3.ff.linear_1", "D03"),
        (AURAFLOW, "transformer.single_layers.31.modCX.1", "S31"),
        (AURAFLOW, "transformer.norm_out.linear", "OUT"),
        (ANIMA, "transformer.llm_adapter.blocks.5.mlp.0", "IN"),
    ],
)
def test_the_block_of_a_module(architecture, module, block):
    assert architecture.block(module) == block


@EACH
def test_the_paths_of_all_layouts_begin_with_a_root(architecture):
    for name in denoiser(architecture):
        for path in (name.path, name.original, *(path for path, _ in name.also)):
            assert path.startswith(architecture.roots)
            assert path.replace(".", "_").startswith(architecture.roots)


@EACH
def test_no_two_modules_have_a_flat_name_in_common(architecture):
    assert set(architecture.flat.values()) >= set(architecture.modules)
    owners = {}
    for name, whole in paths(architecture):
        for path in whole:
            key = name.component, path.replace(".", "_")
            assert owners.setdefault(key, name.module) == name.module


@EACH
def test_only_the_last_modulation_is_swapped_and_nothing_is_transposed(architecture):
    names = denoiser(architecture)
    swapped = architecture in (HUNYUAN_VIDEO, HUNYUAN_IMAGE, AURAFLOW)
    assert [n.module for n in names if n.swap] == ["transformer.norm_out.linear"] * swapped
    assert not any(name.transpose for name in names)
