"""Every spelling of a LoRA key is read; every dialect that is written is read back."""

import pytest
import realnames
import synthetic

from lorakit.names.dialects import DIALECTS, format_key, parse_key, resolve
from lorakit.names.families import ARCHITECTURES
from lorakit.names.flux import FLUX
from lorakit.names.lorakeys import holds_lora, read_keys
from lorakit.names.sd import SD1, SD2
from lorakit.names.sdxl import REFINER, SDXL

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def modules(name, *kinds):
    return [m for m in realnames.modules(name) if not kinds or m.kind in kinds]


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
@pytest.mark.parametrize("kinds", [(), ("attention",), ("attention", "conv")], ids=str)
@pytest.mark.parametrize("name", realnames.ARCHITECTURES)
def test_every_module_resolves_in_every_dialect(name, kinds, dialect):
    # A PEFT file holds one component.
    chosen = [m for m in modules(name, *kinds) if dialect != "peft" or m.component == "unet"]
    raws = {synthetic.spelled(m, name, dialect): f"{m.component}.{m.path}" for m in chosen}
    shapes = {
        synthetic.spelled(m, name, dialect): (4, m.shape[1], *([1, 1] * (len(m.shape) == 4)))
        for m in chosen
    }
    found = resolve(raws, shapes, {})
    assert found.architecture is BY_ID[name]
    assert found.modules == raws
    same = dialect == "kohya-diffusers" and name != "sdxl"
    assert found.dialect == ("kohya" if same else dialect)


@pytest.mark.parametrize("dialect", synthetic.DIALECTS)
@pytest.mark.parametrize("name", realnames.ARCHITECTURES)
def test_every_module_is_written_as_the_dialect_spells_it(name, dialect):
    peft = dialect in ("diffusers", "peft")
    suffix = ".lora_A.weight" if peft else ".lora_down.weight"
    for module in realnames.modules(name):
        canonical = f"{module.component}.{module.path}"
        key = format_key(canonical, "down", dialect=dialect, architecture=BY_ID[name])
        assert key == synthetic.spelled(module, name, dialect) + suffix


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_refiner_survives_the_round_trip(dialect):
    unet = [m for m in REFINER.modules if m.startswith("unet.")]
    text = [m for m in REFINER.modules if m not in unet]
    chosen = unet if dialect == "peft" else unet + text
    keys = [format_key(m, "up", dialect=dialect, architecture=REFINER) for m in chosen]
    found = resolve([parse_key(key).raw for key in keys])
    assert (found.architecture, found.dialect) == (REFINER, dialect)
    assert sorted(found.modules.values()) == sorted(chosen)


@pytest.mark.parametrize(
    ("role", "suffixes"),
    [
        (
            "down",
            ".lora_down.weight .lora_down .lora_A.weight .lora_A.default.weight .lora_A.default "
            ".lora_A .lora.down.weight .lora_linear_layer.down.weight",
        ),
        (
            "up",
            ".lora_up.weight .lora_up .lora_B.weight .lora_B.default.weight .lora_B.default "
            ".lora_B .lora.up.weight .lora_linear_layer.up.weight",
        ),
        ("mid", ".lora_mid.weight .lora_mid"),
        ("alpha", ".alpha"),
    ],
)
def test_every_suffix_of_a_plain_lora_is_read(role, suffixes):
    for suffix in suffixes.split():
        for raw in (f"unet.{Q}", "lora_unet_" + Q.replace(".", "_"), f"base_model.model.{Q}"):
            found = parse_key(raw + suffix)
            assert (found.raw, found.role, found.kind) == (raw, role, "lora"), suffix


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [
        (
            "dora",
            ".dora_scale .lora_magnitude_vector .lora_magnitude_vector.weight "
            ".lora_magnitude_vector.default.weight .magnitude",
        ),
        ("loha", ".hada_w1_a .hada_w1_b .hada_w2_a .hada_w2_b .hada_t1 .hada_t2"),
        ("lokr", ".lokr_w1 .lokr_w2 .lokr_w1_a .lokr_w2_b .lokr_t2"),
        ("glora", ".a1.weight .a2.weight .b1.weight .b2.weight .bm.weight"),
        ("oft", ".oft_blocks .oft_diag .oft_R.weight .oft_R.default.weight .boft_R .boft_s"),
        ("ia3", ".on_input .ia3_l"),
        ("full", ".diff .w_norm"),
        ("set", ".set_weight"),
        ("reshape", ".reshape_weight"),
        ("sparse", ".bias_indices .bias_values .bias_size"),
        ("bias", ".diff_b .b_norm .lora_B.bias .lora_B.default.bias .lora_up.bias"),
    ],
)
def test_other_adapters_are_recognised_by_kind(kind, suffixes):
    for suffix in suffixes.split():
        found = parse_key(f"lora_unet_mid_block_attentions_0_proj_in{suffix}")
        assert found is not None, suffix
        assert found.kind == kind, suffix
        assert found.raw == "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "key",
    [
        f"unet.{Q}.weight",
        "lora_unet_x.lora_sideways.weight",
        "model.diffusion_model.out.2.bias",
        "lora_down.weight",
        ".alpha",
        "unet:0:up",
        "",
    ],
)
def test_a_key_that_nobody_claims_is_none(key):
    assert parse_key(key) is None


def test_embedded_textual_inversions_are_recognised():
    assert parse_key("bundle_emb.cat.string_to_param.*").kind == "embedding"


@pytest.mark.parametrize(
    ("key", "module"),
    [
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.out_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        ),
        (
            "text_encoder.encoder.layers.3.mlp.fc1.lora_A.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        ),
        (
            "base_model.model.encoder.layers.3.mlp.fc1.lora_A.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        ),
        (
            "base_model.model.text_model.encoder.layers.3.mlp.fc1.lora_A.default.weight",
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        ),
        (
            "unet.base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
            "unet.mid_block.attentions.0.proj_in",
        ),
        (
            "unet.input_blocks.1.1.proj_in.lora_down.weight",
            "unet.down_blocks.0.attentions.0.proj_in",
        ),
        (
            "clip_l.text_model.encoder.layers.0.mlp.fc2.lora_down.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
        ),
        (
            "lycoris_mid_block_attentions_0_proj_in.lora_down.weight",
            "unet.mid_block.attentions.0.proj_in",
        ),
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc2.lora_down.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
        ),
    ],
)
def test_rarer_spellings_resolve(key, module):
    raw = parse_key(key).raw
    assert resolve([raw]).modules == {raw: module}


@pytest.mark.parametrize(
    ("raws", "expected"),
    [
        (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q"], SDXL),
        (["unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"], SDXL),
        (["unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q"], SDXL),
        (["lora_unet_input_blocks_7_1_transformer_blocks_0_attn1_to_q"], SDXL),
        (["diffusion_model.input_blocks.7.1.transformer_blocks.0.attn1.to_q"], SD1),
        (["lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"], SDXL),
        (["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], SD1),
        (["lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"], SD1),
        (["lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], SDXL),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1"], SD1),
        (["lora_te_text_model_encoder_layers_12_mlp_fc1"], SD2),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1"], SDXL),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1"], SDXL),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], SDXL),
        (["lora_unet_double_blocks_0_img_attn_qkv"], FLUX),
        (
            [
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_unet_double_blocks_0_img_attn_qkv",
            ],
            FLUX,
        ),
        (["base_model.model.model.layers.0.self_attn.q_proj"], None),
        ([], None),
    ],
)
def test_a_few_names_tell_the_architecture(raws, expected):
    assert resolve(raws).architecture is expected


MIDDLE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        ({}, {}, SD1),
        ({MIDDLE: (4, 8, 1, 1)}, {}, SD1),
        ({MIDDLE: (4, 8)}, {}, SD2),
        ({MIDDLE: (4, 8)}, {"ss_base_model_version": "sdxl_base_v1-0"}, SDXL),
        ({MIDDLE: (4, 8, 1, 1)}, {"ss_v2": "True"}, SD2),
        ({}, {"ss_v2": "False"}, SD1),
        ({}, {"ss_base_model_version": "sd_v1"}, SD1),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, SD2),
        ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, SDXL),
        ({}, {"ss_base_model_version": "flux1"}, SD1),
    ],
)
def test_where_names_fit_several_metadata_then_dimensions_decide(shapes, metadata, expected):
    assert resolve([MIDDLE], shapes, metadata).architecture is expected


def test_metadata_never_overrules_the_names():
    raw = "lora_unet_down_blocks_0_attentions_0_proj_in"
    hint = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert resolve([raw], {raw: (4, 8)}, hint).architecture.id in ("sd1", "sd2")


def test_the_answer_does_not_depend_on_the_order():
    raws = [synthetic.spelled(m, "sdxl", "kohya") for m in modules("sdxl")]
    mixed = raws + [synthetic.spelled(m, "sdxl", "diffusers") for m in modules("sdxl")[:20]]
    first, second = resolve(mixed), resolve(reversed(mixed))
    assert (first, list(first.modules)) == (second, list(second.modules))
    assert first.dialect == "kohya"


def test_two_spellings_of_one_module_are_both_kept():
    module = modules("sdxl", "attention")[0]
    raws = [synthetic.spelled(module, "sdxl", d) for d in ("kohya", "kohya-diffusers")]
    found = resolve(raws, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    assert set(found.modules) == set(raws)
    assert set(found.modules.values()) == {f"unet.{module.path}"}


def test_an_unknown_module_keeps_its_own_name():
    raws = [synthetic.spelled(m, "sd1", "kohya") for m in modules("sd1")] + ["lora_unet_extra"]
    found = resolve(raws)
    assert found.architecture is SD1
    assert found.modules["lora_unet_extra"] == "lora_unet_extra"


@pytest.mark.parametrize(
    ("raw", "dialect", "key"),
    [
        ("lora_unet_double_blocks_0_a", "kohya", "lora_unet_double_blocks_0_a.lora_up.weight"),
        ("diffusion_model.blocks.0.a", "kohya", "lora_unet_blocks_0_a.lora_up.weight"),
        ("diffusion_model.blocks.0.a", "comfyui", "diffusion_model.blocks.0.a.lora_up.weight"),
        ("transformer.blocks.0.a", "diffusers", "transformer.blocks.0.a.lora_B.weight"),
        ("transformer.blocks.0.a", "peft", "base_model.model.blocks.0.a.lora_B.weight"),
        (
            "base_model.model.model.layers.0.a",
            "peft",
            "base_model.model.model.layers.0.a.lora_B.weight",
        ),
        ("lora_te2_encoder_a", "kohya", "lora_te2_encoder_a.lora_up.weight"),
    ],
)
def test_modules_of_an_unknown_architecture_are_written_by_their_own_names(raw, dialect, key):
    assert format_key(raw, "up", dialect=dialect, architecture=None) == key


def test_the_keys_of_a_file_are_grouped_by_module():
    raw = "lora_unet_" + Q.replace(".", "_")
    shapes = {
        f"{raw}.lora_down.weight": (4, 320),
        f"{raw}.lora_up.weight": (320, 4),
        f"{raw}.alpha": (),
        f"unet.{Q}.lora_A.weight": (4, 320),
        f"unet.{Q}.lora_B.weight": (320, 4),
        "stray": (3,),
    }
    found = read_keys(shapes, {})
    assert found.unclaimed == ("stray",)
    first, second = found.modules[f"unet.{Q}"]
    assert (first.raw, second.raw) == (raw, f"unet.{Q}")
    assert set(first.keys) == {"down", "up", "alpha"}
    assert first.kinds == {"lora"}


def test_one_name_with_two_kinds_of_suffix_loses_no_key():
    shapes = {
        f"unet.{Q}.{suffix}.weight": (4, 4)
        for suffix in ("lora_A", "lora_B", "lora_down", "lora_up")
    }
    spellings = read_keys(shapes, {}).modules[f"unet.{Q}"]
    assert sorted(key for keys in spellings for key in keys.keys.values()) == sorted(shapes)


def test_the_kinds_of_a_module_are_told():
    raw = "lora_unet_mid_block_attentions_0_proj_in"
    keys = {f"{raw}.lora_down.weight": (4, 8), f"{raw}.dora_scale": (8, 1), f"{raw}.alpha": ()}
    (spelling,) = read_keys(keys, {}).modules["unet.mid_block.attentions.0.proj_in"]
    assert spelling.kinds == {"lora", "dora"}


def test_a_checkpoint_is_no_lora():
    assert not holds_lora(realnames.layout("sdxl_sgm"))
    assert not holds_lora({"vocoder.act.alpha": (), "decoder.a1.weight": (), "out.weight": ()})
    assert not holds_lora({})


def test_a_lora_is_a_lora_by_its_factors_or_because_every_key_is_an_adapters():
    assert holds_lora({"lora_unet_x.lora_down.weight": (), "stray": ()})
    assert holds_lora({"lora_unet_x.hada_w1_a": (), "lora_unet_x.alpha": ()})
    assert holds_lora({f"lora_unet_x.{part}.weight": () for part in ("a1", "a2", "b1", "b2")})
    assert not holds_lora({"lora_unet_x.alpha": ()})
