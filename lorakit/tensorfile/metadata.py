"""What a LoRA file says of itself: kohya's and modelspec's keys, the hashes, the recipe."""

import hashlib
import json
from collections.abc import Iterator, Mapping

from lorakit.errors import SpecError
from lorakit.tensorfile.casting import stored
from lorakit.tensorfile.dtypes import bytes_of
from lorakit.tensorfile.extents import chunks_of
from lorakit.tensorfile.hashes import SPEC_HASH
from lorakit.tensorfile.header import Extent
from lorakit.tensorfile.plain import TensorSource
from lorakit.tensorfile.reading import parse_json
from lorakit.tensorfile.streaming import laid_out, plan

RECIPE_KEY = "lorakit.recipe"
DYNAMIC = "Dynamic"

_STALE = (SPEC_HASH, "modelspec.date", RECIPE_KEY)
# Arguments of LyCORIS and kohya that describe ranks and adapter types, which are other ones now.
_STALE_ARGS = frozenset(
    (
        "conv_dim",
        "conv_alpha",
        "algo",
        "preset",
        "factor",
        "decompose_both",
        "full_matrix",
        "use_cp",
        "use_tucker",
        "use_scalar",
        "dora_wd",
        "weight_decompose",
        "wd_on_out",
        "wd_on_output",
        "rs_lora",
        "block_dims",
        "block_alphas",
        "conv_block_dims",
        "conv_block_alphas",
    )
)


def model_hash(source: TensorSource) -> str:
    """Return the SHA-256 of the tensors' bytes as they are stored: Civitai's AutoV3.

    Raises:
        FileFormatError: a file cannot be read whole.
    """
    digest = hashlib.sha256()
    for data in _data(source):
        digest.update(data)
    return digest.hexdigest()


def true_metadata(
    old: Mapping[str, str],
    *,
    rank: float | None,
    alpha: float | None,
    conv_rank: float | None = None,
    conv_alpha: float | None = None,
    base_model_version: str | None = None,
    modelspec_architecture: str | None = None,
    title: str | None = None,
) -> dict[str, str]:
    """Return an input's metadata made true of the output: training keys stay, stale ones go.

    Args:
        old: the input's metadata.
        rank: the rank of every module, None where they differ.
        alpha: likewise.
        conv_rank: the rank of every convolution over 1x1, None where there are none or they differ.
        conv_alpha: likewise.
        base_model_version: kohya's name of the base, `sdxl_base_v1-0`; None keeps the old one.
        modelspec_architecture: modelspec's name of it, `stable-diffusion-xl-v1-base`.
        title: modelspec's title.

    Source: kohya's `resize_lora.py` and `sai_model_spec.py`.
        - `ss_network_args` and `modelspec.*` are made true too
    """
    new = {
        key: text for key, text in old.items() if key not in _STALE and not key.startswith("sshs_")
    }
    if not old.get("ss_network_module", "").startswith("networks.lora"):
        new["ss_network_module"] = "networks.lora"
    new["ss_network_dim"] = _number(rank)
    new["ss_network_alpha"] = _number(alpha)
    args = _network_args(old.get("ss_network_args", ""), conv_rank, conv_alpha)
    if args or "ss_network_args" in old:
        new["ss_network_args"] = json.dumps(args, ensure_ascii=False)
    if base_model_version is not None:
        new["ss_base_model_version"] = base_model_version
        new["ss_v2"] = str(base_model_version.startswith("sd_v2"))
    if modelspec_architecture is not None:
        new |= _modelspec(old, modelspec_architecture)
    if title is not None and "modelspec.sai_model_spec" in new:
        new["modelspec.title"] = title
    return new


def recipe_json(recipe: Mapping[str, object]) -> str:
    """Return a recipe as canonical JSON: keys sorted, no spaces, no NaN.

    Raises:
        SpecError: it holds what JSON cannot say.
    """
    try:
        return json.dumps(
            recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"Recipe: expected text, finite numbers, lists and dicts, found {error}; convert it."
        ) from None


def _data(source: TensorSource) -> Iterator[bytes | memoryview]:
    for step in plan(source, laid_out(source)):
        if isinstance(step, Extent):
            yield from chunks_of(step)
        else:
            yield bytes_of(stored(source, step))


def _network_args(
    text: str, conv_rank: float | None, conv_alpha: float | None
) -> dict[str, object]:
    try:
        old = parse_json(text)
    except ValueError:
        old = {}
    args = {
        key: value
        for key, value in (old.items() if isinstance(old, dict) else ())
        if key not in _STALE_ARGS
    }
    if conv_rank is not None:
        args["conv_dim"] = _number(conv_rank)
        if conv_alpha is not None:
            args["conv_alpha"] = _number(conv_alpha)
    return args


def _modelspec(old: Mapping[str, str], architecture: str) -> dict[str, str]:
    implementation = "diffusers"
    if architecture.startswith("stable-diffusion-xl"):
        implementation = "https://github.com/Stability-AI/generative-models"
    elif architecture.startswith("flux"):
        implementation = "https://github.com/black-forest-labs/flux"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture.removesuffix("/lora") + "/lora",
        "modelspec.implementation": old.get("modelspec.implementation", implementation),
    }


def _number(value: float | None) -> str:
    if value is None:
        return DYNAMIC
    return str(int(value)) if value == int(value) else repr(float(value))
