"""Transformers of videos, and HunyuanImage: the tables hold what diffusers finds there."""

import pytest

from lorakit.names.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from lorakit.names.ltx import LTX, LTX2, LTX_13B
from lorakit.names.wan import WAN, WAN_SMALL
from tests.unit.test_names_dit import assert_diffusers_reads, claimed, layers_and_norms
from tests.unit.test_names_flux import denoiser, diffusers_weights

FROM_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
SMALL = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
VACE, SMALL_VACE = {}, SMALL | {"vace_layers": list(range(0, 30, 2))}
BIG = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
SPEAKING = dict.fromkeys(
    ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True
)
IMAGE = {"use_meanflow": True, "guidance_embeds": True, "text_embed_2_dim": 1472}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "model", "config"),
    [
        (WAN, "WanTransformer3DModel", {}),
        (WAN, "WanTransformer3DModel", FROM_IMAGE),
        (WAN, "WanVACETransformer3DModel", VACE),
        (WAN_SMALL, "WanTransformer3DModel", SMALL),
        (WAN_SMALL, "WanVACETransformer3DModel", SMALL_VACE),
    ],
    ids=["wan", "wan-from-image", "wan-vace", "wan-small", "wan-small-vace"],
)
def test_diffusers_reads_our_wan_as_its_own(architecture, model, config):
    tensors = diffusers_weights(model, **config)
    converter = "convert_wan_transformer_to_diffusers"
    assert_diffusers_reads(architecture, converter, tensors)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "plain", "vace"),
    [
        (WAN, FROM_IMAGE, VACE | FROM_IMAGE),
        (WAN_SMALL, SMALL | FROM_IMAGE, SMALL_VACE | FROM_IMAGE),
    ],
    ids=["wan", "wan-small"],
)
def test_the_table_of_wan_holds_no_more_than_its_models(architecture, plain, vace):
    tensors = diffusers_weights("WanTransformer3DModel", **plain) | diffusers_weights(
        "WanVACETransformer3DModel", **vace
    )
    tables = {key for key in tensors if key.endswith("scale_shift_table")}
    assert claimed(architecture) == layers_and_norms(tensors) | tables


@pytest.mark.peer
def test_diffusers_reads_our_hunyuan_video_as_its_own():
    tensors = diffusers_weights("HunyuanVideoTransformer3DModel", guidance_embeds=True)
    assert claimed(HUNYUAN_VIDEO) == layers_and_norms(tensors)
    converter = "convert_hunyuan_video_transformer_to_diffusers"
    assert_diffusers_reads(HUNYUAN_VIDEO, converter, tensors)


@pytest.mark.peer
def test_the_table_holds_exactly_the_layers_and_norms_of_hunyuan_image():
    tensors = diffusers_weights("HunyuanImageTransformer2DModel", **IMAGE)
    assert claimed(HUNYUAN_IMAGE) == layers_and_norms(tensors)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("architecture", "config"), [(LTX, {}), (LTX_13B, BIG)], ids=["ltx", "ltx-13b"]
)
def test_diffusers_reads_our_ltx_as_its_own(architecture, config):
    tensors = diffusers_weights("LTXVideoTransformer3DModel", **config)
    tables = {key: tensor for key, tensor in tensors.items() if key.endswith("table")}
    assert claimed(architecture) == layers_and_norms(tensors)
    converter = "convert_ltx_transformer_checkpoint_to_diffusers"
    assert_diffusers_reads(architecture, converter, tensors, tables)


@pytest.mark.peer
def test_diffusers_reads_our_ltx2_as_its_own():
    tensors = diffusers_weights("LTX2VideoTransformer3DModel")
    tables = {
        key.replace(
            "video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"
        ).replace(
            "audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"
        ): tensor
        for key, tensor in tensors.items()
        if key.endswith("table")
    }
    assert_diffusers_reads(LTX2, "convert_ltx2_transformer_to_diffusers", tensors, tables)


@pytest.mark.peer
def test_the_table_of_ltx2_holds_exactly_the_layers_and_norms_of_2_3():
    tensors = diffusers_weights("LTX2VideoTransformer3DModel", **SPEAKING)
    assert claimed(LTX2) == layers_and_norms(tensors)


@pytest.mark.peer
def test_diffusers_reads_loras_of_ltx2_under_our_names():
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = {f"diffusion_model.{name.original}": name.module for name in denoiser(LTX2)}
    converted = utils._convert_non_diffusers_ltx2_lora_to_diffusers({key: key for key in names})
    assert {key: module for module, key in converted.items()} == names


@pytest.mark.parametrize(
    ("architecture", "flat", "path"),
    [
        (WAN, "blocks_39_self_attn_q", "blocks.39.attn1.to_q"),
        (WAN, "blocks_0_cross_attn_v_img", "blocks.0.attn2.add_v_proj"),
        (WAN, "blocks_0_ffn_0", "blocks.0.ffn.net.0.proj"),
        (WAN_SMALL, "head_head", "proj_out"),
        (HUNYUAN_VIDEO, "double_blocks_0_img_mlp_fc1", "transformer_blocks.0.ff.net.0.proj"),
        (
            HUNYUAN_IMAGE,
            "double_blocks_19_txt_mod_linear",
            "transformer_blocks.19.norm1_context.linear",
        ),
        (
            HUNYUAN_IMAGE,
            "single_blocks_39_modulation_linear",
            "single_transformer_blocks.39.norm.linear",
        ),
        (LTX, "transformer_blocks_27_attn2_to_out_0", "transformer_blocks.27.attn2.to_out.0"),
    ],
)
def test_a_name_as_kohya_and_musubi_write_it(architecture, flat, path):
    assert architecture.flat["transformer", flat] == f"transformer.{path}"


@pytest.mark.parametrize(
    ("path", "comfyui", "part"),
    [
        ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", (1, 2, 3)),
        ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", None),
        ("transformer_blocks.0.attn.norm_q", "double_blocks.0.img_attn.norm.query_norm", None),
        ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2", None),
        ("transformer_blocks.0.norm1.linear", "double_blocks.0.img_mod.lin", None),
        ("single_transformer_blocks.0.norm.linear", "single_blocks.0.modulation.lin", None),
        ("single_transformer_blocks.0.attn.norm_k", "single_blocks.0.norm.key_norm", None),
        (
            "context_embedder.token_refiner.refiner_blocks.1.attn.to_v",
            "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
            (2, 3, 3),
        ),
        (
            "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.in_layer",
            None,
        ),
        (
            "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.t_embedder.out_layer",
            None,
        ),
    ],
)
@pytest.mark.parametrize("architecture", [HUNYUAN_VIDEO, HUNYUAN_IMAGE], ids=lambda a: a.id)
def test_comfyui_names_hunyuan_as_it_names_flux(architecture, path, comfyui, part):
    assert (comfyui, part) in architecture.modules[f"transformer.{path}"].also


def test_tencents_code_of_hunyuan_image_takes_the_fused_layers_apart():
    block = "transformer.single_transformer_blocks.39"
    for path, apart in {
        "attn.to_v": "linear1_v",
        "proj_mlp": "linear1_mlp",
        "proj_out": "linear2.fc",
    }.items():
        also = HUNYUAN_IMAGE.modules[f"{block}.{path}"].also
        assert (f"single_blocks.39.{apart}", None) in also


@pytest.mark.parametrize(
    ("architecture", "module", "block"),
    [
        (WAN, "transformer.blocks.39.ffn.0", "B39"),
        (WAN, "transformer.vace_blocks.7.after_proj", "B35"),
        (WAN_SMALL, "transformer.vace_blocks.14.attn1.to_q", "B28"),
        (WAN, "transformer.head.head", "OUT"),
        (HUNYUAN_VIDEO, "transformer.double_blocks.19.img_attn_qkv", "D19"),
        (HUNYUAN_VIDEO, "transformer.single_transformer_blocks.7.proj_mlp", "S07"),
        (
            HUNYUAN_VIDEO,
            "transformer.txt_in.individual_token_refiner.blocks.0.self_attn_qkv",
            "IN",
        ),
        (LTX_13B, "transformer.transformer_blocks.47.ff.net.2", "B47"),
        (LTX2, "transformer.audio_proj_out", "OUT"),
    ],
)
def test_the_block_of_a_module(architecture, module, block):
    assert architecture.block(module) == block
