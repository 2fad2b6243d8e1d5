"""Blocks, presets, weight vectors and elemental rules, as LoRA Block Weight has them."""

from collections import Counter

import pytest
import realnames

from lorakit.errors import SpecError
from lorakit.names.blocks import (
    block_ids,
    block_of,
    fits,
    parse_ids,
    parse_weights,
    weights_of,
)
from lorakit.names.elements import element_weight, parse_elements
from lorakit.names.families import ARCHITECTURES
from lorakit.names.generic import generic
from lorakit.names.presets import NAMES, parse_presets_file, preset_names
from lorakit.names.sd import SD1, SD2
from lorakit.names.sdxl import REFINER, SDXL

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
# The web UI's 17 values, in the order of its ids.
SD_17 = (
    "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
)
SDXL_12 = "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
PUBLISHED = {
    "sd1": {
        "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
        "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    },
    "sdxl": {
        "INS": "1,1,1,0,0,0,0,0,0,0,0,0",
        "IND": "1,0,0,1,1,0,0,0,0,0,0,0",
        "MIDD": "1,0,0,1,1,1,1,1,1,0,0,0",
        "OUTD": "1,0,0,0,0,0,1,1,1,0,0,0",
        "OUTS": "1,0,0,0,0,0,0,0,0,1,1,1",
    },
}


def ones(weights):
    return [block for block, weight in weights.items() if weight == 1]


@pytest.mark.parametrize(
    ("architecture", "count", "first", "last"),
    [(SD1, 26, "IN00", "OUT11"), (SD2, 26, "IN00", "OUT11"), (SDXL, 20, "IN00", "OUT08")],
)
def test_the_ids_are_the_web_uis_in_its_order(architecture, count, first, last):
    ids = block_ids(architecture)
    assert (len(ids), ids[0], ids[1], ids[-1]) == (count, "BASE", first, last)
    assert ids.index("MID") == count // 2
    assert len(set(ids)) == count
    assert set(architecture.attention) < set(ids)


def test_an_unknown_architecture_has_no_ids():
    assert block_ids(None) == ()
    assert block_of("lora_unet_embedder", None) == "OTHER"


def test_the_layers_of_an_unknown_architecture_are_numbered():
    names = ["lora_unet_blocks_0_mlp_1", "model.layers.11.self_attn.q_proj", "lm_head", "norm.2b.x"]
    assert [block_of(name, None) for name in names] == ["B00", "B11", "OTHER", "OTHER"]
    known = generic(names)
    assert known.blocks == ("BASE", *(f"B{i:02}" for i in range(12)), "OTHER")
    assert parse_ids("B03-B04,B11", known) == ("B03", "B04", "B11")
    assert block_of("lora_te1_text_model_encoder_layers_0_mlp_fc1", None) == "BASE"


@pytest.mark.parametrize("name", realnames.ARCHITECTURES)
def test_a_modules_block_is_the_number_of_its_block_in_the_single_file(name):
    sides = {"input_blocks": "IN", "output_blocks": "OUT"}
    for module in realnames.modules(name):
        found = block_of(f"{module.component}.{module.path}", BY_ID[name])
        side, number = module.original.split(".")[:2]
        if module.component != "unet":
            assert found == "BASE"
        elif side == "middle_block":
            assert found == "MID"
        else:
            assert found == f"{sides[side]}{int(number):02}"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_every_module_has_a_block_and_attention_is_where_the_short_vector_says(architecture):
    blocks = {module: block_of(module, architecture) for module in architecture.modules}
    # Files of Chroma have no CLIP and those of Flux.2 no text encoder that LoRAs are trained for.
    assert set(architecture.blocks) - set(blocks.values()) <= {"BASE", "CLIP"}
    assert set(blocks.values()) <= set(architecture.blocks)
    attention = {block for module, block in blocks.items() if ".attentions." in module}
    assert attention == set(architecture.attention)


@pytest.mark.parametrize(
    ("module", "sd", "sdxl"),
    [
        ("unet.conv_in", "IN00", "IN00"),
        ("unet.time_embedding.linear_1", "IN00", "IN00"),
        ("unet.add_embedding.linear_2", "IN00", "IN00"),
        ("unet.conv_norm_out", "OUT11", "OUT08"),
        ("unet.conv_out", "OUT11", "OUT08"),
        ("unet.down_blocks.0.downsamplers.0.conv", "IN03", "IN03"),
        ("unet.up_blocks.1.upsamplers.0.conv", "OUT05", "OUT05"),
        ("text_encoder_2.text_projection", "BASE", "BASE"),
        ("unet.something.else", "OTHER", "OTHER"),
    ],
)
def test_the_modules_between_the_blocks_have_a_block_too(module, sd, sdxl):
    assert (block_of(module, SD1), block_of(module, SDXL)) == (sd, sdxl)


def test_sdxl_keeps_its_transformers_where_they_are():
    count = Counter(
        block_of(module, SDXL) for module in SDXL.modules if module.endswith("attn1.to_q")
    )
    assert count == {
        "IN04": 2,
        "IN05": 2,
        "IN07": 10,
        "IN08": 10,
        "MID": 10,
        **{f"OUT{i:02}": 10 if i < 3 else 2 for i in range(6)},
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_weighs_every_block(architecture, name):
    if name not in preset_names(architecture):
        with pytest.raises(SpecError, match=r"there are NONE, ALL, ALL0\.5"):
            weights_of(name, architecture)
        return
    weights = weights_of(name, architecture)
    assert tuple(weights) == architecture.blocks
    assert set(weights.values()) <= {0.0, 0.5, 1.0}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_whole_presets_leave_no_block_out(architecture):
    assert set(weights_of("ALL", architecture).values()) == {1.0}
    assert set(weights_of("NONE", architecture).values()) == {0.0}
    assert set(weights_of("ALL0.5", architecture).values()) == {0.5}


@pytest.mark.parametrize("architecture", [SD1, SD2, SDXL, REFINER], ids=lambda a: a.id)
def test_the_two_sides_of_a_unet_leave_no_block_out(architecture):
    both = [ones(weights_of(name, architecture)) for name in ("INALL", "OUTALL")]
    assert both[0][0] == both[1][0] == "BASE"
    assert {*both[0], *both[1], "MID"} == set(architecture.blocks)
    assert set(both[0]) & set(both[1]) == {"BASE"}


@pytest.mark.parametrize(
    ("architecture", "order", "name"),
    [(SD1, SD_17, name) for name in PUBLISHED["sd1"]]
    + [(SD2, SD_17, name) for name in PUBLISHED["sd1"]]
    + [(SDXL, SDXL_12, name) for name in PUBLISHED["sdxl"]],
    ids=lambda value: value if isinstance(value, str) and len(value) < 8 else "",
)
def test_the_other_presets_are_the_published_ones(architecture, order, name):
    csv = PUBLISHED["sdxl" if architecture is SDXL else "sd1"][name]
    expected = [b for b, w in zip(order.split(), csv.split(","), strict=True) if w == "1"]
    assert ones(weights_of(name, architecture)) == expected
    assert weights_of(csv, architecture) == weights_of(name, architecture)


def test_a_preset_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(SpecError, match=r"'OUTX' is no preset for .*; there are NONE.*, MINE"):
        weights_of("OUTX", SD1, {"MINE": (1.0,) * 17})


@pytest.mark.parametrize(("architecture", "lengths"), [(SD1, (17, 26)), (SDXL, (12, 20))])
def test_a_vector_is_read_in_the_order_of_the_ids(architecture, lengths):
    orders = ("BASE", *architecture.attention), architecture.blocks
    for length, order in zip(lengths, orders, strict=True):
        assert len(order) == length
        values = [i / 100 for i in range(1, length + 1)]
        weights = parse_weights(",".join(map(str, values)), architecture)
        assert tuple(weights) == architecture.blocks
        assert [weights[block] for block in order] == values
        assert {weights[b] for b in architecture.blocks if b not in order} <= {0.0}


@pytest.mark.parametrize(
    ("architecture", "length"), [(SD1, 12), (SD1, 20), (SDXL, 17), (SDXL, 26), (SD2, 1), (SDXL, 61)]
)
def test_a_vector_of_a_wrong_length_is_refused_with_the_ids(architecture, length):
    with pytest.raises(SpecError) as caught:
        weights_of(",".join("1" * length) if length > 1 else "0.5", architecture)
    message = str(caught.value)
    assert f"found {length}" in message
    assert " ".join(architecture.blocks) in message
    assert " ".join(("BASE", *architecture.attention)) in message


@pytest.mark.parametrize("value", ["R", "U", "X", "X+0.2", "r"])
def test_values_that_are_drawn_for_plots_are_refused(value):
    with pytest.raises(SpecError, match="give numbers"):
        weights_of(",".join(["1"] * 16 + [value]), SD1)


@pytest.mark.parametrize("value", ["one", "", "nan", "inf", "-inf"])
def test_values_that_are_no_finite_numbers_are_refused(value):
    with pytest.raises(SpecError, match="expected"):
        weights_of(",".join(["1"] * 16 + [value]), SD1)


def test_weights_may_be_any_real_numbers():
    weights = weights_of(",".join(["-1.5", *["2"] * 16]), SD1)
    assert (weights["BASE"], weights["OUT11"], weights["IN00"]) == (-1.5, 2.0, 0.0)


@pytest.mark.parametrize("text", ["ALL", "1,1", "IN00"])
def test_blocks_of_an_unknown_architecture_are_refused(text):
    with pytest.raises(SpecError, match="architecture is not known"):
        weights_of(text, None)
    with pytest.raises(SpecError, match="architecture is not known"):
        parse_ids(text, None)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("MID", "MID"),
        ("M00", "MID"),
        ("OUT03-OUT06,MID", "MID OUT03 OUT04 OUT05 OUT06"),
        ("OUT06-OUT03", "OUT03 OUT04 OUT05 OUT06"),
        ("IN11-OUT00 BASE", "BASE IN11 MID OUT00"),
        ("in1, out3", "IN01 OUT03"),
        ("IN01,IN01", "IN01"),
    ],
)
def test_ids_and_ranges_come_in_the_order_of_the_architecture(text, ids):
    assert parse_ids(text, SD1) == tuple(ids.split())


@pytest.mark.parametrize("text", ["OUT12", "IN99-OUT01", "D00-D18", "IN01-", "encoder"])
def test_an_id_that_is_not_there_is_refused_with_those_that_are(text):
    with pytest.raises(SpecError, match=r"is no block here; the ids are BASE IN00"):
        parse_ids(text, SD1)


def test_no_ids_are_refused():
    with pytest.raises(SpecError, match="found none"):
        parse_ids(" , ", SD1)


def test_the_web_uis_file_of_presets_is_read_as_it_is():
    text = (
        "FACE:1,0,0,0,0,0,0,0,1,1,1,0,0,0,0,0,0\r\n"
        "# a comment: 1,2\n\nRANDOM:R,U,X\njust words\n  XL:1,1,1,1,1,1,1,1,1,1,1,0.5 \n"
    )
    found = parse_presets_file(text)
    assert sorted(found) == ["FACE", "XL"]
    assert ones(weights_of("FACE", SD1, found)) == ["BASE", "OUT03", "OUT04", "OUT05"]
    assert weights_of("XL", SDXL, found)["OUT05"] == 0.5
    with pytest.raises(SpecError, match="found 12"):
        weights_of("XL", SD1, found)
    assert fits(found["XL"], SDXL) and fits(found["XL"], REFINER) and not fits(found["XL"], SD1)


def test_a_users_preset_goes_before_a_shipped_one():
    assert ones(weights_of("ALL", SD1, {"ALL": (1.0, *[0.0] * 16)})) == ["BASE"]


IN05 = "unet.down_blocks.1.attentions.1"
OUT10 = "unet.up_blocks.3.attentions.1"
ATTN1 = "transformer_blocks.0.attn1.to_q"
ATTN2 = "transformer_blocks.0.attn2.to_k"
FF = "transformer_blocks.0.ff.net.0.proj"


def weight(module, rules, architecture=SD1, block_weight=1.0):
    return element_weight(module, block_weight, parse_elements(rules, architecture), architecture)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("IN05-OUT05:attn:0", {"attn1": 0, "attn2": 0, "ff": 1}),
        ("OUT05-IN05:attn2:0.5", {"attn1": 1, "attn2": 0.5, "ff": 1}),
        ("IN05:to_k:0.5", {"attn1": 1, "attn2": 0.5, "ff": 1}),
        ("IN05:ff to_q:2", {"attn1": 2, "attn2": 1, "ff": 2}),
        ("IN05:NOT attn:0", {"attn1": 1, "attn2": 1, "ff": 0}),
        (":attn:0", {"attn1": 0, "attn2": 0, "ff": 1}),
        ("IN05::0", {"attn1": 0, "attn2": 0, "ff": 0}),
        ("NOT IN05::0", {"attn1": 1, "attn2": 1, "ff": 1}),
        ("NOT IN00 MID:ff:-1", {"attn1": 1, "attn2": 1, "ff": -1}),
        (":attn:0, IN05:attn1:3", {"attn1": 3, "attn2": 0, "ff": 1}),
        ("IN05:attn1:3\n:attn:0", {"attn1": 0, "attn2": 0, "ff": 1}),
        ("ATTNDEEPOFF", {"attn1": 0, "attn2": 0, "ff": 1}),
    ],
)
def test_a_rule_replaces_the_blocks_weight_where_it_holds(rules, expected):
    modules = {"attn1": ATTN1, "attn2": ATTN2, "ff": FF}
    assert {k: weight(f"{IN05}.{m}", rules) for k, m in modules.items()} == expected


def test_out1_is_not_out10():
    assert weight(f"{OUT10}.{ATTN1}", "OUT01::0") == 1
    assert weight(f"{OUT10}.{ATTN1}", "OUT10::0") == 0


def test_elements_are_whole_words_of_the_web_uis_names():
    resnet = "unet.down_blocks.1.resnets.1"
    assert weight(f"{resnet}.conv1", "IN05:in_layers:0") == 0
    assert weight(f"{resnet}.time_emb_proj", "IN05:proj:0") == 1
    assert weight(f"{IN05}.proj_out", "IN05:proj:0") == 0
    assert weight(f"{IN05}.{FF}", "IN05:proj:0") == 0
    assert weight(f"{IN05}.{ATTN1}", "IN05:proj:0") == 1


def test_elements_may_be_words_of_diffusers_names():
    resnet = "unet.down_blocks.1.resnets.1"
    assert weight(f"{resnet}.time_emb_proj", "IN05:resnets:0") == 0
    assert weight(f"{IN05}.proj_out", "IN05:resnets:0") == 1


def test_text_encoders_have_elements_too():
    for component in ("text_encoder", "text_encoder_2"):
        block = f"{component}.text_model.encoder.layers.0"
        assert weight(f"{block}.mlp.fc1", "BASE:mlp:0", SDXL) == 0
        assert weight(f"{block}.self_attn.q_proj", "BASE:q_proj:0", SDXL) == 0
        assert weight(f"{block}.mlp.fc2", "BASE:fc1:0", SDXL) == 1


def test_without_rules_a_module_has_its_blocks_weight():
    assert element_weight(f"{IN05}.{ATTN1}", 0.3, (), SD1) == 0.3
    assert weight(f"{IN05}.{ATTN1}", "MID::0", block_weight=0.3) == 0.3


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("IN05:attn", "BLOCKS:ELEMENTS:WEIGHT"),
        (":::1", "BLOCKS:ELEMENTS:WEIGHT"),
        ("IN05:attn:much", "expected a number"),
        ("IN05:attn:nan", "finite"),
        ("IN25:attn:0", "the ids are BASE"),
        ("IN05:atn:0", "atn is in no layer's name"),
        (" , ", "found none"),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused(rules, message):
    with pytest.raises(SpecError, match=message):
        parse_elements(rules, SD1)


def test_rules_for_an_unknown_architecture_are_refused():
    with pytest.raises(SpecError, match="architecture is not known"):
        parse_elements(":attn:0", None)
