"""The tables agree with diffusers' own converters."""

import pytest
import realnames
import torch

from lorakit.names.checkpoints import index_checkpoint
from lorakit.names.dialects import format_key, parse_key, resolve
from lorakit.names.sd import SD1
from lorakit.names.sdxl import SDXL

pytestmark = pytest.mark.peer
FACTOR = 32


def numbered(shapes):
    """Make tensors that no two places of a model share a value in."""
    start, tensors = 0, {}
    for key, shape in shapes.items():
        count = max(1, torch.Size(shape).numel())
        tensors[key] = torch.arange(start, start + count, dtype=torch.int64).reshape(shape)
        start += count
    return tensors


def taken(tensors, target):
    tensor = tensors[target.key].T if target.transpose else tensors[target.key]
    start, stop, of = target.part or (0, 1, 1)
    rows = tensor.shape[0]
    return tensor[rows * start // of : rows * stop // of]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_each_unet_weight_is_the_one_that_diffusers_takes(name):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    tensors = numbered(realnames.single_file(name, factor=FACTOR))
    index = index_checkpoint({key: tuple(value.shape) for key, value in tensors.items()})
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" * (name == "sdxl")}
    converted = utils.convert_ldm_unet_checkpoint(tensors, config)
    weights = {k: v for k, v in converted.items() if v.ndim > 1}
    assert len(weights) > 200
    for key, expected in weights.items():
        found = taken(tensors, index.find("unet." + key.removesuffix(".weight")))
        assert torch.equal(found, expected), key


@pytest.mark.parametrize(
    ("name", "component", "prefix", "count"),
    [
        ("sd2", "text_encoder", "cond_stage_model.model.", 138),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.", 193),
    ],
)
def test_each_weight_of_open_clip_is_the_one_that_diffusers_takes(name, component, prefix, count):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    tensors = numbered(realnames.single_file(name, factor=FACTOR))
    index = index_checkpoint({key: tuple(value.shape) for key, value in tensors.items()})
    converted = utils.convert_open_clip_checkpoint(None, dict(tensors), prefix)
    # diffusers too leaves out SD 2's 24th layer, and its projection.
    kinds = (".self_attn.", ".mlp.", "text_projection.")
    weights = [
        key for key in converted if key.endswith(".weight") and any(kind in key for kind in kinds)
    ]
    assert len(weights) == count
    for key in weights:
        found = taken(tensors, index.find(f"{component}.{key.removesuffix('.weight')}"))
        assert torch.equal(found, converted[key]), key


@pytest.mark.parametrize(("name", "architecture"), [("sd1", SD1), ("sdxl", SDXL)])
def test_kohyas_names_are_read_and_written_as_diffusers_reads_them(name, architecture):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    modules = [f"{m.component}.{m.path}" for m in realnames.modules(name) if m.kind != "conv"]
    # diffusers reads kohya's own names of SDXL with a configuration at hand; these without.
    dialect = "kohya" if name == "sd1" else "kohya-diffusers"
    keys = {
        format_key(module, role, dialect=dialect, architecture=architecture): module
        for module in modules
        for role in ("down", "up")
    }
    tensors = {key: torch.tensor(float(i)).reshape(1, 1) for i, key in enumerate(keys)}
    converted, _ = utils._convert_non_diffusers_lora_to_diffusers(dict(tensors))
    places = {float(value): key for key, value in converted.items()}
    raws = [parse_key(key).raw for key in converted]
    canonical = resolve(raws).modules
    assert len(places) == len(keys)
    for number, (key, module) in enumerate(keys.items()):
        found = parse_key(places[float(number)])
        assert (canonical[found.raw], found.role) == (module, parse_key(key).role)
