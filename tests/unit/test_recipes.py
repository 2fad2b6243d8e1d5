"""The recipes: each does in numbers what its pages say, and the pages show what it prints."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import outputs
import pytest
from kitchen import Found, deltas, error, fine_tune, norm, times, total

from tests.helpers import ran, run

PAGES = outputs.recipes()
Cook = Callable[[str], Found]


@pytest.fixture
def cook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cook:
    """Return a function that runs a recipe in a fresh folder, and holds its pages to its output."""
    monkeypatch.chdir(tmp_path)

    def run_it(name: str) -> Found:
        found, printed = outputs.cooked(name)
        for page in PAGES[name]:
            wrong = outputs.differences(page.read_text(encoding="utf-8"), printed)
            assert not wrong, "\n".join([str(page), *wrong, "run python docs/outputs.py"])
        return found

    return run_it


def test_subtraction_finds_the_planted_change_and_nothing_of_the_image(cook: Cook) -> None:
    found = cook("copy_machine")
    assert found["lost of the change"] < 1e-3
    assert found["cosine of the change and the image"] < 2e-3
    assert error(times(deltas("change"), 0.5), deltas("truth")) > 0.4, "half would be noticed"
    assert found["lost of the copier in fp32"] < 1e-5
    assert 0.2 < found["lost of the copier in bf16"] < 0.3
    kept = total({"image": 0.1, "truth": 1})
    assert error(deltas("change-90"), kept) < 0.05


def test_on_sdxl_loras_lose_less_than_models_and_the_text_encoders_go(cook: Cook) -> None:
    found = cook("copy_machine_sdxl")
    assert found["lost from the LoRAs"] < 1e-3
    assert 5 < found["lost from the models in fp16"] / found["lost from the LoRAs"] < 100
    assert found["lost of the UNet's part"] < 1e-3
    assert not [layer for layer in deltas("change-unet", "sdxl") if layer.startswith("text_")]
    assert found["layers of the text encoders"] == 12


def test_accidents_fade_by_the_root_of_the_number_of_pairs(cook: Cook) -> None:
    found = cook("average_pairs")
    shared = ran("compare", "pair-1.safetensors", "pair-2.safetensors")["total"]["cosines"][0][1]
    assert found["error of the mean"] == pytest.approx(((1 - shared) / shared / 4) ** 0.5, rel=0.02)
    assert found["error of the mean"] == pytest.approx(found["error of one pair"] / 2, rel=0.02)
    assert found["error of the mean at rank 4"] < 0.8 * found["error of the mean"]
    assert 0.95 < found["strength of the truth in the result"] < 1


def test_a_style_is_gone_at_the_projection_and_turned_round_beyond(cook: Cook) -> None:
    found = cook("remove_style")
    seen = ran("compare", "character.safetensors", "style-3d.safetensors")["total"]
    k = seen["cosines"][0][1] * seen["norms"][0] / seen["norms"][1]
    assert k == pytest.approx(found["best k"], rel=1e-4) == pytest.approx(0.6, abs=2e-3)
    assert found["cosine to the style before"] > 0.5
    assert abs(found["cosine to the style after"]) < 1e-3
    assert found["cosine to the style after too much"] < -0.3
    assert found["error of what is left"] < 1e-3
    less, more = (total({"character": 1, "style-3d": -(k + step)}) for step in (-0.05, 0.05))
    assert norm(deltas("flat")) < min(norm(less), norm(more)), "it is the smallest of all"


def test_a_cut_leaves_what_stays_untouched_and_makes_the_file_smaller(cook: Cook) -> None:
    found = cook("cut_blocks")
    assert found["error of what stays"] == 0
    assert found["layers before"] - found["layers after"] == 60
    assert 0.7 < found["share of the change that stays"] < 0.9
    assert found["size of the file beside the whole"] < 0.8
    assert found["error of the baked block weights"] < 1e-3
    gone = deltas("character", "sdxl").keys() - deltas("mute", "sdxl").keys()
    assert gone and all(".attn2." in layer for layer in gone)


def test_a_leco_and_a_character_are_one_file_with_every_layer_once(cook: Cook) -> None:
    found = cook("leco_character")
    assert found["error of the sum"] < 1e-3
    assert found["layers of both"] == found["layers of the character"]
    seen = json.loads(run("inspect", "both.safetensors", "--json").stdout)
    assert seen["layout"] == "kohya" and max(map(int, seen["ranks"])) == 12
    halved = total({"character": 1, "leco": 0.5}, "sdxl")
    assert error(deltas("both", "sdxl"), halved) > 0.3, "an alpha that is not read is noticed"


def test_styles_add_by_the_root_and_alike_ones_by_the_mean(cook: Cook) -> None:
    found = cook("average_styles")
    assert found["error of the sum"] < 1e-3
    assert found["size of the mix beside one style"] == pytest.approx(3**0.5 * 0.4, rel=0.02)
    assert 0.9 < found["size of the mean of styles that are alike"] < 1
    plain = total({"ink-alike": 0.4, "pastel-alike": 0.4, "flat-alike": 0.4})
    assert norm(plain) > 1.1 * norm(deltas("ink-alike")), "0.4 each overshoots for these"


def test_a_baked_prompt_is_what_its_tags_say(cook: Cook) -> None:
    found = cook("bake_prompt")
    assert found["error of the stack"] < 1e-3
    assert found["error of the baked checkpoint"] < 0.05
    swapped = total({"loras/style": 0.8, "loras/character": 0.5})
    assert error(deltas("stack"), swapped) > 0.1, "blocks and the two strengths are read"


def test_the_spectrum_finds_the_planted_rank(cook: Cook) -> None:
    found = cook("choose_dim")
    spectrum = ran("inspect", "character.safetensors", "--spectrum")["spectrum"]
    assert spectrum["total"]["needed"]["99"] == 6 and spectrum["total"]["rank"] == 32
    assert found["error of dim 6"] < 0.7 * found["error of dim 32"]
    assert 0.2 < found["error at 90 % of the energy"] <= 0.1**0.5
    assert found["error of what the model feels"] < 0.05


def test_a_lora_comes_back_from_every_tool_as_it_was(cook: Cook) -> None:
    found = cook("move_between_tools")
    assert found["error of for-comfyui"] == 0
    assert found["error of for-diffusers"] < 1e-6
    assert found["error of back"] < 1e-6
    assert ran("compare", "character.safetensors", "for-peft")["total"]["distances"][0][1] < 1e-5


def test_an_extraction_finds_the_planted_rank_and_rebuilds_the_model(cook: Cook) -> None:
    found = cook("extract_from_model")
    ranks = json.loads(run("inspect", "difference.safetensors", "--json").stdout)["ranks"]
    assert max(map(int, ranks)) == 8
    assert found["lost of the layers"] < 0.03
    assert found["lost of the rebuilt model"] < 0.03
    assert found["error of the moved change"] < 0.05
    fine_tune("same", seed=1, rank=8, noise=0)
    right = ran("extract", "base.safetensors", "same.safetensors", "--rank", 8, "-o", "right")
    assert right["totals"]["energy"] > 0.999, "without the noise nothing is lost"


def test_loha_and_dora_take_part_in_sums(cook: Cook) -> None:
    found = cook("dora_lycoris")
    assert found["error of the mix"] < 1e-5
    assert found["error of half the DoRA"] < 1e-4
    assert error(deltas("mix"), deltas("character")) > 0.1, "the LoHa is noticed"


def test_what_merges_cannot_do_is_as_bad_as_said(cook: Cook) -> None:
    found = cook("limits")
    assert 0.2 < found["left of a style, baked and undone in bf16"] < 0.4
    assert abs(found["cosine of a character and a style that it never had"]) < 0.01
    assert found["cosine after 0.6 of it was taken away"] < -0.4
    assert found["lost of six characters at rank 8"] > 0.3
    ties = found["cosine of a character and its merge by ties"]
    assert ties < found["cosine of a character and the plain sum"] - 0.05
    assert found["lost of a character, cut to rank 2 and set to 8"] > 0.3
    assert error(deltas("thick"), deltas("thin")) < 1e-3, "a larger rank adds nothing"


def test_every_recipe_has_its_test_and_a_page_in_each_language() -> None:
    tested = re.findall(r'cook\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == sorted(PAGES)
    for name, pages in PAGES.items():
        assert all(page.exists() for page in pages), name
    for folder in {page.parent for pages in PAGES.values() for page in pages}:
        named = {page.stem.replace("-", "_") for page in folder.glob("*.md")} - {"index"}
        assert named == PAGES.keys()
        index = (folder / "index.md").read_text(encoding="utf-8")
        assert all(f"({name.replace('_', '-')}.md)" in index for name in PAGES)
