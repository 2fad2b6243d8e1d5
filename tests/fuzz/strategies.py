"""Files as an enemy makes them: mostly right, so that they get far, and wrong somewhere."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorakit.tensorfile.header import DTYPE_BITS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ANY_TEXT = st.text(max_size=12) | st.sampled_from(
    ["\0", "\ud800", "..", "../x", "[/red]", "\x1b[2J"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**53, 2**60, 2**63, 2**64]) | JSON

_DTYPES = (
    *(torch.float16, torch.float32, torch.bfloat16, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool),
    torch.complex64,
)
_USUAL = (torch.float16, torch.float32)
_VALUES = (0.0, 1.0, -0.5, 1e-8, 6e4, 3e38, float("inf"), float("nan"))
_WEIGHTS = (1.0, 1.0, 1.0, -0.5, 0.25)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor: usually of the shape that is asked for, in fp16 or fp32, of plain values."""
    if shape is None or draw(st.integers(0, 19)) == 0:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    odd = draw(st.integers(0, 9)) == 0
    dtype = draw(st.sampled_from(_DTYPES if odd else _USUAL))
    first, second = (draw(st.sampled_from(_VALUES if odd else _WEIGHTS)) for _ in range(2))
    # Different everywhere, and of no special rank.
    grid = torch.arange(float(torch.Size(shape).numel())).mul(0.7).sin().reshape(shape)
    return (first * grid + second).to(dtype)


LAYERS = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer.transformer_blocks.0.attn.to_q",
    "transformer.single_transformer_blocks.0.attn.to_q",
    "base_model.model.unet.down_blocks.0.attentions.0.proj_in",
    "diffusion_model.double_blocks.0.img_attn.qkv",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1",
    "diffusion_model.blocks.0.self_attn.q",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    "some.layer",
)
_M, _N, _R = 6, 4, 2
KINDS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "kohya": {"lora_up.weight": (_M, _R), "lora_down.weight": (_R, _N), "alpha": ()},
    "conv": {"lora_up.weight": (_M, _R, 1, 1), "lora_down.weight": (_R, _N, 3, 3), "alpha": ()},
    "tucker": {
        "lora_up.weight": (_M, _R, 1, 1),
        "lora_mid.weight": (_R, _R, 3, 3),
        "lora_down.weight": (_R, _N, 1, 1),
    },
    "peft": {"lora_A.weight": (_R, _N), "lora_B.weight": (_M, _R)},
    "peft bias": {"lora_A.weight": (_R, _N), "lora_B.weight": (_M, _R), "lora_B.bias": (_M,)},
    "dora": {"lora_up.weight": (_M, _R), "lora_down.weight": (_R, _N), "dora_scale": (_M, 1)},
    "dora in": {"lora_up.weight": (_M, _R), "lora_down.weight": (_R, _N), "dora_scale": (1, _N)},
    "loha": {
        **{"hada_w1_a": (_M, _R), "hada_w1_b": (_R, _N), "hada_w2_a": (_M, _R)},
        **{"hada_w2_b": (_R, _N), "alpha": ()},
    },
    "lokr": {"lokr_w1": (2, 2), "lokr_w2": (3, 2), "alpha": ()},
    "lokr parts": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 2)},
    "glora": {
        **{"a1.weight": (_R, _N), "a2.weight": (_N, _R)},
        **{"b1.weight": (_R, _N), "b2.weight": (_M, _R)},
    },
    "oft": {"oft_blocks": (3, 2, 2), "rescale": (_M, 1)},
    "boft": {"oft_blocks": (1, 3, 2, 2)},
    "oft of peft": {"oft_R.weight": (3, 6)},
    "ia3": {"weight": (_M,), "on_input": ()},
    "full": {"diff": (_M, _N), "diff_b": (_M,)},
    "norm": {"w_norm": (_M,), "b_norm": (_M,)},
    "set": {"set_weight": (_M, _N)},
}  # fmt: skip


_REFUSED = tuple(f"{LAYERS[0]}.{role}" for role in ("q_layer.weight", "reshape_weight", "alpha"))


@st.composite
def in_one_dtype(draw: st.DrawFn, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, or all factors and weights in another dtype."""
    if draw(st.integers(0, 4)):
        return dict(found)
    dtype = draw(st.sampled_from(_DTYPES))
    return {
        key: tensor.to(dtype) if tensor.ndim and tensor.is_floating_point() else tensor
        for key, tensor in found.items()
    }


@st.composite
def lora_tensors(draw: st.DrawFn, known: bool = False) -> dict[str, Tensor]:
    """The tensors of a LoRA: a few layers of any kind, then perhaps something lost or strange."""
    found: dict[str, Tensor] = {}
    names = st.sampled_from(LAYERS[:6] if known else LAYERS)
    for layer in draw(st.lists(names if known else names | TEXT, min_size=1, max_size=3)):
        kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=2))
        for kind in kinds if draw(st.integers(0, 9)) == 0 else kinds[:1]:
            for role, shape in KINDS[kind].items():
                found[f"{layer}.{role}"] = draw(tensors(shape))
    for key in draw(st.lists(st.sampled_from(sorted(found)), max_size=2)):
        change = draw(st.sampled_from(["keep", "keep", "lose", "rename", "replace"]))
        if change == "lose":
            found.pop(key, None)
        elif change == "rename" and key in found:
            found[draw(st.sampled_from(_REFUSED) | TEXT)] = found.pop(key)
        elif change == "replace":
            found[key] = draw(tensors())
    return draw(in_one_dtype(found))


_UNET, _CLIP = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
CHECKPOINTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "SD 1": {
        f"{_UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight": (_M, _N),
        f"{_UNET}middle_block.1.proj_in.weight": (_M, _N, 1, 1),
        f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (_M, _N),
        f"{_UNET}input_blocks.1.0.in_layers.2.weight": (_M, _N, 3, 3),
        f"{_UNET}input_blocks.1.0.in_layers.2.bias": (_M,),
        f"{_CLIP}encoder.layers.0.self_attn.q_proj.weight": (_M, _N),
        "first_stage_model.decoder.conv_in.weight": (_M, _N, 3, 3),
    },
    "SDXL": {
        f"{_UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight": (_M, _N),
        f"{_UNET}label_emb.0.0.weight": (_M, _N),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (_M, _N),
    },
    "Flux": {
        "double_blocks.0.img_attn.qkv.weight": (_M, _N),
        "single_blocks.0.linear1.weight": (_M, _N),
        "single_blocks.0.linear1.bias": (_M,),
    },
    "scaled Flux": {
        "scaled_fp8": (0,),
        "double_blocks.0.img_attn.qkv.weight": (_M, _N),
        "double_blocks.0.img_attn.qkv.scale_weight": (),
    },
    "diffusers": {
        "transformer_blocks.0.attn.to_q.weight": (_M, _N),
        "single_transformer_blocks.0.attn.to_q.weight": (_M, _N),
    },
    "others": {"some.layer.weight": (_M, _N), "down_blocks.0.attentions.0.proj_in.weight": (_M,)},
}


@st.composite
def checkpoint_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """The tensors of a model, and perhaps something of another."""
    family = draw(st.sampled_from(sorted(CHECKPOINTS)))
    more = draw(st.lists(st.sampled_from(sorted(CHECKPOINTS)), max_size=1))
    found = {
        key: draw(tensors(shape))
        for name in (family, *(more if draw(st.integers(0, 4)) == 0 else ()))
        for key, shape in CHECKPOINTS[name].items()
    }
    for key in draw(st.lists(st.sampled_from(sorted(found)), max_size=2)):
        found.pop(key, None)
    for key in draw(st.lists(TEXT, max_size=1)):
        found[key] = draw(tensors())
    return draw(in_one_dtype(found))


METADATA_KEYS = (
    *("ss_network_args", "ss_network_dim", "ss_network_module", "ss_tag_frequency", "ss_datasets"),
    *("ss_bucket_info", "ss_dataset_dirs", "ss_training_started_at", "ss_resolution", "ss_v2"),
    *("modelspec.thumbnail", "modelspec.architecture", "modelspec.title", "sshs_model_hash"),
    *("sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata", "format"),
    *("ss_base_model_version", "lorakit.recipe", "_quantization_metadata"),
)
_PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
_PEFT_VALUES = NUMBERS | st.sampled_from(
    [1, 2, 4.0, None, True, "none", {}, {"to_q": 3}, {"^a$": 1}]
)


@st.composite
def peft_configs(draw: st.DrawFn) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    plain = {"peft_type": draw(st.sampled_from(_PEFT_TYPES)), "r": 2, "lora_alpha": 2}
    patterns = st.dictionaries(
        st.sampled_from(["to_q", "^unet", ".*", "(a+)+$", "(", r"\d+", "proj_in"]) | ANY_TEXT,
        _PEFT_VALUES, max_size=3,
    )  # fmt: skip
    odd = st.fixed_dictionaries(
        {},
        optional={
            "peft_type": JSON,
            "r": _PEFT_VALUES,
            "lora_alpha": _PEFT_VALUES,
            "alpha": _PEFT_VALUES,
            "alpha_pattern": patterns | JSON,
            "rank_pattern": patterns | JSON,
            "num_cayley_neumann_terms": _PEFT_VALUES,
            "use_cayley_neumann": JSON,
            "coft": JSON,
            "eps": _PEFT_VALUES,
            "use_rslora": JSON,
            "use_dora": JSON,
            "bias": st.sampled_from(["none", "all"]) | JSON,
            "init_lora_weights": JSON,
            "modules_to_save": JSON,
        },
    )
    return {**plain, **draw(odd)}


@st.composite
def metadata(draw: st.DrawFn) -> dict[str, str]:
    """A header's metadata: the keys of trainers with values that are right, odd or nonsense."""
    adapter = peft_configs().map(lambda c: json.dumps({f"unet.{k}": v for k, v in c.items()}))
    values = TEXT | JSON.map(json.dumps) | adapter | recipes().map(json.dumps)
    keys = st.sampled_from(METADATA_KEYS) | TEXT
    found: dict[str, str] = draw(st.dictionaries(keys, values, max_size=4))
    return found


@st.composite
def recipes(draw: st.DrawFn) -> Any:
    """What made a file, as a stranger tells it."""
    record = st.fixed_dictionaries(
        {
            "lora": st.sampled_from(["a.safetensors", "../a.safetensors", "."]) | ANY_TEXT,
            "sha256": TEXT,
            "header": TEXT,
            "strength": st.sampled_from(["1", "0.5:te=0", "1+b.safetensors", "lbw=ALL"]) | ANY_TEXT,
        }
    )
    model = st.fixed_dictionaries(
        {"model": ANY_TEXT | st.just("base.safetensors"), "sample": TEXT, "header": TEXT,
         "loras": st.lists(record, max_size=2)}
    )  # fmt: skip
    side = model | st.fixed_dictionaries({"loras": st.lists(record, max_size=2)})
    options = st.dictionaries(
        st.sampled_from(["method", "rank", "svd", "into", "against", "only", "to", "as", "preset",
                         "dtype", "metadata", "density", "seed", "weights", "threshold", "score"])
        | TEXT,
        st.sampled_from(["linear", "ties", "auto", "kohya", "F16", "ALL"]) | JSON | side,
        max_size=4,
    )  # fmt: skip
    plain = {
        "lorakit": draw(TEXT | st.just("0.1.0")),
        "command": draw(st.sampled_from(["merge", "extract", "resize", "cut-blocks", "convert"])),
        "inputs": draw(st.lists(record | side, max_size=3)),
        "options": draw(options),
    }
    for key in draw(st.lists(st.sampled_from(sorted(plain)), max_size=1)):
        plain[key] = draw(JSON)
    return plain


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F13", "f32"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, max_size=3) | JSON,
    },
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header that lays out real names, some of whose entries lie."""
    keys = st.sampled_from([f"{LAYERS[0]}.lora_up.weight", "x.weight", "__metadata__"]) | ANY_TEXT
    table: dict[str, Any] = {}
    position = 0
    for key in draw(st.lists(keys, max_size=5)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4 * int(torch.Size(shape).numel())
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
        table[key] = {**entry, **draw(ENTRIES)} if draw(st.integers(0, 4)) == 0 else entry
    for key in draw(st.lists(keys, max_size=1)):
        table[key] = draw(ENTRIES | JSON)
    text = json.dumps(table).encode()
    length = draw(st.just(len(text)) | st.sampled_from([0, 2**40, 2**60, 2**64 - 1]))
    room = draw(st.just(position) | st.integers(0, 64))
    return length.to_bytes(8, "little") + text + bytes(room)


_WORDS = (
    *("a.safetensors", "C:\\x", "/tmp/a", ":", "+", "0.5", "-1", "1e3", "te=0.5", "unet=", "lbw="),
    *("lbw=ALL", "1,0,1", "nan", "inf", "<lora:", ">", "=", "lbwe=", "IN05-OUT05", "attn"),
    *("start=1", "~", "*", "NOT", " ", "MID", "-", ",", "D00"),
)
SPECS = st.lists(st.sampled_from(_WORDS) | ANY_TEXT, max_size=8).map("".join)
"""Arguments: LORA, MODEL, tags, presets, weights, rules."""
