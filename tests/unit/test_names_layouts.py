"""Every weight of a checkpoint is found in every layout, in the same place for both of them.

The oracle is `examples/realnames.py`, which walks the real key lists and takes nothing from
lorakit.
"""

from collections import Counter

import pytest
import realnames

from lorakit.errors import FileFormatError
from lorakit.names.architectures import component_of, is_text_encoder
from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.families import ARCHITECTURES
from lorakit.names.sd import SD1
from lorakit.names.sdxl import REFINER, SDXL

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
UNET = realnames.UNET
FACTORS = pytest.mark.parametrize("factor", [1, 32])


def shape_at(shapes, target):
    shape = shapes[target.key]
    start, stop, of = target.part or (0, 1, 1)
    if target.transpose:
        shape = shape[::-1]
    return (shape[0] * stop // of - shape[0] * start // of, *shape[1:])


@FACTORS
@pytest.mark.parametrize("name", realnames.ARCHITECTURES)
def test_every_layer_is_found_where_the_single_file_holds_it(name, factor):
    shapes = realnames.single_file(name, factor=factor)
    index = index_checkpoint(shapes)
    assert (index.architecture, index.layout) == (BY_ID[name], "original")
    for module in realnames.modules(name, factor=factor):
        target = index.find(f"{module.component}.{module.path}")
        rows = target.part and target.part[:2]
        assert (target.key, rows) == (module.place.key, module.place.rows)
        assert shape_at(shapes, target) == module.shape


@FACTORS
@pytest.mark.parametrize("name", realnames.ARCHITECTURES)
def test_every_layer_is_a_whole_tensor_of_a_folder(name, factor):
    shapes = realnames.folder_layout(name, factor=factor)
    index = index_checkpoint(shapes)
    assert (index.architecture, index.layout) == (BY_ID[name], "diffusers")
    for module in realnames.modules(name, factor=factor):
        target = index.find(f"{module.component}.{module.path}")
        assert target.key == f"{module.component}/{module.path}.weight"
        assert target.part is None and not target.transpose
        assert shapes[target.key] == module.shape


@pytest.mark.parametrize(
    ("name", "single", "folder"),
    [
        ("sd1", "sd15_ldm", "sd15_unet_diffusers"),
        ("sdxl", "sdxl_sgm", "sdxl_unet_diffusers"),
    ],
)
def test_the_two_layouts_of_a_real_unet_map_one_to_one_with_equal_shapes(name, single, folder):
    original = {k: s for k, s in realnames.layout(single).items() if k.startswith(UNET)}
    diffusers = realnames.layout(folder)
    ours, theirs = index_checkpoint(original), index_checkpoint(diffusers)
    assert ours.architecture is theirs.architecture is BY_ID[name]
    assert ours.targets.keys() == theirs.targets.keys()
    assert all(
        original[ours.targets[m].key] == diffusers[theirs.targets[m].key] for m in ours.targets
    )
    for shapes, index in ((original, ours), (diffusers, theirs)):
        keys = [target.key for target in index.targets.values()]
        assert sorted(keys) == sorted(key for key in shapes if key.endswith(".weight"))


@pytest.mark.parametrize(
    ("name", "attention", "conv", "text"),
    [("sd1", 192, 86, 72), ("sd2", 192, 86, 138), ("sdxl", 722, 66, 264)],
)
def test_the_tables_hold_as_many_modules_as_kohya_trains(name, attention, conv, text):
    kinds = Counter()
    for module, at in BY_ID[name].modules.items():
        if at.norm:
            continue
        if ".encoder.layers." in module:
            kinds["text"] += 1
        elif ".attentions." in module:
            kinds["attention"] += 1
        elif any(part in module for part in (".resnets.", "samplers.")):
            kinds["conv"] += 1
    assert kinds == {"attention": attention, "conv": conv, "text": text}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_layers_are_those_that_a_lora_can_change(name):
    layers = index_checkpoint(realnames.single_file(name)).layers
    trained = {f"{m.component}.{m.path}" for m in realnames.modules(name)}
    assert trained <= layers
    assert {module.split(".")[1] for module in layers - trained} <= {
        "conv_in",
        "conv_out",
        "time_embedding",
        "add_embedding",
    }


def test_q_k_and_v_of_the_second_text_encoder_are_thirds_of_one_weight():
    index = index_checkpoint(realnames.layout("sdxl_sgm"))
    block = "text_encoder_2.text_model.encoder.layers.31.self_attn"
    for third, letter in enumerate("qkv"):
        target = index.find(f"{block}.{letter}_proj")
        assert target.key.endswith("resblocks.31.attn.in_proj_weight")
        assert target.part == (third, third + 1, 3)
    assert index.find(f"{block}.out_proj").part is None


def test_the_text_projection_lies_transposed_in_the_single_file_alone():
    single = index_checkpoint(realnames.layout("sdxl_sgm"))
    folder = index_checkpoint(realnames.folder_layout("sdxl"))
    module = "text_encoder_2.text_projection"
    assert single.find(module).transpose
    assert not folder.find(module).transpose
    assert "text_encoder_2.text_projection" not in single.layers | folder.layers


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_text_encoders_may_lack_text_model(name):
    whole, short = (
        {k.replace("text_model.", drop): s for k, s in shapes.items()}
        for shapes in (realnames.single_file(name), realnames.folder_layout(name))
        for drop in ("",)
    )
    for shapes in (whole, short):
        index = index_checkpoint(shapes)
        assert index.architecture is BY_ID[name]
        for module in realnames.modules(name):
            assert index.find(f"{module.component}.{module.path}") is not None


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_unet_alone_is_known_under_every_prefix(prefix):
    shapes = {
        k.replace(UNET, prefix): s
        for k, s in realnames.layout("sdxl_sgm").items()
        if k.startswith(UNET)
    }
    index = index_checkpoint(shapes)
    assert (index.architecture, index.layout) == (SDXL, "original")
    found = index.find("unet.mid_block.attentions.0.proj_in")
    assert found.key == f"{prefix}middle_block.1.proj_in.weight"
    assert not index.has_component("text_encoder")


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_sd_1_and_2_differ_in_how_proj_in_is_stored(name):
    shapes = {k: s for k, s in realnames.single_file(name, factor=32).items() if k.startswith(UNET)}
    assert index_checkpoint(shapes).architecture is BY_ID[name]


def test_sd2_may_be_stored_as_sdxl_is():
    shapes = {
        k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): s
        for k, s in realnames.single_file("sd2", factor=32).items()
    }
    index = index_checkpoint(shapes)
    assert index.architecture is BY_ID["sd2"]
    assert index.find("lora_te_text_model_encoder_layers_3_mlp_fc1") is not None


def refiner():
    shapes = {}
    for name in REFINER.modules.values():
        prefix = UNET if name.component == "unet" else "conditioner.embedders.0.model."
        shapes[prefix + name.original + name.parameter] = (12, 4)
    return shapes


def test_the_refiner_is_neither_sd2_nor_sdxl():
    index = index_checkpoint(refiner())
    assert index.architecture is REFINER
    found = index.find("lora_te_text_model_encoder_layers_0_self_attn_v_proj")
    assert found.part == (2, 3, 3)
    upsampler = index.find("unet.up_blocks.0.upsamplers.0.conv")
    assert upsampler.key == f"{UNET}output_blocks.2.1.conv.weight"


def test_averaged_copies_and_the_vae_are_no_layers():
    shapes = realnames.single_file("sd1", factor=32)
    more = {"model_ema.diffusion_modelmiddle_block1proj_inweight": (4, 4, 1, 1)}
    assert index_checkpoint(shapes | more).targets == index_checkpoint(shapes).targets
    assert not [m for m in index_checkpoint(shapes).targets if "first_stage" in m]


def test_a_layer_that_is_stored_under_two_names_is_refused():
    shapes = realnames.single_file("sd1", factor=32)
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    twice = shapes | {key.replace("text_model.", ""): shapes[key]}
    with pytest.raises(FileFormatError, match=r"are both text_encoder\.text_model"):
        index_checkpoint(twice)


def test_an_unknown_weight_of_a_known_model_has_its_own_name():
    shapes = realnames.single_file("sd1", factor=32)
    index = index_checkpoint(shapes | {f"{UNET}adapter.fuser.weight": (8, 8)})
    assert index.architecture is SD1
    for name in ("lora_unet_adapter_fuser", "diffusion_model.adapter.fuser", "unet.adapter.fuser"):
        assert index.find(name).key == f"{UNET}adapter.fuser.weight"


UNKNOWN = {
    "strange_blocks.0.img_attn.qkv.weight": (48, 16),
    "stranger_blocks.0.linear1.weight": (96, 16),
    "strange_blocks.0.img_attn.norm.query_norm.scale": (16,),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer/"])
@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_strange_blocks_0_img_attn_qkv",
        "diffusion_model.strange_blocks.0.img_attn.qkv",
        "transformer.strange_blocks.0.img_attn.qkv",
        "base_model.model.strange_blocks.0.img_attn.qkv",
        "strange_blocks.0.img_attn.qkv",
    ],
)
def test_a_model_that_no_table_knows_is_found_by_its_own_names(prefix, name):
    index = index_checkpoint({prefix + key: shape for key, shape in UNKNOWN.items()})
    assert index.architecture is None
    assert index.find(name).key == f"{prefix}strange_blocks.0.img_attn.qkv.weight"


def test_one_text_encoder_is_never_taken_for_another():
    shapes = {f"text_encoder/encoder.layers.0.mlp.fc{i}.weight": (4, 4) for i in (1, 2)}
    shapes |= {f"transformer/{key}": shape for key, shape in UNKNOWN.items()}
    index = index_checkpoint(shapes)
    assert index.find("lora_te1_text_model_encoder_layers_0_mlp_fc1") is not None
    assert index.find("lora_te2_text_model_encoder_layers_0_mlp_fc1") is None
    assert index.find("lora_unet_encoder_layers_0_mlp_fc1") is None


def test_a_language_model_is_found_by_its_own_names():
    index = index_checkpoint({"model.layers.0.self_attn.q_proj.weight": (8, 8)})
    found = index.find("base_model.model.model.layers.0.self_attn.q_proj")
    assert found.key == "model.layers.0.self_attn.q_proj.weight"


def test_a_name_that_is_not_there_has_a_closest_one():
    index = index_checkpoint(realnames.layout("sd15_ldm"))
    assert index.find("unet.mid_block.attentions.0.proj_on") is None
    assert index.suggestions("unet.mid_block.attentions.0.proj_on") == [
        "unet.mid_block.attentions.0.proj_in"
    ]


def test_an_empty_checkpoint_has_no_layers():
    index = index_checkpoint({})
    assert (index.architecture, index.layout, dict(index.targets)) == (None, "generic", {})


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_no_two_modules_of_an_architecture_share_a_name(architecture):
    names = architecture.build()
    assert len(architecture.modules) == len(names)
    places = {(name.component, name.original, name.part) for name in names}
    assert len(places) == len(names)
    assert set(architecture.flat.values()) == {*architecture.modules, *architecture.fused}


@pytest.mark.parametrize(
    ("module", "component"),
    [
        ("unet.conv_in", "unet"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder"),
        ("lora_te2_text_projection", "text_encoder_2"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "unet"),
        ("blocks.0.attn", ""),
    ],
)
def test_the_component_of_a_name_in_any_spelling(module, component):
    assert component_of(module) == component
    assert is_text_encoder(module) == component.startswith("text_encoder")
