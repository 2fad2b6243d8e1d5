"""The command line's LORA and MODEL strings, and the web UI's tags."""

from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import SpecError
from lorakit.names.specs import (
    LoraSpec,
    ModelSpec,
    format_lora,
    parse_lora,
    parse_model,
    parse_sum,
)
from lorakit.names.tags import find_lora, parse_prompt, parse_tag

FILES = {
    "a.safetensors",
    "b.safetensors",
    "base.safetensors",
    "a+b.safetensors",
    "with:colon.safetensors",
    "C:\\loras\\a+b.safetensors",
    "C:\\base.safetensors",
    "/loras/x",
    "/loras/x:0.5",
}


def exists(path):
    return path in FILES


def nothing(path):
    return False


def lora(text, present=exists):
    return parse_lora(text, exists=present)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", {}),
        ("a.safetensors:0.8", {"strength": 0.8}),
        ("a.safetensors:-1", {"strength": -1.0}),
        ("a.safetensors:+0.5", {"strength": 0.5}),
        ("a.safetensors:1e-3", {"strength": 1e-3}),
        ("a.safetensors:0", {"strength": 0.0}),
        ("a.safetensors:te=0.5", {"te": 0.5}),
        ("a.safetensors:0.8:te=0:unet=1", {"strength": 0.8, "te": 0.0, "unet": 1.0}),
        ("a.safetensors:0.8:lbw=OUTALL", {"strength": 0.8, "lbw": "OUTALL"}),
        ("a.safetensors:lbw=1,0,1", {"lbw": "1,0,1"}),
        ("a.safetensors:lbw=INS:0.5", {"lbw": "INS", "strength": 0.5}),
        ("a.safetensors:lbwe=IN05:attn:0,MID:ff:1", {"lbwe": "IN05:attn:0,MID:ff:1"}),
    ],
)
def test_a_lora_and_its_strengths(text, expected):
    assert lora(text) == LoraSpec(path="a.safetensors", **expected)
    assert lora(text, nothing) == lora(text)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("with:colon.safetensors", "with:colon.safetensors", 1.0),
        ("with:colon.safetensors:0.8", "with:colon.safetensors", 0.8),
        ("a+b.safetensors:0.8", "a+b.safetensors", 0.8),
        ("C:\\loras\\a+b.safetensors:0.8", "C:\\loras\\a+b.safetensors", 0.8),
        ("/loras/x:0.5", "/loras/x:0.5", 1.0),
        ("/loras/x:0.5:0.25", "/loras/x:0.5", 0.25),
        ("D:\\missing.safetensors:0.8", "D:\\missing.safetensors", 0.8),
        ("d:/missing.safetensors", "d:/missing.safetensors", 1.0),
        ("missing+odd.safetensors:2", "missing+odd.safetensors", 2.0),
        ("\\\\?\\D:\\missing.safetensors:2", "\\\\?\\D:\\missing.safetensors", 2.0),
        ("\\\\server\\share\\missing.safetensors:2", "\\\\server\\share\\missing.safetensors", 2.0),
    ],
)
def test_a_path_that_exists_is_taken_whole(text, path, strength):
    assert lora(text) == LoraSpec(path=path, strength=strength)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.safetensors:strong", "'strong' is no strength"),
        ("a.safetensors:", "'' is no strength"),
        ("a.safetensors:nan", "finite"),
        ("a.safetensors:inf", "finite"),
        ("a.safetensors:1e31", "at most 1e\\+30"),
        ("a.safetensors:te=-inf", "finite"),
        ("a.safetensors:te=x", "'x' is no strength"),
        ("a.safetensors:start=5", "cannot be baked into a file"),
        ("a.safetensors:0.8:stop=5", "cannot be baked into a file"),
        ("a.safetensors:step=2-10", "cannot be baked into a file"),
        ("a.safetensors:TE=1", "unknown or given twice"),
        ("a.safetensors:te=1:te=2", "unknown or given twice"),
        ("a.safetensors:1:2:3", "at most two"),
        ("", "no path"),
        (":0.5", "no path"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        lora(text)


STRENGTHS = st.floats(min_value=-1e30, max_value=1e30)


@given(
    strength=STRENGTHS,
    te=st.none() | STRENGTHS,
    unet=st.none() | STRENGTHS,
    lbw=st.none() | st.sampled_from(["OUTALL", "1,0,-0.5"]),
    lbwe=st.none() | st.sampled_from(["IN05-OUT05:attn:0", ":ff:1,MID::0"]),
)
def test_a_spec_survives_the_round_trip(strength, te, unet, lbw, lbwe):
    spec = LoraSpec(path="a.safetensors", strength=strength, te=te, unet=unet, lbw=lbw, lbwe=lbwe)
    assert lora(format_lora(spec)) == spec
    model = f"base.safetensors+{format_lora(spec)}+b.safetensors"
    assert parse_model(model, exists=exists).loras == (spec, LoraSpec(path="b.safetensors"))


def test_a_strength_is_written_short():
    assert format_lora(LoraSpec(path="a", strength=0.8, te=1.0)) == "a:0.8:te=1"
    assert format_lora(LoraSpec(path="a")) == "a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base.safetensors", ()),
        ("base.safetensors+a.safetensors", (LoraSpec(path="a.safetensors"),)),
        (
            "base.safetensors+a.safetensors:0.9+b.safetensors:-1:lbw=MIDD",
            (
                LoraSpec(path="a.safetensors", strength=0.9),
                LoraSpec(path="b.safetensors", strength=-1.0, lbw="MIDD"),
            ),
        ),
        ("base.safetensors+a+b.safetensors", (LoraSpec(path="a+b.safetensors"),)),
        (
            "base.safetensors+a+b.safetensors:+1e+1",
            (LoraSpec(path="a+b.safetensors", strength=10.0),),
        ),
        (
            "base.safetensors+C:\\loras\\a+b.safetensors:te=+0.5+b.safetensors",
            (
                LoraSpec(path="C:\\loras\\a+b.safetensors", te=0.5),
                LoraSpec(path="b.safetensors"),
            ),
        ),
        ("base.safetensors+missing:0.5", (LoraSpec(path="missing", strength=0.5),)),
    ],
)
def test_a_model_with_loras_on_it(text, expected):
    found = parse_model(text, exists=exists)
    assert found == ModelSpec(path="base.safetensors", loras=expected)


def test_a_model_on_a_windows_drive():
    found = parse_model("C:\\base.safetensors+a.safetensors:0.5", exists=exists)
    assert found.path == "C:\\base.safetensors"
    assert found.loras == (LoraSpec(path="a.safetensors", strength=0.5),)


def test_where_no_path_exists_the_first_plus_divides():
    assert [term.path for term in parse_sum("m+n:1+o", exists=nothing)] == ["m", "n", "o"]


@pytest.mark.parametrize("text", ["base.safetensors:0.5", "base.safetensors:lbw=ALL+a.safetensors"])
def test_a_model_has_no_strength(text):
    with pytest.raises(SpecError, match="a model has no strength"):
        parse_model(text, exists=exists)


@pytest.mark.parametrize("text", ["base.safetensors+", "+a.safetensors", "a.safetensors++b"])
def test_a_sum_with_a_missing_term_is_refused(text):
    with pytest.raises(SpecError, match="no path"):
        parse_sum(text, exists=exists)


def find(name):
    return f"{name}.safetensors"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:style>", {}),
        ("<lora:style:0.8>", {"strength": 0.8}),
        ("  <lora:style:0.8:lbw=OUTALL>\n", {"strength": 0.8, "lbw": "OUTALL"}),
        ("<lora:style:0.5:0.3>", {"strength": 0.3, "te": 0.5, "unet": 0.3}),
        ("<lora:style:1:te=0.5:unet=0>", {"strength": 1.0, "te": 0.5, "unet": 0.0}),
        ("<lora:style:1:1,0,0.5>", {"strength": 1.0, "lbw": "1,0,0.5"}),
        ("<lora:style:1:1:OUTALL>", {"strength": 1.0, "te": 1.0, "unet": 1.0, "lbw": "OUTALL"}),
        ("<lora:style:1:w=MIDD>", {"strength": 1.0, "lbw": "MIDD"}),
        (
            "<lora:style:1:lbw=ALL:lbwe=IN05-OUT05:attn:0>",
            {"strength": 1.0, "lbw": "ALL", "lbwe": "IN05-OUT05:attn:0"},
        ),
    ],
)
def test_a_pasted_tag_is_read_as_the_web_ui_reads_it(tag, expected):
    assert parse_tag(tag, find) == LoraSpec(path="style.safetensors", **expected)


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<lora:style:1:start=5>", "cannot be baked"),
        ("<lora:style:nan>", "finite"),
        ("<lora:style:inf>", "finite"),
        ("<lora:style:1:1:1:1>", "at most two"),
        ("<lora:a:1><lora:b:1>", "expected one tag"),
        ("<hypernet:style:1>", "expected one tag"),
        ("lora:style:1", "expected one tag"),
    ],
)
def test_a_tag_that_cannot_be_read_is_refused(tag, message):
    with pytest.raises(SpecError, match=message):
        parse_tag(tag, find)


def test_the_tags_of_a_prompt_come_in_order():
    prompt = "masterpiece, (<lora:a:0.8>:1.2), cat, <lora:b:0.5:0.3> <lora:a>"
    found = parse_prompt(prompt, find)
    assert [spec.path for spec in found] == ["a.safetensors", "b.safetensors", "a.safetensors"]
    assert (found[1].te, found[1].unet) == (0.5, 0.3)


def test_a_prompt_without_a_tag_is_refused():
    with pytest.raises(SpecError, match=r"no <lora:"):
        parse_prompt("masterpiece, cat", find)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("style.safetensors", "style.pt", "sub/other.v1.safetensors", "old.ckpt"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_name_is_a_files_stem_in_any_subfolder(folder):
    assert find_lora("style", folder) == str(folder / "style.safetensors")
    assert find_lora("other.v1", folder) == str(folder / "sub" / "other.v1.safetensors")
    assert find_lora("old", folder) == str(folder / "old.ckpt")


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_with_accents_is_found_however_they_are_stored(folder, stored):
    """What was packed on macOS has them apart from their letters: ピ is ヒ and a ring."""
    file = folder / f"{normalize(stored, 'コピー機é')}.safetensors"
    file.touch()
    for typed in ("NFC", "NFD"):
        assert find_lora(normalize(typed, "コピー機é"), folder) == str(file)


@pytest.mark.parametrize("name", ["styl", "style.safetensors", "other", "sub", "*", ""])
def test_a_name_that_is_not_there_is_refused(folder, name):
    with pytest.raises(SpecError, match="no LoRA of that name"):
        find_lora(name, folder)


def test_a_name_of_two_files_is_refused(folder):
    (folder / "sub" / "style.safetensors").touch()
    with pytest.raises(SpecError, match="name of several files"):
        find_lora("style", folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match="expected a folder of LoRAs"):
        find_lora("style", tmp_path / "nowhere")
