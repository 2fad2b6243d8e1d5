"""Kinds of layers: attention, mlp, convolution, …, whatever an architecture calls them."""

import re
from collections.abc import Iterable

from lorakit.names.architectures import component_of
from lorakit.names.spelling import TEXT_ENCODERS

OTHER = "other"
BOTH = "attn+mlp"
"""A layer that attention and the mlp have in common, as in Flux's single blocks."""
UNET_KINDS = ("attn1", "attn2", "ff", "conv", "proj")
TRANSFORMER_KINDS = ("attention", BOTH, "mlp", "modulation")
_ORDER = (*UNET_KINDS, *TRANSFORMER_KINDS, OTHER)

_UNET = (
    (re.compile(r"[._](attn[12])[._]"), ""),
    (re.compile(r"[._]ff[._]"), "ff"),
    (re.compile(r"[._]conv(\d|_shortcut|_in|_out)?$|samplers[._]\d+[._]conv$"), "conv"),
    (re.compile(r"[._]proj_(in|out)$"), "proj"),
)
_TRANSFORMER = (
    (re.compile(r"single_(transformer_)?blocks[._]\d+[._](linear[12]|proj_out)$"), BOTH),
    (re.compile(r"qkv_mlp|single_transformer_blocks[._]\d+[._]attn[._]to_out$"), BOTH),
    (re.compile(r"_mod[._](lin|\d)|modulation|scale_shift|(a2v|v2a)_gate"), "modulation"),
    (re.compile(r"norm\d?(_out|_context)?[._]linear(_\d)?$|adaln(_single)?\.lin"), "modulation"),
    (re.compile(r"time_(proj|embed[._]linear)$"), "modulation"),
    (re.compile(r"attn|attention|qkv"), "attention"),
    (re.compile(r"[._](ff|ffn|ff_context|feed_forward|audio_ff)[._]|(?<!embedder\.)mlp"), "mlp"),
)
"""Looked for in this order."""


def kind_of(module: str) -> str:
    """Return the kind of a layer; of a text encoder's the encoder, `text_encoder_2`.

    A UNet's are attn1, attn2, ff, conv and proj, a transformer's attention, mlp, modulation (what
    makes shift, scale and gate of the time) and attn+mlp; the rest is other.

    Args:
        module: canonical name, fused or not, or the name in a file of an unknown model.
    """
    module = module.removesuffix(".bias")
    component = component_of(module)
    if component in TEXT_ENCODERS or module.startswith("text_encoders."):
        return component or TEXT_ENCODERS[0]
    # Of a model that no table knows, only the trainer says that it has a UNet.
    table = _UNET if module.startswith("unet.") else (*_UNET, *_TRANSFORMER)
    for pattern, kind in _TRANSFORMER if component == "transformer" else table:
        if found := pattern.search(module):
            return kind or found[1]
    return OTHER


def ordered(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds that there are in the order of a table: the text encoders come last."""
    there = dict.fromkeys(kinds)
    texts = sorted(kind for kind in there if kind not in _ORDER)
    return (*(kind for kind in _ORDER if kind in there), *texts)
