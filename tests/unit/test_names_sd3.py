"""Stable Diffusion 3: the tables hold every weight, where diffusers too finds it."""

import pytest

from lorakit.names.sd3 import SD3, SD3_LARGE
from tests.unit.test_names_flux import (
    assert_diffusers_reads,
    assert_same_shapes,
    denoiser,
    diffusers_weights,
    held,
    weights,
)

DUAL = range(13)
"""The blocks of SD 3.5 medium that have a second attention."""
EACH = pytest.mark.parametrize("architecture", [SD3, SD3_LARGE], ids=lambda a: a.id)


def second_attention(path):
    return ".attn2." in path and int(path.split(".")[1]) not in DUAL


def test_the_table_holds_exactly_the_weights_of_the_single_file():
    found = weights("sd35_medium_sai").keys()
    assert found <= held(SD3).keys()
    assert {key for key in held(SD3) if not second_attention(key)} == found


def test_the_table_holds_exactly_the_weights_of_the_folder():
    paths = {f"{name.path}.weight" for name in denoiser(SD3)}
    found = weights("sd35_medium_diffusers").keys()
    assert found <= paths
    assert {path for path in paths if not second_attention(path)} == found


def test_both_layouts_have_the_same_shapes():
    assert_same_shapes(SD3, weights("sd35_medium_sai"), weights("sd35_medium_diffusers"))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        (SD3, {"num_layers": 24}),
        (SD3, {"num_layers": 24, "qk_norm": "rms_norm", "dual_attention_layers": tuple(DUAL)}),
        (SD3_LARGE, {"num_layers": 38, "qk_norm": "rms_norm"}),
    ],
    ids=["sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_diffusers_reads_our_single_file_as_its_own_model(architecture, config):
    tensors = diffusers_weights("SD3Transformer2DModel", pos_embed_max_size=2, **config)
    constant = {"pos_embed": tensors["pos_embed.pos_embed"]}
    assert_diffusers_reads(architecture, "sd3", tensors, constant)


@EACH
def test_the_last_modulations_of_text_and_image_are_swapped(architecture):
    last = len(architecture.blocks) - 6
    assert {name.module for name in denoiser(architecture) if name.swap} == {
        "transformer.norm_out.linear",
        f"transformer.transformer_blocks.{last}.norm1_context.linear",
    }


@EACH
def test_every_module_has_one_of_the_block_ids_fused_or_not(architecture):
    for name in denoiser(architecture):
        block = architecture.block(name.module)
        assert block in architecture.blocks
        if name.part is not None:
            assert architecture.block(f"transformer.{name.original}") == block
    assert set(architecture.text_blocks.values()) <= set(architecture.blocks)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("transformer.pos_embed.proj", "IN"),
        ("transformer.time_text_embed.text_embedder.linear_1", "IN"),
        ("transformer.joint_blocks.3.x_block.attn2.qkv", "J03"),
        ("transformer.transformer_blocks.23.attn.add_q_proj", "J23"),
        ("transformer.norm_out.linear", "OUT"),
        ("transformer.controlnet", "OTHER"),
    ],
)
def test_the_block_of_a_module(module, block):
    assert SD3.block(module) == block


def test_the_blocks_of_sd3_are_traintrains():
    assert len(SD3.blocks) == 29
    assert SD3.blocks[:5] == ("CLIPG", "CLIPL", "T5", "IN", "J00")


@EACH
def test_the_paths_of_all_layouts_begin_with_a_root(architecture):
    for name in denoiser(architecture):
        for path in (name.path, name.original):
            assert path.startswith(architecture.roots)
            assert path.replace(".", "_").startswith(architecture.roots)


@EACH
def test_no_two_modules_have_a_flat_name_in_common(architecture):
    assert set(architecture.flat.values()) == {*architecture.modules, *architecture.fused}


@pytest.mark.parametrize(
    "module",
    [
        "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj",
        "text_encoder_3.encoder.block.23.layer.0.SelfAttention.o",
    ],
)
def test_text_encoders_keep_their_names_in_the_single_file(module):
    name = SD3.modules[module]
    assert (name.original, name.part) == (name.path, None)
