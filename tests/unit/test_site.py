"""The docs as a site: what the hooks of mkdocs add, and what stops the build."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DOCS))
    import site_hooks

    yield site_hooks
    sys.modules.pop("site_hooks")


PAGES = {
    "index.md": "# Home",
    "tutorial.md": "# Tutorial",
    "security.md": "# Security",
    "recipes/index.md": "# Recipes\n\n- [Second](b.md)\n- [First](a.md)",
    "recipes/a.md": "# A",
    "recipes/b.md": "# B",
    "recipes/late.md": "# Not in the index",
    "ja/index.md": "# 日本語",
    "ja/recipes/index.md": "# レシピ",
    "ja/recipes/a.md": "# あ",
}


def test_a_folder_is_taken_in_the_order_of_its_index(hooks: ModuleType) -> None:
    nav = ["index.md", {"Learn": [{"Recipes": "recipes/*"}, "tutorial.md"]}, {"日本語": "ja/*"}]
    recipes = ["recipes/index.md", "recipes/b.md", "recipes/a.md", "recipes/late.md"]
    japanese = ["ja/index.md", {"レシピ": ["ja/recipes/index.md", "ja/recipes/a.md"]}]
    assert list(hooks.written_out(nav, PAGES)) == [
        "index.md",
        {"Learn": [{"Recipes": recipes}, "tutorial.md"]},
        {"日本語": japanese},
    ]


def test_what_is_not_there_is_left_out_and_what_nobody_names_is_not(hooks: ModuleType) -> None:
    nav = [
        {"Home": "index.md"},
        {"Coming from": "coming-from/*"},
        {"Empty": [{"Gone": "gone.md"}]},
        *({"All": ["*"]}, {"Recipes": "recipes/*"}, {"日本語": "ja/*"}),
    ]
    found = list(hooks.written_out(nav, PAGES))
    assert found[:2] == [{"Home": "index.md"}, {"All": ["security.md", "tutorial.md"]}]


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("What it is:\n- one\n- two", ["- one", "- two"]),
        ("What it is:\n| a | b |\n|---|---|", ["| a | b |", "|---|---|"]),
        ("What it is:\n\n- one\n  and more\n- two", []),
        ("```text\nWhat it is:\n- one\n```", []),
        ("A sum a\n- b", ["- b"]),
    ],
)
def test_what_the_repository_reads_as_a_list_is_one(
    hooks: ModuleType, text: str, odd: list[str]
) -> None:
    assert list(hooks.misread(text)) == odd


@pytest.mark.parametrize(
    ("html", "asks"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ("<img alt=x src=//images.example/x.png>", True),
        ('<link rel="stylesheet" href="http://fonts.example/css">', True),
        ('<a href="https://arxiv.org/abs/1">', False),
        ('<script src="assets/x.js">', False),
    ],
)
def test_a_page_asks_no_other_host(hooks: ModuleType, html: str, asks: bool) -> None:
    assert bool(hooks.ASKED.search(html)) == asks


def build(folder: Path, pages: dict[str, str]) -> Path:
    """Build a small site with the repository's own configuration."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    docs = folder / "docs"
    for name, text in pages.items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(text, encoding="utf-8")
    more: dict[str, Any] = {"docs_dir": str(docs), "site_dir": str(folder / "site")}
    build_site(load_config(str(ROOT / "mkdocs.yml"), extra_css=[], **more))
    return folder / "site"


def test_a_test_that_is_named_is_a_page_and_japanese_has_no_spaces(tmp_path: Path) -> None:
    site = build(
        tmp_path,
        {
            "index.md": "# Home\n\n[Here](ja/index.md), `tests/helpers.py`",
            "ja/index.md": "# 一\n\n二つの\n行。[試験](../../tests/reference.py)",
        },
    )
    home = (site / "index.html").read_text(encoding="utf-8")
    assert '<a href="source/tests/helpers.py/"><code>tests/helpers.py</code></a>' in home
    assert "total_error" in (site / "source/tests/helpers.py/index.html").read_text("utf-8")
    japanese = (site / "ja/index.html").read_text(encoding="utf-8")
    assert "二つの行。" in japanese
    assert 'href="../source/tests/reference.py/"' in japanese
    assert "日本語" in home and "total_error" not in (site / "search/search_index.json").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Home\n\n[Gone](gone.md)", "gone.md"),
        ("# Home\n\n[Gone](../tests/gone.py)", "gone.py"),
        ("# Home\n\n[Nowhere](#nowhere)", "nowhere"),
        ("# Home\n\nA list:\n- one", "needs an empty line"),
        ("# Home\n\n![A picture](https://pictures.example/x.png)", "asks another host"),
    ],
)
def test_the_build_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    from mkdocs.exceptions import Abort

    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        build(tmp_path, {"index.md": text})
    assert said in caplog.text
