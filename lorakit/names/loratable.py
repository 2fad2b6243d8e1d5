"""The suffixes of LoRA keys: which role and which kind of adapter each spells."""

import re
from collections.abc import Mapping

ROLES: Mapping[str, tuple[str, ...]] = {
    "down": (
        r"\.lora_down(?:\.weight)?",
        r"\.lora_A(?:\.(?!weight$)[^.]+)?(?:\.weight)?",
        r"\.lora\.down\.weight",
        r"_lora\.down\.weight",
        r"\.lora_linear_layer\.down\.weight",
    ),
    "up": (
        r"\.lora_up(?:\.weight)?",
        r"\.lora_B(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?",
        r"\.lora\.up\.weight",
        r"_lora\.up\.weight",
        r"\.lora_linear_layer\.up\.weight",
    ),
    "mid": (r"\.lora_mid(?:\.weight)?",),
    "alpha": (r"\.alpha", r"\.lora\.alpha", r"_lora\.alpha"),
}
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
    "full": (r"\.diff", r"\.diff_b", r"\.set_weight", r"\.reshape_weight"),
    "norm": (r"\.[wb]_norm",),
    "bias": (r"\.lora_B(?:\.[^.]+)?\.bias", r"\.lora_up\.bias", r"\.bias_(?:indices|values|size)"),
    "embedding": (r"\.lora_embedding_[AB](?:\.[^.]+)?",),
    "tlora": (r"\.[qp]_layer\.weight", r"\.lambda_layer"),
}


def _compiled(table: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (name, re.compile(rf"(?P<raw>.+?)(?P<suffix>{'|'.join(patterns)})"))
        for name, patterns in table.items()
    )


ROLE_PATTERNS = _compiled(ROLES)
OTHER_PATTERNS = _compiled(OTHERS)
