"""The suffixes of LoRA keys: which role and which kind of adapter each spells."""

import re
from collections.abc import Mapping

ROLES: Mapping[str, tuple[str, ...]] = {
    "down": (
        r"\.lora_down(?:\.weight)?",
        r"\.lora_A(?:\.(?!weight$)[^.]+)?(?:\.weight)?",
        r"\.lora\.down\.weight",
        r"(?<!\.processor\.qkv)(?<!\.processor\.proj)_lora\.down\.weight",
        r"(?<=_lora[12])\.down\.weight",
        r"(?:(?<=\.processor\.qkv_lora)|(?<=\.processor\.proj_lora))\.down\.weight",
        r"\.lora_linear_layer\.down\.weight",
        r"\.down",
    ),
    "up": (
        r"\.lora_up(?:\.weight)?",
        r"\.lora_B(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?",
        r"\.lora\.up\.weight",
        r"(?<!\.processor\.qkv)(?<!\.processor\.proj)_lora\.up\.weight",
        r"(?<=_lora[12])\.up\.weight",
        r"(?:(?<=\.processor\.qkv_lora)|(?<=\.processor\.proj_lora))\.up\.weight",
        r"\.lora_linear_layer\.up\.weight",
        r"\.up",
    ),
    "mid": (r"\.lora_mid(?:\.weight)?",),
    "embedding_down": (r"\.lora_embedding_A(?:\.[^.]+)?",),
    "embedding_up": (r"\.lora_embedding_B(?:\.[^.]+)?",),
    "alpha": (r"\.alpha", r"\.lora\.alpha", r"_lora\.alpha"),
    "scale": (r"(?<!_norm)\.scale",),
}
RANKED = ("down", "embedding_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Roles of factors whose first side is the rank."""
BIASES: Mapping[str, tuple[str, ...]] = {
    "diff_b": (r"\.diff_b",),
    "b_norm": (r"\.b_norm",),
    "lora_bias": (r"\.lora_B(?:\.[^.]+)?\.bias", r"\.lora_up\.bias"),
}
"""What changes a layer's bias, beside whatever changes its weight."""
OTHERS: Mapping[str, tuple[str, ...]] = {
    "dora": (r"\.dora_scale", r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", r"\.magnitude"),
    "loha": (r"\.hada_(?:w[12]_[ab]|t[12])",),
    "lokr": (r"\.lokr_(?:w[12](?:_[ab])?|t[12])",),
    "glora": (r"\.(?:a[12]|b[12]|bm)\.weight",),
    "oft": (
        r"\.oft_blocks",
        r"\.oft_diag",
        r"\.oft_R(?:\.[^.]+)?(?:\.weight)?",
        r"\.boft_[Rs](?:\.[^.]+)?",
        r"\.rescale",
    ),
    "ia3": (r"\.on_input", r"\.ia3_l(?:\.[^.]+)?"),
    "full": (r"\.diff", r"\.w_norm", r"\.diff_m"),
    "set": (r"\.set_weight", r"(?<=_norm)\.scale"),
    "reshape": (r"\.reshape_weight",),
    "sparse": (r"\.bias_(?:indices|values|size)",),
    "tlora": (r"\.[qp]_layer\.weight", r"\.lambda_layer"),
}


def _compiled(table: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (name, re.compile(rf"(?P<raw>.+?)(?P<suffix>{'|'.join(patterns)})"))
        for name, patterns in table.items()
    )


SOME_WORD = re.compile(
    r"lora|bundle_emb|alpha|hada_|lokr_|oft_|ia3_l|on_input|\.diff(?:_[bm])?$|_norm|scale"
    r"|magnitude|set_weight|reshape_weight|(?:[qp]|lambda)_layer|\.[ab][12m]\.|\.bias_|\.(?:down|up)(?:\.|$)"
)
"""What every key of an adapter holds; most keys of a checkpoint hold none of it."""
ROLE_PATTERNS = _compiled(ROLES)
BIAS_PATTERNS = _compiled(BIASES)
OTHER_PATTERNS = _compiled(OTHERS)
