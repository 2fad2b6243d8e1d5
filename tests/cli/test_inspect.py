"""What `lorakit inspect` prints and writes."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.cli._inspect_words import summary
from lorakit.cli._recipe_words import recipe_in_words
from lorakit.cli._words import in_words, label
from lorakit.names.blocks import format_ids, parse_ids
from lorakit.names.families import ARCHITECTURES
from lorakit.operations.inspection import Inspection
from tests.helpers import ran, refused, run, tensors_of

STABLE = {
    "schema", "command", "path", "kind", "architecture", "layout", "tensors", "nbytes", "dtypes",
    "layers", "adapters", "components", "ranks", "alphas", "blocks", "dead", "unmeasured",
    "unclaimed", "metadata",
}  # fmt: skip
ADDED = {
    "kinds", "cells", "norm", "not_finite", "faults", "spectrum", "against", "unmatched",
}  # fmt: skip
GROUP = {"id", "layers", "parameters", "norm", "share", "effective_rank", "dead", "relative"}
PARTS = "unet.down_blocks.0.attentions.0.transformer_blocks.0"


def changed(path: Path, out: Path, **changes: Tensor | None) -> Path:
    """Write a LoRA with some tensors changed, or left out where there is None."""
    tensors = {k: v for k, v in tensors_of(path).items() if k not in changes}
    tensors |= {key: value for key, value in changes.items() if value is not None}
    return synthetic.write_lora(out, tensors)


@pytest.fixture
def faulty(sd15_lora: Path, tmp_path: Path) -> Path:
    """Return a LoRA with a dead layer, one that holds NaN, and one without alpha."""
    tensors = tensors_of(sd15_lora)
    ups = [key for key in tensors if key.endswith("lora_up.weight") and "unet" in key]
    odd = tensors[ups[5]].clone()
    odd[0, 0] = float("nan")
    alpha = ups[9].replace("lora_up.weight", "alpha")
    changes = {ups[0]: torch.zeros_like(tensors[ups[0]]), ups[5]: odd, alpha: None}
    return changed(sd15_lora, tmp_path / "faulty.safetensors", **changes)


def test_json_keeps_its_keys_and_has_more(sd15_lora: Path, sd15: Path) -> None:
    for arguments in ([], ["--blocks"], ["--spectrum"], ["--against", sd15]):
        found = ran("inspect", sd15_lora, *arguments)
        assert found.keys() == STABLE | ADDED
        assert found["schema"] == 1 and found["command"] == "inspect"
        cells = [group for groups in found["cells"].values() for group in groups]
        assert all(group.keys() == GROUP for group in (*found["blocks"], *found["kinds"], *cells))
        assert sum(group["layers"] for group in cells) == found["layers"] == 264
    assert ran("inspect", sd15_lora)["faults"] is None, "the header does not tell"
    assert ran("inspect", sd15_lora, "--blocks")["faults"] == []
    spectrum = ran("inspect", sd15_lora, "--spectrum")["spectrum"]
    assert spectrum.keys() == {"ranks", "total", "blocks"}
    assert spectrum["total"].keys() == {"id", "rank", "needed", "kept"}
    assert len(spectrum["total"]["kept"]) == len(spectrum["ranks"])


def test_the_map_can_be_read_without_colour(sd15_lora: Path) -> None:
    found, text = (
        ran("inspect", sd15_lora, "--blocks"),
        run("inspect", sd15_lora, "--blocks").output,
    )
    assert "\x1b" not in text, "nobody's terminal: no colours"
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["block"] == ["block", "attn1", "attn2", "ff", "proj", "TE", "all", "rank", "norm"]
    (middle,) = (block for block in found["blocks"] if block["id"] == "MID")
    cells = [f"{100 * cell['share']:.1f}" for cell in found["cells"]["MID"]]
    assert lines["MID"][1:5] == cells
    assert lines["MID"][5:] == [
        *(f"{100 * middle['share']:.1f}", f"{middle['effective_rank']:.1f}"),
        f"{middle['norm']:.4f}",
    ]
    assert lines["BASE"][1] == lines["all"][5] == f"{100 * found['kinds'][-1]['share']:.1f}"
    assert "effective rank" not in text
    assert "effective rank" in run("inspect", sd15_lora, "--blocks", "-v").output


def test_a_terminal_gets_colours() -> None:
    from rich.console import Console

    from lorakit.cli._inspect_view import heat_table
    from lorakit.cli._measures import SHARE
    from lorakit.operations.inspection import Group, Inspection

    cells = (Group(id="attn1", layers=1, parameters=1, norm=1.0, share=0.2, effective_rank=1.0),)
    blocks = tuple(
        Group(id=block, layers=1, parameters=1, norm=1.0, share=0.2, effective_rank=1.0)
        for block in ("MID", "OUT00")
    )
    found = Inspection(
        path="a", kind="lora", architecture=None, layout="kohya", tensors=1, nbytes=1, dtypes={},
        layers=1, blocks=blocks, kinds=cells, cells={"MID": cells},
    )  # fmt: skip
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as capture:
        console.print(heat_table(found, SHARE))
    assert "\x1b[38;2;255;255;255;48;2;8;52;100m 20.0\x1b[0m" in capture.get()


def test_faults_are_told_and_do_not_stop_the_measuring(faulty: Path) -> None:
    found = ran("inspect", faulty, "--blocks", "--spectrum")
    odd, dead, silent = found["faults"]
    assert found["not_finite"] == [f"{PARTS}.attn1.to_v"] and f"{PARTS}.attn1.to_v" in odd
    assert odd.startswith("1 layer holds NaN or infinity (")
    assert found["dead"] == ["unet.down_blocks.0.attentions.0.proj_in"]
    assert dead.startswith("1 layer changes nothing (unet.down_blocks.0.attentions.0.proj_in)")
    assert silent.startswith("1 layer has no alpha") and "--repair" in silent
    assert found["alphas"] == {"2": 263, "none (= rank)": 1}
    cell = next(cell for cell in found["cells"]["IN01"] if cell["id"] == "proj")
    assert (cell["layers"], cell["dead"]) == (2, 1)
    assert sum(block["share"] for block in found["blocks"]) == pytest.approx(1)
    told = run("inspect", faulty, "--blocks").output
    assert all(" ".join(told.split()).count(sentence) == 1 for sentence in found["faults"])


def test_a_change_larger_than_the_weight_is_a_fault(
    sd15: Path, sd15_lora: Path, tmp_path: Path
) -> None:
    assert ran("inspect", sd15_lora, "--against", sd15)["faults"] == []
    up = next(k for k in sorted(tensors_of(sd15_lora)) if k.endswith("attn2_to_v.lora_up.weight"))
    burnt = changed(
        sd15_lora, tmp_path / "burnt.safetensors", **{up: 300 * tensors_of(sd15_lora)[up]}
    )
    (fault,) = ran("inspect", burnt, "--against", sd15)["faults"]
    assert fault.startswith("1 layer changes more than the whole weight, ‖ΔW‖ > ‖W‖ (unet.")
    assert ran("inspect", burnt, "--blocks")["faults"] == [], "without a model nobody knows"


def test_a_stale_hash_is_a_fault(sd15_lora: Path, tmp_path: Path) -> None:
    told = {"ss_output_name": "a"}
    path = synthetic.write_lora(tmp_path / "stale.safetensors", tensors_of(sd15_lora), told)
    assert ran("inspect", path, "--blocks")["faults"] == []
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (fault,) = ran("inspect", path, "--blocks")["faults"]
    assert fault.startswith("sshs_model_hash is of other tensors")
    ran("metadata", "hash", path, "--in-place")
    assert ran("inspect", path, "--blocks")["faults"] == []


def test_the_alpha_of_one_part_of_a_fused_layer_is_a_fault(tmp_path: Path) -> None:
    """q, k and v trained apart and stored in blocks, as `convert --repair` mends."""
    rank, width = 2, 3072
    up = torch.zeros(3 * width, 3 * rank)
    for part in range(3):
        up[part * width : (part + 1) * width, part * rank : (part + 1) * rank] = 0.01
    at, other = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {
        f"{at}.lora_up.weight": up,
        f"{at}.lora_down.weight": torch.randn(3 * rank, width, generator=_seeded()),
        f"{at}.alpha": torch.tensor(2.0),
        f"{other}.lora_up.weight": torch.randn(width, rank, generator=_seeded()),
        f"{other}.lora_down.weight": torch.randn(rank, width, generator=_seeded()),
        f"{other}.alpha": torch.tensor(2.0),
    }
    path = synthetic.write_lora(tmp_path / "split.safetensors", tensors)
    (fault,) = ran("inspect", path, "--blocks")["faults"]
    assert fault.startswith("1 layer has the alpha of one of 3 parts and so 1/3 of the strength")


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_a_folder_and_a_pickle_are_measured_too(sd15_lora: Path, tmp_path: Path) -> None:
    norm = ran("inspect", sd15_lora, "--blocks")["norm"]
    ran("convert", sd15_lora, "--to", "peft", "--dtype", "fp32", "-o", tmp_path / "peft")
    torch.save(tensors_of(sd15_lora), tmp_path / "a.pt")
    for path in (tmp_path / "peft", tmp_path / "a.pt"):
        found = ran("inspect", path, "--blocks", "--spectrum")
        assert found["norm"] == pytest.approx(norm, rel=1e-6) and found["faults"] == []
        assert run("inspect", path, "--svg", tmp_path / f"{path.name}.svg").exit_code == 0


def test_advice_is_one_sentence_with_a_command(make_lora) -> None:  # type: ignore[no-untyped-def]
    path = make_lora("sd1", rank=16, te=False)
    needed = ran("inspect", path, "--spectrum")["spectrum"]["total"]["needed"]
    assert needed["90"] <= needed["95"] <= needed["99"] < 16
    rank = needed["99"]
    first, command, *_ = run("inspect", path, "--spectrum").output.splitlines()
    assert first.endswith(f"Rank {rank} of 16 keeps 99 % of the change.")
    output = f"{path.stem}-rank{rank}.safetensors"
    assert command.split() == ["lorakit", "resize", str(path), "--rank", str(rank), "-o", output]


def test_a_lora_that_needs_all_of_its_rank_is_told_so(sd15_lora: Path, tmp_path: Path) -> None:
    ran("resize", sd15_lora, "--rank", 1, "-o", tmp_path / "one.safetensors")
    first, second, *_ = run("inspect", tmp_path / "one.safetensors", "--spectrum").output.split(
        "\n"
    )
    assert first.endswith("It needs its whole rank of 1 to keep 99 % of the change.")
    assert not second, "no command"


def test_against_a_model_tells_sizes_and_what_it_lacks(
    sd15: Path,
    sd15_lora: Path,
    sdxl: Path,
    make_lora,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    found = ran("inspect", sd15_lora, "--against", sd15)
    assert found["against"] == str(sd15)
    assert all(0.002 < block["relative"] < 0.05 for block in found["blocks"])
    text = run("inspect", sd15_lora, "--against", sd15).output
    assert "of W, %" in text and "‖ΔW‖ / ‖W‖" in text
    tensors = tensors_of(sd15_lora)
    tensors |= {
        key.replace("down_blocks_0", "down_blocks_9"): value
        for key, value in tensors.items()
        if "down_blocks_0_attentions_0_proj_in" in key
    }
    odd = synthetic.write_lora(tmp_path / "odd.safetensors", tensors)
    assert len(ran("inspect", odd, "--against", sd15)["unmatched"]) == 1
    assert "1 layer has no place in it" in run("inspect", odd, "--against", sd15).output
    assert "made for another model" in refused("inspect", sd15_lora, "--against", sdxl)
    lora = refused("inspect", sd15_lora, "--against", sd15_lora, status=2)
    assert "--against takes a model, found a LoRA" in lora


def test_a_model_that_holds_nan_is_no_yardstick(
    sd15: Path, sd15_lora: Path, tmp_path: Path
) -> None:
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    odd = tensors_of(sd15)[key].clone()
    odd[0, 0] = float("inf")
    broken = changed(sd15, tmp_path / "broken.safetensors", **{key: odd})
    said = refused("inspect", sd15_lora, "--against", broken)
    assert "attn1.to_q holds NaN or infinity" in said


def test_a_model_without_any_of_the_layers_is_refused(sd15_lora: Path, tmp_path: Path) -> None:
    path = synthetic.write_checkpoint(tmp_path / "other.safetensors", {"model.norm.weight": (4,)})
    assert "none of the LoRA's layers" in refused("inspect", sd15_lora, "--against", path)


@pytest.mark.parametrize("option", ["--spectrum", "--against"])
def test_a_checkpoint_has_no_spectrum(sd15: Path, option: str) -> None:
    arguments = ["--against", sd15] if option == "--against" else [option]
    assert "found a checkpoint" in refused("inspect", sd15, *arguments, status=2)


def test_a_checkpoint_shows_its_blocks(sd15: Path) -> None:
    assert "OUT11" in run("inspect", sd15, "--blocks").output


def test_the_page_and_the_picture_hold_several_files(
    sd15_lora: Path, faulty: Path, sd15: Path, tmp_path: Path
) -> None:
    html, svg = tmp_path / "a.html", tmp_path / "a.svg"
    done = run("inspect", sd15_lora, faulty, sd15, "--html", html, "--svg", svg)
    assert done.exit_code == 0 and done.output.splitlines()[-2:] == [
        f"written: {html}",
        f"written: {svg}",
    ]
    page, root = html.read_text(encoding="utf-8"), ET.fromstring(svg.read_text(encoding="utf-8"))
    assert page.count("<section style") == 3 and page.count("<svg") == 2
    assert page.count('<table class="heat bars">') == 6
    said = " ".join("".join(root.itertext()).split())
    for text in (page, said):
        for name in (sd15_lora.name, faulty.name, sd15.name):
            assert name in text
        assert "Share of the change" in text and "Energy kept" in text and "half way" in text
        assert "NaN or infinity" in text
    assert "Effective rank" in page and "Norm of the change" in page
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


def test_the_page_of_a_hostile_file_loads_nothing(sd15_lora: Path, tmp_path: Path) -> None:
    told = {"ss_training_comment": "<script>alert(1)</script><img src=http://x/>\x1b[2J"}
    path = synthetic.write_lora(tmp_path / "<b>.safetensors", tensors_of(sd15_lora), told)
    html = tmp_path / "a.html"
    assert run("inspect", path, "--html", html, "--svg", tmp_path / "a.svg").exit_code == 0
    page = html.read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "\x1b" not in page and "default-src 'none'" in page
    ET.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))


def test_markup_and_escapes_of_metadata_are_text(sd15_lora: Path, tmp_path: Path) -> None:
    told = {"ss_training_comment": "[bold]a[/bold] [/] \x1b[2Jb\nc", "[red]key": "x"}
    path = synthetic.write_lora(tmp_path / "a.safetensors", tensors_of(sd15_lora), told)
    for arguments in (
        ["inspect", path],
        ["inspect", path, "--metadata"],
        ["metadata", "show", path],
    ):
        text = run(*arguments).output
        assert "[bold]a[/bold] [/] ?[2Jb c" in text and "\x1b" not in text
    assert "[red]key" in text


def test_an_output_is_written_once_and_never_over_an_input(
    sd15_lora: Path, sd15: Path, tmp_path: Path
) -> None:
    html = tmp_path / "a.html"
    assert run("inspect", sd15_lora, "--html", html).exit_code == 0
    before = html.read_bytes()
    assert "use --overwrite" in refused("inspect", sd15_lora, "--html", html)
    assert bool(html.read_bytes() == before)
    assert run("inspect", sd15_lora, "--html", html, "--overwrite").exit_code == 0
    assert bool(html.read_bytes() == before), "the same file, the same page"
    link = tmp_path / "link.html"
    link.symlink_to(sd15_lora)
    said = refused("inspect", sd15_lora, "--html", link, "--overwrite")
    assert "inputs are never replaced" in said
    link.unlink()
    link.symlink_to(sd15)
    said = refused("inspect", sd15_lora, "--against", sd15, "--html", link, "--overwrite")
    assert "inputs are never replaced" in said
    refused("inspect", sd15_lora, "--html", tmp_path / "a.safetensors", status=2)
    refused("inspect", sd15_lora, "--svg", tmp_path / "a.html", "--overwrite", status=2)
    refused("inspect", sd15_lora, "--svg", html / "a.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "link.html"]


def test_a_failure_leaves_no_page(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused("inspect", broken, "--html", tmp_path / "a.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.safetensors"]


def test_how_a_file_was_made_is_told_in_words(sd15: Path, sd15_lora: Path, tmp_path: Path) -> None:
    outs = {name: tmp_path / f"{name}.safetensors" for name in ("sum", "cut", "change", "baked")}
    ran("merge", f"{sd15_lora}:0.8", f"{sd15_lora}:-0.5", "--rank", 2, "-o", outs["sum"])
    ran("cut-blocks", sd15_lora, "--keep", "MID", "-o", outs["cut"])
    ran("extract", sd15_lora, outs["sum"], "-o", outs["change"])
    ran("merge", f"{sd15_lora}:0.5", "--into", sd15, "-o", outs["baked"])
    name = sd15_lora.name
    made = {
        "sum": f", merge of {name} at 0.8 and {name} at -0.5; rank 2",
        "cut": f", cut-blocks of {name}; keep MID",
        "change": f", extract of what turns {name} into sum.safetensors",
        "baked": f", merge of {name} at 0.5, baked into {sd15.name}",
    }
    for which, words in made.items():
        text = " ".join(run("inspect", outs[which]).output.split())
        assert f"made by lorakit {lorakit.__version__}{words}" in text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"lorakit": 1}', "null", '"a"'])
def test_a_damaged_recipe_is_shown_as_it_is(text: str) -> None:
    assert in_words("lorakit.recipe", text) == text


def test_a_recipe_of_extract_names_models_with_loras() -> None:
    side = {"model": "base.safetensors", "loras": [{"lora": "a.safetensors", "strength": "0.5"}]}
    recipe = {
        "lorakit": "1.0",
        "command": "extract",
        "inputs": [{"model": "base.safetensors", "loras": []}, side],
        "options": {"rank": 8, "only": ["attn", "ff"], "repair": True, "metadata": {"a": "b"}},
    }
    assert recipe_in_words(json.dumps(recipe)) == (
        "lorakit 1.0, extract of what turns base.safetensors into base.safetensors with "
        "a.safetensors at 0.5; metadata a, only attn ff, rank 8, repair"
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ss_training_started_at", "1682942400.5", "2023-05-01 12:00 UTC"),
        ("ss_training_started_at", "soon", "soon"),
        ("ss_training_started_at", "1e300", "1e300"),
        ("ss_v2", "False", "no"),
        ("ss_resolution", "(1024, 768)", "1024 x 768"),
        ("ss_network_args", '{"conv_dim": "8", "x": [1, 2]}', "conv_dim: 8, x: [1, 2]"),
        ("ss_network_args", "{}", "{}"),
        ("ss_network_args", "{broken", "{broken"),
        (
            "ss_dataset_dirs",
            '{"10_cat": {"n_repeats": 10, "img_count": 20}, "dog": {"img_count": 3}}',
            "10_cat: 20 images x 10, dog: 3 images",
        ),
        (
            "ss_tag_frequency",
            '{"a": {"cat": 3, " dog": 9}, "b": {"cat": 7, "owl": 1}}',
            "cat (10), dog (9), owl (1)",
        ),
        (
            "ss_bucket_info",
            '{"buckets": {"0": {"resolution": [512, 768], "count": 4}}, "mean_img_ar_error": 0}',
            "512 x 768: 4",
        ),
        (
            "ss_datasets",
            '[{"num_train_images": 20, "resolution": [512, 512], "batch_size_per_device": 2, '
            '"subsets": [{"img_count": 10, "num_repeats": 2, "image_dir": "cats"}]}]',
            "20 images, at 512 x 512, batch 2, cats: 10 images x 2",
        ),
        ("ss_datasets", '{"a": 1}', '{"a": 1}'),
        ("modelspec.thumbnail", "data:image/png;base64," + "A" * 4096, "a picture of 3 KiB"),
        ("mine", "a\tb\x07", "a b?"),
    ],
)
def test_metadata_in_words(key: str, value: str, words: str) -> None:
    assert in_words(key, value) == words


def test_long_values_are_cut_and_keys_have_names() -> None:
    text = in_words("mine", "x" * 5000)
    assert len(text) < 400 and "5,000 letters" in text
    assert label("ss_max_grad_norm") == "max grad norm" and label("mine") == "mine"
    assert label("ss_output_name") == "name" and label("modelspec.author") == "author"


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "--metadata"], ["inspect", "--json"], ["metadata", "show"]],
)
def test_what_the_header_tells_needs_no_torch(sd15_lora: Path, arguments: list[str]) -> None:
    code = (
        "import sys; import lorakit.cli as c; c.lorakit.main(sys.argv[1:], standalone_mode=False);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, sd15_lora], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_first_words_say_what_it_is_where_it_acts_and_how_much(
    sd15: Path, sd15_lora: Path
) -> None:
    first, *_ = run("inspect", sd15_lora).output.splitlines()
    what = (
        "A LoRA for Stable Diffusion 1.x: 192 layers of the UNet and 72 of the text encoder, rank "
        "4, alpha 2 (scale 0.5)."
    )
    assert first == what
    found = ran("inspect", sd15_lora, "--against", sd15)
    largest = max(found["blocks"], key=lambda block: block["share"])
    first, *_ = run("inspect", sd15_lora, "--against", sd15).output.splitlines()
    assert f"Its change is largest in {largest['id']} ({100 * largest['share']:.0f} %)" in first
    assert f"of the weights that it changes in {sd15.name}." in first
    first, *_ = run("inspect", sd15).output.splitlines()
    assert first.startswith("A checkpoint of Stable Diffusion 1.x in the original layout: ")


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"lora": 3}, "A LoRA for"),
        ({"lora": 3, "locon": 1}, "A LoRA with 3x3 convolutions for"),
        ({"dora": 3}, "A DoRA for"),
        ({"loha": 3, "full": 1, "new": 1}, "A mixture of LoHa, full difference and new for"),
    ],
)
def test_kinds_in_words(adapters: dict[str, int], words: str) -> None:
    found = Inspection(
        path="a", kind="lora", architecture="SDXL", layout="kohya", tensors=1, nbytes=1, dtypes={},
        layers=4, adapters=adapters, components={"unet": 1, "text_encoder": 2, "text_encoder_2": 1},
        ranks={"4": 2, "8": 1, "none": 1}, alphas={"none (= rank)": 4},
    )  # fmt: skip
    assert summary(found) == (
        f"{words} SDXL: 1 layer of the UNet and 3 of two text encoders, ranks 4 to 8.",
    )


def test_blocks_are_listed_as_ranges_that_can_be_pasted() -> None:
    blocks = ("BASE", "IN01", "IN02", "IN04", "MID", "OUT08", "OUT09", "OUT10")
    assert format_ids(blocks) == "BASE,IN01-IN02,IN04,MID,OUT08-OUT10"
    architecture = next(a for a in ARCHITECTURES if a.id == "sd1")
    assert parse_ids(format_ids(blocks), architecture) == blocks


def test_the_summary_is_of_words(sd15_lora: Path) -> None:
    text = run("inspect", sd15_lora).output
    assert re.search(r"^resolution +512 x 512 *$", text, re.M)
    assert "share of the change" not in text
