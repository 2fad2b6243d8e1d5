"""LoRA keys in every spelling: key <-> (module, role)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lorakit.names.architectures import Architecture, component_of, flat_name
from lorakit.names.detection import detect
from lorakit.names.loratable import BIAS_PATTERNS, OTHER_PATTERNS, ROLE_PATTERNS, SOME_WORD
from lorakit.names.spelling import DENOISERS, TEXT_ENCODERS, Spelling, spelling_of

DIALECTS = ("kohya", "kohya-diffusers", "diffusers", "peft", "comfyui")
_PEFT_SUFFIX = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_KOHYA_SUFFIX = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "alpha": ".alpha",
}
_KOHYA_PREFIX = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
_USUAL = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
}
"""Most keys: a table is faster than the patterns, of which there are many."""
BUNDLED = "bundle_emb."
"""What the keys of textual inversions begin with that come along in a LoRA's file."""
MODULATION = "diff_m"
"""LightX2V's change of a block's `modulation`, which is a parameter and no layer."""
_NAMED_BY_PEFT = ("dora", "oft", "ia3")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedKey:
    """A key taken apart: the module as the file spells it, the role, the kind of adapter.

    What changes the module's bias has the kind "bias".
    """

    raw: str
    role: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a file's module names say together.

    `modules` maps each raw name to its canonical one, or to itself where it is not known.
    """

    architecture: Architecture | None
    dialect: str
    modules: Mapping[str, str]


@lru_cache(maxsize=2**16)
def parse_key(key: str) -> ParsedKey | None:
    """Take a LoRA key apart; None where nobody claims it."""
    for suffix, role in _USUAL.items():
        if key.endswith(suffix) and key != suffix and not key.endswith("lora.alpha"):
            return ParsedKey(raw=key.removesuffix(suffix), role=role, kind="lora")
    return _unusual(key) if SOME_WORD.search(key) else None


def _unusual(key: str) -> ParsedKey | None:
    if key.startswith(BUNDLED):
        return ParsedKey(raw=key, role="embedding", kind="embedding")
    for role, pattern in BIAS_PATTERNS:
        if found := pattern.fullmatch(key):
            return ParsedKey(raw=found["raw"], role=role, kind="bias")
    for role, pattern in ROLE_PATTERNS:
        if found := pattern.fullmatch(key):
            return ParsedKey(raw=_plain(found["raw"], found["suffix"]), role=role, kind="lora")
    for kind, pattern in OTHER_PATTERNS:
        if found := pattern.fullmatch(key):
            role = _role(found["suffix"], kind)
            if role == MODULATION:
                return ParsedKey(raw=f"{found['raw']}.modulation", role="diff", kind=kind)
            return ParsedKey(raw=found["raw"], role=role, kind=kind)
    return None


def _role(suffix: str, kind: str) -> str:
    """Return the suffix without its dot, and without the name that PEFT gives an adapter."""
    first, *rest = suffix.lstrip(".").split(".")
    if first == "scale":
        return "set_weight"
    return first if kind in _NAMED_BY_PEFT or not rest else f"{first}.{rest[-1]}"


def _plain(raw: str, suffix: str) -> str:
    """Undo diffusers' attention processors: `attn1.processor.to_out_lora` is `attn1.to_out.0`.

    Those of the text encoders name `self_attn.q_proj` in the UNet's words, `self_attn.to_q`.
    """
    if not suffix.startswith("_lora"):
        return raw
    module = raw.replace(".processor.", ".")
    parent, _, last = module.rpartition(".")
    if parent.endswith(".self_attn"):
        return f"{parent}.{_OLD_TEXT.get(last, last)}"
    return module + ".0" if last == "to_out" else module


def resolve(
    raws: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Resolution:
    """Find the architecture, the dialect and the canonical name of every module.

    Args:
        raws: module names as the file spells them.
        shapes: raw name -> shape of `down`; only the number of dimensions counts.
        metadata: the header's, for what the names leave open.
    """
    spelled = {raw: spelling_of(raw) for raw in sorted(set(raws))}
    architecture = detect(spelled, shapes or {}, metadata or {})
    modules = {raw: canonical(at, architecture) or raw for raw, at in spelled.items()}
    return Resolution(
        architecture=architecture,
        dialect=_dialect(spelled, modules, architecture),
        modules=modules,
    )


def canonical(spelled: Spelling, architecture: Architecture | None) -> str | None:
    """Return the canonical name of a module, None where the architecture lacks it."""
    if architecture is None:
        return None
    return architecture.flat.get((architecture.component(spelled), flat_name(spelled.path)))


def _dialect(
    spelled: Mapping[str, Spelling], modules: Mapping[str, str], architecture: Architecture | None
) -> str:
    counts = Counter(at.dialect for at in spelled.values())
    dialect = max(sorted(counts), key=lambda name: counts[name], default="kohya")
    if dialect != "kohya" or architecture is None or not architecture.kohya_original:
        return dialect
    original = Counter(
        name is None or flat_name(at.path) == flat_name(name.original)
        for raw, at in spelled.items()
        if component_of(modules[raw]) in DENOISERS
        for name in (architecture.modules.get(modules[raw]),)
        if name is not None or modules[raw] in architecture.fused
    )
    return "kohya-diffusers" if original[False] > original[True] else "kohya"


def joins(dialect: str, architecture: Architecture | None) -> bool:
    """Tell whether a dialect names the modules that the single file fuses, instead of their parts.

    kohya and ComfyUI follow the single file, diffusers and PEFT name q, k and v apart.
    """
    if architecture is None or not architecture.fused:
        return False
    return dialect == "comfyui" or (dialect == "kohya" and architecture.kohya_original)


def format_key(module: str, role: str, *, dialect: str, architecture: Architecture | None) -> str:
    """Write the key of a module's tensor in a dialect.

    Args:
        module: canonical, or raw where the architecture does not know it.
        role: up, down, mid or alpha, PEFT's dialects have no alpha; or another kind's own.
        dialect: one of `DIALECTS`.
        architecture: of the LoRA.
    """
    suffix = _PEFT_SUFFIX if dialect in ("diffusers", "peft") else _KOHYA_SUFFIX
    stem = format_module(module, dialect=dialect, architecture=architecture)
    return stem + suffix.get(role, f".{role}")


def format_module(module: str, *, dialect: str, architecture: Architecture | None) -> str:
    """Write a module's name in a dialect; arguments as for `format_key`."""
    if architecture is None:
        return _generic(module, dialect)
    component, _, path = module.partition(".")
    if module in architecture.fused:
        original = path
    elif module in architecture.modules:
        name = architecture.modules[module]
        whole = component in DENOISERS and name.part is None
        original = name.original if whole else path
    else:
        return _generic(module, dialect)
    if dialect == "diffusers":
        return module
    if dialect == "peft":
        return f"base_model.model.{_peft_path(component, path)}"
    if dialect == "comfyui":
        clip = architecture.clips.get(component)
        prefix = "diffusion_model." if clip is None else f"text_encoders.{clip}.transformer."
        return prefix + original
    path = original if dialect == "kohya" and architecture.kohya_original else path
    return architecture.kohya_prefix(component) + path.replace(".", "_")


def _peft_path(component: str, path: str) -> str:
    """Return the path inside the model that PEFT wraps.

    transformers 5 leaves `text_model.` out of CLIPTextModel and keeps it in the projecting one.
    """
    return path.removeprefix("text_model.") if component == "text_encoder" else path


def _generic(module: str, dialect: str) -> str:
    """Name a module of an unknown architecture: as it was, or by the path that the file gave it."""
    spelled = spelling_of(module)
    if spelled.dialect == dialect.partition("-")[0] and spelled.component:
        return module
    path, component = spelled.path, spelled.component or DENOISERS[0]
    if dialect == "peft":
        return f"base_model.model.{path}"
    if dialect == "diffusers":
        return f"{component}.{path}" if spelled.component else path
    if dialect == "comfyui":
        return path if component in TEXT_ENCODERS else f"diffusion_model.{path}"
    return _KOHYA_PREFIX[component] + path.replace(".", "_")
