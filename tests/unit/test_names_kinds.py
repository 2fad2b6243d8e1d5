"""Kinds of layers, in every architecture and in the names of unknown models."""

import pytest

from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES
from lorakit.names.kinds import BOTH, OTHER, TRANSFORMER_KINDS, UNET_KINDS, kind_of, ordered
from lorakit.names.spelling import TEXT_ENCODERS

SINGLE = "transformer.single_transformer_blocks.7"


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "attn1"),
        ("unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0", "attn2"),
        ("unet.mid_block.attentions.0.transformer_blocks.3.ff.net.0.proj", "ff"),
        ("unet.up_blocks.0.resnets.1.conv_shortcut", "conv"),
        ("unet.up_blocks.0.resnets.1.conv1.bias", "conv"),
        ("unet.down_blocks.0.downsamplers.0.conv", "conv"),
        ("unet.conv_in", "conv"),
        ("unet.mid_block.attentions.0.proj_in", "proj"),
        ("unet.mid_block.attentions.0.norm", OTHER),
        ("unet.mid_block.resnets.0.time_emb_proj", OTHER),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", "attention"),
        ("transformer.double_blocks.0.img_attn.qkv", "attention"),
        ("transformer.transformer_blocks.0.ff_context.net.2", "mlp"),
        ("transformer.transformer_blocks.0.norm1_context.linear", "modulation"),
        ("transformer.transformer_blocks.0.img_mod.1", "modulation"),
        ("transformer.layers.3.adaLN_modulation.0", "modulation"),
        ("transformer.norm_out.linear", "modulation"),
        (f"{SINGLE}.proj_out", BOTH),
        (f"{SINGLE}.proj_mlp", "mlp"),
        ("transformer.single_blocks.7.linear1", BOTH),
        (f"{SINGLE}.attn.to_qkv_mlp_proj", BOTH),
        ("transformer.x_embedder", OTHER),
        ("transformer.t_embedder.mlp.0", OTHER),
        ("model.layers.3.self_attn.q_proj", "attention"),
        ("model.layers.3.mlp.up_proj", "mlp"),
        ("lora_unet_blocks_3_attn_to_q", "attention"),
    ],
)
def test_a_layer_has_the_kind_that_its_name_says(module: str, kind: str) -> None:
    assert kind_of(module) == kind


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: str(a.id))
def test_every_layer_of_every_architecture_has_a_kind(architecture: Architecture) -> None:
    """Only embedders, the last layer and what projects time are of no kind."""
    modules = [name.module for name in architecture.modules.values() if not name.norm]
    modules += list(architecture.fused)
    allowed = UNET_KINDS if architecture.denoiser == "unet" else TRANSFORMER_KINDS
    kinds = {module: kind_of(module) for module in modules}
    assert set(kinds.values()) <= {*allowed, OTHER, *TEXT_ENCODERS}
    others = [module for module, kind in kinds.items() if kind == OTHER]
    parts = ("embed", "proj", "_in", "final_layer.", "guidance_layer")
    assert all(any(part in module for part in parts) for module in others), others
    assert len(others) < 0.1 * len(modules)


def test_the_order_of_kinds_is_that_of_a_table() -> None:
    found = ordered(["text_encoder_2", "other", "ff", "attn1", "text_encoder", "ff"])
    assert found == ("attn1", "ff", "other", "text_encoder", "text_encoder_2")
