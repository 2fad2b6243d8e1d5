"""lorakit methods: the menu, in words and as JSON."""

import json

import pytest

from lorakit.methods.menu import MENU
from lorakit.methods.method import Method
from tests.helpers import ran, refused, run

CONTRACT = [
    "linear",
    "ties",
    "dare-linear",
    "dare-ties",
    "della",
    "della-ties",
    "breadcrumbs",
    "breadcrumbs-ties",
    "magnitude",
    "sce",
    "slerp",
    "karcher",
    "model-stock",
    "tsv",
    "iso-c",
    "iso-cts",
    "ctm",
]
each_method = pytest.mark.parametrize("name", CONTRACT)


def words(*arguments: str) -> str:
    result = run("methods", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_menu_has_all_methods_and_no_others() -> None:
    lines = words().splitlines()
    named = [line.strip() for line in lines if line.startswith("  ") and line[2] != " "]
    assert named == CONTRACT == list(MENU)
    assert list(ran("methods")["methods"]) == CONTRACT


@each_method
def test_each_says_what_it_is_for_when_it_is_a_bad_idea_and_where_it_is_from(name: str) -> None:
    entry = MENU[name]
    for said in (words(), words(name)):
        section = said.partition(f"  {name}\n")[2]
        purpose, caution = section.splitlines()[:2]
        assert purpose.strip() == entry.purpose and caution.strip() == f"But: {entry.caution}"
        assert entry.paper in section
    assert any(char.isdigit() for char in entry.paper), "a year, or the number of a paper"


@each_method
def test_each_tells_its_parameters_their_meaning_and_their_defaults(name: str) -> None:
    said, entry = words(name), MENU[name]
    for key, value in entry.defaults.items():
        default = f"{value:g}" if isinstance(value, float) else str(value)
        line = next(line for line in said.splitlines() if f"--{key} {default}" in line)
        assert line.endswith(entry.meaning(key)) and len(line) <= 100
        # What the menu says is what a merge takes.
        filled = Method(name=name).filled(into_lora=True)
        assert getattr(filled, key) == value
    assert ("--space" in said) == bool(entry.spaces)
    assert all(flavor in said for flavor in entry.flavors)
    assert "--lambda, --normalize, --match-norm and --calibrate" in said


def test_dare_says_that_it_is_a_noisy_copy_of_linear() -> None:
    assert "cut to a LoRA it is a noisy copy of linear" in words("dare-linear")


def test_the_menu_as_json_is_one_stable_object() -> None:
    result = run("methods", "iso-cts", "ties", "--json")
    body = json.loads(result.stdout)
    assert (body["schema"], body["command"]) == (1, "methods")
    assert list(body["methods"]) == ["iso-cts", "ties"]
    assert body["methods"]["ties"]["defaults"]["density"] == 0.2
    assert "the directions that all LoRAs have in common" in words("iso-cts")


def test_a_method_that_is_not_there_is_refused() -> None:
    assert "Method 'sorcery' is unknown; there are linear" in refused(
        "methods", "sorcery", status=2
    )
