"""Whatever a file or an argument holds: one sentence, soon, in little memory, and no way out.

The same functions run for hours under a coverage-guided fuzzer with `make fuzz`. They take no
fixtures, so that it can call them.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lorakit import (
    Compute,
    LoraFile,
    Method,
    Output,
    RankRule,
    TensorSource,
    apply,
    compare,
    convert,
    cut_blocks,
    extract,
    inspect,
    load_lora,
    merge,
    open_source,
    resize,
    save_lora,
)
from lorakit.errors import LorakitError
from lorakit.models import open_model
from lorakit.names.blocks import parse_ids, parse_weights, weights_of
from lorakit.names.elements import parse_elements
from lorakit.names.presets import parse_presets_file
from lorakit.names.sdxl import SDXL
from lorakit.names.specs import format_lora, parse_lora, parse_model, parse_sum
from lorakit.names.tags import parse_prompt, parse_tag
from lorakit.saving import save_model
from lorakit.tensorfile.quantised import dequantised
from lorakit.tensorfile.source import DictSource
from tests.fuzz.pickled import checkpoints
from tests.fuzz.strategies import (
    ANY_TEXT,
    CHECKPOINTS,
    JSON,
    SPECS,
    TEXT,
    checkpoint_tensors,
    headers,
    lora_tensors,
    metadata,
    peft_configs,
    recipes,
)
from tests.fuzz.watch import watching
from tests.helpers import run

COMPUTE = Compute(device="cpu", threads=1)
ROUND = settings(
    max_examples=int(os.environ.get("LORAKIT_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@cache
def folder() -> Path:
    """Make a folder for the files of one process, with a LoRA and a model to combine them with."""
    place = Path(tempfile.mkdtemp(prefix="lorakit-fuzz-"))
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {
        f"{layer}.lora_up.weight": torch.ones(6, 2),
        f"{layer}.lora_down.weight": torch.ones(2, 4),
    }
    save_file(lora, place / "a.safetensors")
    model = {key: torch.ones(shape) for key, shape in CHECKPOINTS["SD 1"].items()}
    save_file(model, place / "base.safetensors")
    return place


def emptied(name: str) -> Path:
    place = folder() / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


@contextmanager
def refusing(*inside: Path) -> Iterator[None]:
    """Let nothing pass but what lorakit says itself, and no file outside what is named."""
    try:
        with watching(*(inside or (folder(),))):
            yield
    except LorakitError as error:
        assert str(error)


def in_terminal(*arguments: object) -> None:
    """Run a command; it may refuse, in a sentence."""
    with watching(folder(), Path(tempfile.gettempdir())):
        result = run(*arguments)
    refused = result.exception is None or isinstance(result.exception, SystemExit)
    assert refused and result.exit_code in (0, 1, 2), (arguments, repr(result.exception))
    assert all(c.isprintable() or c == "\n" for c in result.output), arguments
    assert not list(folder().rglob(".*.tmp"))


def loaded(tensors: Mapping[str, Tensor]) -> LoraFile | None:
    with refusing():
        return load_lora(tensors, allow_unmatched=True)
    return None


@ROUND
@given(content=headers() | st.binary(max_size=80))
def test_headers(content: bytes) -> None:
    file = folder() / "x.safetensors"
    file.write_bytes(content)
    for door in (open_source, load_lora, inspect):
        with refusing():
            door(file)
    in_terminal("metadata", "show", file)


def base() -> TensorSource:
    return open_source(folder() / "base.safetensors")


OPERATIONS: Mapping[str, Callable[[LoraFile], object]] = {
    "merge": lambda lora: merge([(lora, 0.5), (lora, -0.3)], compute=COMPUTE),
    "merge on a model": lambda lora: merge([(lora, 0.5)], against=base(), compute=COMPUTE),
    "merge by rank": lambda lora: merge([(lora, 1.0)], rule=RankRule(rank=1), compute=COMPUTE),
    "ties": lambda lora: merge([(lora, 1.0)] * 2, method=Method(name="ties"), compute=COMPUTE),
    "sce": lambda lora: merge([(lora, 1.0)] * 2, method=Method(name="sce"), compute=COMPUTE),
    "resize": lambda lora: resize(lora, rule=RankRule(energy=0.9), compute=COMPUTE),
    "resize to a size": lambda lora: resize(lora, rule=RankRule(size=20_000), compute=COMPUTE),
    "diffusers": lambda lora: convert(lora, dialect="diffusers", compute=COMPUTE),
    "peft": lambda lora: convert(lora, dialect="peft", compute=COMPUTE),
    "plain": lambda lora: convert(lora, plain=True, repair=True, compute=COMPUTE),
    "cut": lambda lora: cut_blocks(lora, blocks={"MID": 0.5, "OUT03": 0.0}),
    "bake": lambda lora: apply(
        base(), [(lora, 0.7)], allow_unmatched=True, compute=COMPUTE
    ),
    "score": lambda lora: resize(
        lora, rule=RankRule(rank=1, threshold=-9.0), against=base(), allow_unmatched=True,
        compute=COMPUTE,
    ),
    "compare": lambda lora: compare([(lora, 1.0)] * 2, compute=COMPUTE),
}  # fmt: skip


@ROUND
@given(tensors=lora_tensors(), name=st.sampled_from(sorted(OPERATIONS)))
def test_loras(tensors: dict[str, Tensor], name: str) -> None:
    lora = loaded(tensors)
    if lora is None:
        return
    with refusing():
        OPERATIONS[name](lora)


@ROUND
@given(
    tensors=lora_tensors(known=True), told=metadata(), dialect=st.sampled_from(["kohya", "comfyui"])
)
def test_what_is_written_is_read_again(
    tensors: dict[str, Tensor], told: dict[str, str], dialect: str
) -> None:
    lora = loaded(tensors)
    if lora is None:
        return
    file = folder() / "out.safetensors"
    with refusing():
        output = Output(overwrite=True, dialect=dialect, dtype="F32", metadata=told)
        save_lora(file, lora, output=output)
        again = load_lora(file)
        assert again.adapters.keys() == lora.adapters.keys()


@ROUND
@given(tensors=checkpoint_tensors(), other=checkpoint_tensors(), told=metadata())
def test_models(tensors: dict[str, Tensor], other: dict[str, Tensor], told: dict[str, str]) -> None:
    source = DictSource(tensors, told)
    with refusing():
        open_model(dequantised(source))
    with refusing():
        lora = load_lora(folder() / "a.safetensors")
        applied, _ = apply(source, [(lora, 1.0)], allow_unmatched=True, compute=COMPUTE)
        for key in applied.specs:
            applied.get(key)
        save_model(folder() / "model.safetensors", applied, overwrite=True, compute=COMPUTE)
    with refusing():
        rule = RankRule(rank=1)
        extract(source, DictSource({**tensors, **other}), rule=rule, allow_unmatched=True,
                compute=COMPUTE)  # fmt: skip


@ROUND
@given(config=peft_configs() | JSON, tensors=lora_tensors(), parts=st.booleans())
def test_peft_folders(config: Any, tensors: dict[str, Tensor], parts: bool) -> None:
    place = emptied("peft")
    inside = place / "unet" if parts else place
    inside.mkdir(exist_ok=True)
    (inside / "adapter_config.json").write_text(json.dumps(config))
    with refusing():
        source = DictSource(tensors)
        save_file({k: source.get(k) for k in source.specs}, inside / "adapter_model.safetensors")
    with refusing():
        load_lora(place, allow_unmatched=True)
    with refusing():
        inspect(place)


PLACES = ("x.safetensors", "../a.safetensors", "/etc/passwd", "x/../../a.safetensors")


@ROUND
@given(
    weights=st.dictionaries(
        ANY_TEXT | st.just("w"),
        st.sampled_from(
            ["x.safetensors", "../a.safetensors", "/etc/passwd", "x/../../a.safetensors"]
        )
        | ANY_TEXT,
        max_size=3,
    )
    | JSON,
    name=st.sampled_from(["model.safetensors.index.json", "model.fp16.safetensors.index.json"]),
)
def test_indexes(weights: Any, name: str) -> None:
    place = emptied("shards")
    save_file({"w": torch.ones(2)}, place / "x.safetensors")
    (place / name).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    for path in (place, place / name):
        with refusing(place):
            source = open_source(path)
            for key in source.specs:
                source.get(key)


@ROUND
@given(content=checkpoints(), ending=st.sampled_from(["ckpt", "safetensors", "bin"]))
def test_pickles(content: bytes, ending: str) -> None:
    file = folder() / f"x.{ending}"
    file.write_bytes(content)
    with refusing():
        source = open_source(file)
        for key in source.specs:
            source.get(key)
    with refusing():
        load_lora(file)


@ROUND
@given(text=SPECS)
def test_arguments(text: str) -> None:
    def exists(path: str) -> bool:
        return path in ("a.safetensors", "a:b", "a+b")

    def find(name: str) -> str:
        return name

    with refusing():
        spec = parse_lora(text, exists=exists)
        assert parse_lora(format_lora(spec), exists=lambda path: path == spec.path) == spec
    readers: tuple[Callable[[], object], ...] = (
        lambda: parse_model(text, exists=exists),
        lambda: parse_sum(text, exists=exists),
        lambda: parse_tag(text, find),
        lambda: parse_prompt(f"a {text}", find),
        lambda: weights_of(text, SDXL, {"MINE": (1.0,) * 12}),
        lambda: parse_weights(text, SDXL),
        lambda: parse_ids(text, SDXL),
        lambda: parse_elements(text, SDXL),
    )
    for read in readers:
        with refusing():
            read()
    parse_presets_file(text)


@ROUND
@given(recipe=recipes() | JSON, title=TEXT)
def test_recipes(recipe: Any, title: str) -> None:
    file = folder() / "made.safetensors"
    told = {"lorakit.recipe": json.dumps(recipe), "modelspec.title": title}
    save_file(
        {"x.lora_up.weight": torch.ones(2, 1), "x.lora_down.weight": torch.ones(1, 2)}, file, told
    )
    in_terminal("verify", file, "--lora-dir", folder())
    in_terminal("merge", "--recipe", file, "-o", folder() / "again.safetensors", "--overwrite")
    in_terminal("inspect", file, "--metadata")


@ROUND
@given(tensors=lora_tensors(), told=metadata())
def test_inspection(tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    file, page = folder() / "seen.safetensors", folder() / "seen.html"
    with refusing():
        source = DictSource(tensors)
        save_file({key: source.get(key) for key in source.specs}, file, told)
    in_terminal("inspect", file, "--blocks", "--spectrum", "--metadata", "-v")
    in_terminal("inspect", file, "--html", page, "--overwrite")
    in_terminal("verify", file)
    in_terminal("metadata", "hash", file)


@ROUND
@given(pairs=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=3))
def test_metadata_that_is_set(pairs: list[tuple[str, str]]) -> None:
    out = folder() / "told.safetensors"
    given_ = [f"{key}={value}" for key, value in pairs]
    in_terminal("metadata", "set", folder() / "a.safetensors", "-o", out, "--overwrite",
                "--verify", "--", *given_)  # fmt: skip
    if out.exists():
        in_terminal("metadata", "show", out)
