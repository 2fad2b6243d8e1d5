"""The page of the Python API: every public name is there, and explained."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lorakit

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DOCS))
    import api

    yield api
    sys.modules.pop("api")


def section(name: str) -> str:
    return PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0]


@pytest.mark.parametrize("name", sorted(set(lorakit.__all__) - {"__version__"}))
def test_every_public_name_has_its_entry(name: str) -> None:
    assert f"```py\n{name}(" in section(name) or f"```py\nclass {name}" in section(name)


def test_an_entry_says_what_is_taken_given_and_refused() -> None:
    merge = section("merge")
    assert "    rule: RankRule | None = None," in merge
    assert "\n) -> tuple[LoraFile, Report]\n" in merge
    assert "- `rule`: how much to keep; without one" in merge
    assert "**Returns** The LoRA, in fp32 factors" in merge
    assert "- [`UnmatchedError`](#errors): everything cancels" in merge
    assert "**Source** the sum is the web UI's" in merge
    assert "[`RankRule`](#rankrule)" in merge
    assert "- `.error: float | None`: The relative error" in section("Report")


def test_links_inside_the_page_lead_somewhere() -> None:
    import re

    heads = {head.lower() for head in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#(.+?)\)", PAGE)) <= heads


def bare() -> None: ...


def half_explained(rank: int, alpha: float) -> None:
    """Take two and explain one.

    Args:
        rank: the rank.
    """


def unexplained(rank: int) -> None:
    """Take one and explain none."""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bare, "bare has no docstring"),
        (half_explained, "half_explained takes and explains not the same: .'alpha'."),
        (unexplained, "unexplained takes and explains not the same: .'rank'."),
    ],
)
def test_what_is_not_explained_stops_the_build(
    api: ModuleType, function: Callable[..., None], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        api.thing(function.__name__, function)


def test_a_public_name_without_a_chapter_stops_the_build(
    api: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorakit, "__all__", [*lorakit.__all__, "newcomer"])
    with pytest.raises(SystemExit, match="newcomer is in no chapter"):
        api.api_page()
