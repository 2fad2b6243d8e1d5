"""A recipe repeats: from what a file says of itself to the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.cli import load_command
from lorakit.cli._inputs import model_record
from lorakit.cli._method import method_parameters
from lorakit.cli._recipe import COMMANDS, OPTIONS
from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from lorakit.names.specs import LoraSpec, format_lora, lora_spec
from tests.cli.inputs import FACE, TWO, recipe_of, same
from tests.helpers import ran, refused, tensors_of

ROOT = Path(__file__).parents[2]


def repeats(folder: Path, *arguments: object, form: str = ".safetensors") -> Path:
    """Run a command; its recipe must repeat it under another name, from inputs that moved."""
    made, again = folder / f"made{form}", folder / "other" / f"again{form}"
    remarks = ran(*arguments, "-o", made)["notes"]
    attic = folder.parent / "attic" / "deep"
    shutil.move(folder, attic / "inputs")
    folder.mkdir()
    shutil.move(attic / "inputs" / made.name, made)
    os.chdir(folder)
    report = ran("merge", "--recipe", made, "--lora-dir", attic.parent, "-o", again)
    assert bool(same(made, again))
    compared = f"{again.name} has the same bytes as {made.name}."
    assert report["notes"] == [*([] if "--into" in arguments else [compared]), *remarks]
    return made


STACKS: dict[str, list[object]] = {
    "two": [*TWO],
    "one digit more than %g": ["a.safetensors:0.1234567", "b.safetensors:1e-7"],
    "the first twice": ["b.safetensors", "a.safetensors:0.3", "a.safetensors:-2:te=0"],
    "te and unet": ["a.safetensors:te=0.3:unet=-0.9", "b.safetensors:0.5:te=0.12345678901"],
    "preset": ["a.safetensors:0.7:lbw=OUTALL", "b.safetensors:lbw=MIDD"],
    "weights": [f"a.safetensors:0.7:lbw={FACE}", "b.safetensors"],
    "own preset": ["a.safetensors:lbw=FACE", "b.safetensors", "--presets-file", "own.txt"],
    "elements": ["a.safetensors:lbwe=IN05-OUT05:attn:0,NOT OUT03:ff:-0.5", "b.safetensors"],
    "tags": ["<lora:a:0.8:lbw=OUTALL>", "<lora:b:0.5:0.3>"],
    "prompt": ["--prompt", "a cat, <lora:b:-0.8>, <lora:a:0.5:lbwe=ATTNDEEPOFF>"],
    "dtype": ["a.safetensors:0.7", "b.safetensors", "--dtype", "bf16"],
    "metadata": ["a.safetensors", "b.safetensors:2", "--metadata", 'note="é"', "--metadata", "x="],
    "left out": ["foreign.safetensors", "b.safetensors", "--allow-unmatched"],
    "lambda": ["a.safetensors", "b.safetensors", "--lambda", "0.3", "--normalize"],
    "norm": ["a.safetensors", "b.safetensors", "--match-norm", "mean"],
}
RULES: dict[str, list[object]] = {
    "rank": ["--rank", 2, "--conv-rank", 1],
    "energy": ["--energy", 0.9, "--rank", 5],
    "error": ["--error", 0.1],
    "ratio": ["--sv-ratio", 10],
    "sum": ["--sv-sum", 0.8],
    "size": ["--size", "200K"],
}
METHODS: dict[str, list[object]] = {
    "ties": ["--method", "ties", "--density", 0.3],
    "dare in core": ["--method", "dare-linear", "--seed", 7, "--space", "core"],
    "dare in full": ["--method", "dare-linear", "--seed", 7, "--space", "full"],
    "karcher": ["--method", "karcher", "--normalize"],
    "tsv": ["--method", "tsv", "--lambda", 1.5],
    "ties of the whole model": ["--method", "ties", "--flavor", "paper"],
    "della in knots": ["--method", "della-ties", "--space", "knots", "--votes", "frequency"],
    "ctm": ["--method", "ctm", "--rank", 3],
    "pico": ["--calibrate", "pico", "--match-norm", "none"],
}
METHODS["ctm of a rank of its own"] = ["--method", "ctm"]
SAID = {options[1] for options in METHODS.values()}
METHODS |= {name: ["--method", name] for name in MENU if name not in SAID}
"""Every method at least once."""


@pytest.mark.parametrize("name", STACKS)
def test_a_merge_repeats(folder: Path, name: str) -> None:
    repeats(folder, "merge", *STACKS[name])


@pytest.mark.parametrize("name", RULES)
def test_a_rank_rule_repeats(folder: Path, name: str) -> None:
    repeats(folder, "merge", *TWO, *RULES[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_repeats(folder: Path, name: str) -> None:
    repeats(folder, "merge", *TWO, *METHODS[name])


INTO = ["two", "te and unet", "own preset", "elements", "dtype", "metadata", "left out", "lambda"]


@pytest.mark.parametrize("name", INTO)
def test_a_checkpoint_repeats(folder: Path, name: str) -> None:
    repeats(folder, "merge", *STACKS[name], "--into", "base.safetensors")


@pytest.mark.parametrize("name", [name for name in METHODS if "--rank" not in METHODS[name]])
def test_a_method_into_a_checkpoint_repeats(folder: Path, name: str) -> None:
    """With layers that only one of the LoRAs has a strength at."""
    stack = ["a.safetensors:0.7:lbw=OUTALL", "b.safetensors:-0.4:te=0.3"]
    repeats(folder, "merge", *stack, *METHODS[name], "--into", "base.safetensors")


def test_a_model_on_paper_repeats(folder: Path) -> None:
    base = "base.safetensors+b.safetensors:0.5:lbw=FACE"
    more = ["--presets-file", "own.txt"]
    made = repeats(folder, "merge", "a.safetensors:0.7", "--into", base, *more)
    (on_base,) = recipe_of(made)["options"]["into"]["loras"]  # type: ignore[index, call-overload]
    assert on_base["strength"].startswith("0.5:lbw=1.0,0.0,")


def test_a_folder_of_components_repeats(folder: Path) -> None:
    repeats(folder, "merge", "a.safetensors:0.7", "--into", "pipeline", form="")


def test_a_shard_stands_for_the_folder_that_was_written(folder: Path) -> None:
    tensors = tensors_of(Path("base.safetensors"))
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    Path("sharded").mkdir()
    where = {key: names[place % 2] for place, key in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if where[k] == name}, Path("sharded", name))
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    made = repeats(folder, "merge", "a.safetensors", "--into", f"sharded/{names[0]}", form="")
    again = ["--lora-dir", folder.parent / "attic", "-o", "second"]
    ran("merge", "--recipe", made / names[1], *again)
    assert bool(same(made, Path("second")))


def test_a_peft_folder_repeats(folder: Path) -> None:
    made = repeats(folder, "merge", "peft-a:0.7", "peft-b:-0.4", form="")
    assert (made / "adapter_config.json").is_file()


def test_peft_names_in_one_file_repeat(folder: Path) -> None:
    made = repeats(folder, "merge", "peft-a:0.7", "peft-b:-0.4")
    assert made.is_file()


def test_an_adapter_on_its_model_repeats(folder: Path) -> None:
    repeats(folder, "merge", "dora.safetensors:0.5", "a.safetensors", "--rank", 3, *ON_BASE)


OUT03 = "1," * 8 + "0.5" + ",1" * 8
ON_BASE = ["--against", "base.safetensors"]
OTHERS: dict[str, list[object]] = {
    "difference": ["extract", "a.safetensors:0.7", "b.safetensors+a.safetensors:-0.25"],
    "on one base": [
        *("extract", "base.safetensors+a.safetensors:lbw=FACE", "base.safetensors"),
        *("--presets-file", "own.txt", "--to", "diffusers"),
    ],
    "two models": [
        *("extract", "base.safetensors", "tuned.safetensors+a.safetensors:0.5", "--rank", 2),
        *("--only", "OUT", "--exclude", "attn1", "--alpha", 1, "--svd", "fast"),
    ],
    "dora": ["extract", "base.safetensors", "tuned.safetensors", "--as", "dora", "--only", "MID"],
    "resize": ["resize", "b.safetensors", "--energy", 0.9, "--dtype", "fp32"],
    "cut by name": ["cut-blocks", "a.safetensors", "--preset", "OUTALL", "--metadata", "x=y"],
    "cut by own name": [
        *("cut-blocks", "a.safetensors", "--preset", "FACE", "--presets-file", "own.txt"),
        *("--elements", "OUT03:attn2:0.5"),
    ],
    "keep": ["cut-blocks", "a.safetensors", "--keep", "OUT03-OUT06,MID"],
    "drop": ["cut-blocks", "foreign.safetensors", "--drop", "BASE", "--allow-unmatched"],
    "resize by score": [
        *("resize", "a.safetensors", "--threshold", -4.5, "--score", "fro-ckpt=0.8,spn-lora=0.2"),
        *("--rescale", 1.5, *ON_BASE),
    ],
    "resize on a model": ["resize", "dora.safetensors", "--rank", 1, *ON_BASE],
    "cut on a model": ["cut-blocks", "dora.safetensors", "--weights", OUT03, *ON_BASE],
    "convert on a model": ["convert", "dora.safetensors", "--as", "lora", "--rank", 2, *ON_BASE],
    "convert": ["convert", "a.safetensors", "--to", "comfyui"],
    "repair": ["convert", "a.safetensors", "--repair"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_writing_command_repeats(folder: Path, name: str) -> None:
    repeats(folder, *OTHERS[name])


@pytest.mark.parametrize("te", [True, False])
def test_a_peft_folder_of_components_repeats(folder: Path, te: bool) -> None:
    source = "a.safetensors" if te else "peft-a"
    repeats(folder, "convert", source, "--to", "peft", "--dtype", "fp32", form="")


def in_process(seed: int, *arguments: str) -> str:
    """Run Python with another hash seed and number of threads."""
    ways = {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(1 + seed)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **ways},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_what_a_stack_is_sorted_by_does_not_hang_on_the_hash_seed() -> None:
    """One LoRA twice is told apart by its rules; sums of another order have other last bits."""
    code = (
        "from lorakit.names.elements import parse_elements as read;"
        "from lorakit.names.families import ARCHITECTURES as known;"
        "print([read('IN04-OUT08:attn:0.5,NOT MID:ff:2', a) for a in known if 'MID' in a.blocks])"
    )
    said = [in_process(seed, "-c", code) for seed in range(4)]
    assert len(said[0]) > 100 and said == said[:1] * 4


def test_threads_memory_and_the_hash_seed_change_no_bit(folder: Path) -> None:
    """One LoRA twice, told apart by its elements' rules alone."""
    twice = ["a.safetensors:lbwe=IN04-OUT08:attn:0.5", "a.safetensors:lbwe=IN05-OUT05:attn:-0.3"]
    stack = [*twice, "b.safetensors:0.3", "--rank", "4", "--dtype", "fp32"]
    said = [
        ("merge", *stack, "-o", "made.safetensors", "--threads", "1"),
        ("merge", "--recipe", "made.safetensors", "-o", "again.safetensors", "--threads", "3",
         "--memory", "3M", "--device", "cpu"),
    ]  # fmt: skip
    for seed, arguments in zip((0, 3), said, strict=True):
        in_process(seed, "-m", "lorakit", *arguments)
    assert bool(same(folder / "made.safetensors", folder / "again.safetensors"))


def test_the_model_may_have_another_name(folder: Path) -> None:
    made, again = folder / "made.safetensors", folder / "again.safetensors"
    ran("merge", "a.safetensors", "--into", "base.safetensors", "-o", made)
    Path("base.safetensors").rename("model.safetensors")
    words = refused("merge", "--recipe", made, "-o", again)
    assert "base.safetensors (model, " in words
    given = ["--into", "model.safetensors"]
    assert ran("merge", "--recipe", made, "-o", again, *given, "--dry-run")["plan"]
    assert not again.exists()
    report = ran("merge", "--recipe", made, "-o", again, *given, "--verify")
    assert report["verified"]["layers"] > 10
    assert report["notes"] == ["again.safetensors has the same bytes as made.safetensors."]
    assert bool(same(made, again))


def test_a_repetition_repeats_too(folder: Path) -> None:
    ran("merge", *TWO, "-o", "made.safetensors")
    ran("merge", "--recipe", "made.safetensors", "-o", "second.safetensors")
    ran("merge", "--recipe", "second.safetensors", "-o", "third.safetensors")
    assert bool(same(Path("made.safetensors"), Path("third.safetensors")))


def test_of_several_files_of_one_name_the_right_one_is_taken(folder: Path) -> None:
    for name in ("a", "b"):
        place = Path("loras") / name / "weights.safetensors"
        place.parent.mkdir(parents=True)
        shutil.move(f"{name}.safetensors", place)
    files = [f"loras/{name}/weights.safetensors:{s}" for name, s in (("a", 0.7), ("b", -0.4))]
    ran("merge", *files, "-o", "made.safetensors")
    again = ["--lora-dir", "pipeline", "--lora-dir", "loras", "-o", "again.safetensors"]
    ran("merge", "--recipe", "made.safetensors", *again)
    assert bool(same(Path("made.safetensors"), Path("again.safetensors")))


def test_tags_are_looked_for_in_every_folder(folder: Path) -> None:
    for name in ("a", "b"):
        Path("more", name).mkdir(parents=True)
        shutil.move(f"{name}.safetensors", f"more/{name}")
    folders = ["--lora-dir", "more/a", "--lora-dir", "more/b"]
    ran("merge", "--prompt", "<lora:a:1> <lora:b:1>", *folders, "-o", "made.safetensors")
    assert "more/b" in refused(
        "merge", "--prompt", "<lora:c:1>", *folders, "-o", "no.safetensors", status=2
    )  # fmt: skip


# What a recipe holds


def test_the_recipe_holds_what_repeating_takes(folder: Path) -> None:
    arguments = ["a.safetensors:0.7", "b.safetensors:lbw=FACE", "--presets-file", "own.txt"]
    model = ["--into", "base.safetensors+b.safetensors:2"]
    more = ["--dtype", "fp32", "--metadata", "x=y", "--allow-unmatched"]
    ran("merge", *arguments, *model, *more, "-o", "made.safetensors")
    recipe = recipe_of(Path("made.safetensors"))
    options = recipe["options"]
    assert isinstance(options, dict)
    into = options.pop("into")
    assert options == {
        "method": "linear",
        "dtype": "F32",
        "metadata": {"x": "y"},
        "allow_unmatched": True,
    }
    loras = into.pop("loras")
    assert into == model_record("base.safetensors")
    vector = ",".join(repr(float(value)) for value in FACE.split(","))
    inputs = recipe["inputs"]
    assert isinstance(inputs, list)
    said = [(one["lora"], one["strength"]) for one in (*inputs, *loras)]
    assert said == [
        ("a.safetensors", "0.7"),
        ("b.safetensors", f"lbw={vector}"),
        ("b.safetensors", "2"),
    ]


SPELLED = {"kind": "as", "dialect": "to"}
INPUTS = {"lora", "loras", "original", "tuned", "prompt", "folders", "presets_file", "repeated"}
NO_MATTER = {
    *("output", "overwrite", "device", "threads", "memory", "dry_run", "verify", "json"),
    *("quiet", "verbose", "no_metadata", "list_only", "analyze"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_recipe_or_shapes_no_byte(command: str) -> None:
    """Whoever adds an option has to say which, so that `--recipe` keeps its promise."""
    names = {str(parameter.name) for parameter in load_command(command).params}
    recorded = {SPELLED.get(name, name) for name in names - INPUTS - NO_MATTER}
    assert recorded <= {"into", "against", *OPTIONS}


def test_how_it_was_computed_is_not_in_the_recipe(folder: Path) -> None:
    outs = []
    for name, more in (("x", []), ("y", ["--threads", 2, "--memory", "4M", "--device", "cpu"])):
        outs.append(folder / name / "made.safetensors")
        ran("merge", *TWO, *more, "-o", outs[-1])
    assert bool(same(*outs))


finite = st.floats(-1e29, 1e29, allow_nan=False)


@given(finite, st.none() | finite, st.none() | finite, st.sampled_from([None, "OUTALL", FACE]))
def test_strengths_come_back_from_their_text(
    strength: float, te: float | None, unet: float | None, lbw: str | None
) -> None:
    spec = LoraSpec(path="p", strength=strength, te=te, unet=unet, lbw=lbw, lbwe="OUT03:ff:-0.5")
    text = format_lora(spec).removeprefix("p:")
    assert lora_spec("p", text.split(":"), text) == spec


def methods() -> list[Method]:
    found = []
    for name, entry in MENU.items():
        for flavor in entry.flavors:
            plain = Method(name=name, flavor=flavor)
            whole = plain.filled(into_lora=True).scope == "model"
            spaces = [
                Method(name=name, flavor=flavor, space=space)
                for space in entry.spaces
                if space == "full" or not whole
            ]
            pico = [
                Method(name=name, flavor=flavor, calibrate="pico", match_norm=norm)
                for norm in (None, "none", "mean", "linear")
            ]
            found += [plain, *spaces, *pico]
    return found


@pytest.mark.parametrize("into_lora", [True, False])
def test_methods_come_back_from_a_recipe(into_lora: bool) -> None:
    names = [field.name for field in fields(Method) if field.name != "name"]
    for method in methods():
        filled = method.filled(into_lora=into_lora)
        said = json.loads(json.dumps(method_parameters(filled)))
        assert set(said) <= {"method", *names}
        again = Method(name=said.pop("method"), **said)
        assert again.filled(into_lora=into_lora) == filled


def test_an_input_is_found_however_its_accents_are_stored(folder: Path) -> None:
    """Made on macOS, where they are apart from their letters, and repeated elsewhere."""
    made, attic = folder / "made.safetensors", folder.parent / "attic"
    attic.mkdir()
    apart, joined = (normalize(form, "コピー機.safetensors") for form in ("NFD", "NFC"))
    Path("a.safetensors").rename(apart)
    ran("merge", apart, "-o", made)
    Path(apart).rename(attic / joined)
    ran("merge", "--recipe", made, "--lora-dir", attic, "-o", "again.safetensors")
    assert same(Path("again.safetensors"), made)
