"""Pictures: nothing overlaps or is cut, all can be read, light and dark, and nothing is loaded."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib import util
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from lorakit.pictures.chart import Chart, Line, chart, ticks
from lorakit.pictures.colours import DARK, LIGHT, STEPS, Theme, contrast, ink_of, step, style
from lorakit.pictures.heatmap import Cell, Heatmap, heatmap, heattable
from lorakit.pictures.html import POLICY, Section, Table, page
from lorakit.pictures.svg import Picture, below, beside, document, grid
from lorakit.pictures.text import BOLD, SIZE, TITLE, cut, escaped, width, wrapped

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("1")</script> & \x1b[31m\x00 "quotes"'


def a_table(rows: int = 4, name: str = "Share of the change, %") -> Heatmap:
    columns = ("attn1", "modulation", "attn+mlp", "TE2", "all")
    cells = {
        f"OUT{row:02}": {
            column: Cell(
                text=f"{10 * row + place}.{place}",
                heat=place / 4 if place < 4 else None,
                bar=row / rows if place == 4 else None,
                tip="tip",
            )
            for place, column in enumerate(columns)
            if (row, place) != (1, 2)
        }
        for row in range(rows)
    }
    total = {column: Cell(text=f"{place}.5") for place, column in enumerate(columns[:4])}
    return Heatmap(
        title=name,
        columns=columns,
        rows=cells,
        total=total,
        ends=("0.0", "40.0"),
        note="(half way: 10.0)",
    )


def a_map(rows: int = 4, name: str = "Share of the change, %") -> Picture:
    return heatmap(a_table(rows, name))


def a_chart(most: int = 128) -> Picture:
    points = tuple((float(rank), 1 - 1 / (rank + 1)) for rank in range(1, most + 1))
    lines = (Line(name="IN04", points=points), Line(name="all", points=points, main=True))
    drawn = Chart(
        title="Energy kept",
        axis="rank",
        lines=lines,
        marks=((4.0, 0.8, "90 %"),),
        note="Dots",
        most=most,
    )
    return chart(drawn)


def parsed(picture: Picture, title: str = "a picture") -> ET.Element:
    return ET.fromstring(document(picture, title))


Box = tuple[float, float, float, float]


def texts(element: ET.Element, x: float = 0.0, y: float = 0.0) -> Iterator[tuple[str, Box, str]]:
    """Yield each text with the box that it takes at most, and its class."""
    if move := re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", "")):
        x, y = x + float(move[1]), y + float(move[2])
    if element.tag == f"{SVG}text":
        said, kind = "".join(element.itertext()), element.get("class", "")
        tips = element.findall(f"{SVG}title")
        said = said[len("".join(tips[0].itertext())) :] if tips else said
        size = TITLE if kind == "title" else SIZE
        length = width(said, size) * (BOLD if kind == "title" else 1)
        left = x + float(element.get("x", "0"))
        left -= {"middle": length / 2, "end": length}.get(element.get("text-anchor", ""), 0.0)
        base = y + float(element.get("y", "0"))
        yield said, (left, base - 0.8 * size, left + length, base + 0.25 * size), kind
    for child in element:
        yield from texts(child, x, y)


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize(
    "picture",
    [
        a_map(),
        a_map(60),
        a_map(2, "a title that is wider than the table below it, so that it has to grow"),
        a_chart(),
        a_chart(2),
        a_chart(1),
        a_chart(3072),
        beside([below([a_map(), a_chart()]), below([a_map(9), a_chart(16)])]),
        grid([[a_map(), a_map(9)], [a_chart(), Picture(width=0, height=0, body="")]]),
    ],
)
def test_no_text_is_cut_or_lies_on_another(picture: Picture) -> None:
    root = parsed(picture)
    wide, high = float(root.get("width", "0")), float(root.get("height", "0"))
    found = list(texts(root))
    assert len(found) > 5
    for said, (left, top, right, bottom), _ in found:
        assert left >= 0 and top >= 0 and right <= wide and bottom <= high, said
    for (first, one, _), (second, other, _) in combinations(found, 2):
        assert not overlap(one, other), f"{first} lies on {second}"


def test_the_check_for_overlaps_can_fail() -> None:
    apart, near = beside([a_map(), a_map()]), beside([a_map(), a_map()], gap=-250)
    assert not any(overlap(a[1], b[1]) for a, b in combinations(texts(parsed(apart)), 2))
    assert any(overlap(a[1], b[1]) for a, b in combinations(texts(parsed(near)), 2))


def test_every_number_stands_in_its_coloured_box() -> None:
    root = parsed(a_map())
    coloured = [g for g in root.iter(f"{SVG}g") if re.fullmatch(r"h\d", g.get("class", ""))]
    groups = [group for group in coloured if group.find(f"{SVG}text") is not None]
    assert len(groups) == 15 and len(coloured) == 15 + STEPS, "the legend has no numbers"
    for group in groups:
        box, text = group.find(f"{SVG}rect"), next(texts(group))
        assert box is not None
        left, right = (
            float(box.get("x", "0")),
            float(box.get("x", "0")) + float(box.get("width", "0")),
        )
        assert left <= text[1][0] and text[1][2] <= right
        top, bottom = (
            float(box.get("y", "0")),
            float(box.get("y", "0")) + float(box.get("height", "0")),
        )
        assert top <= text[1][1] and text[1][3] <= bottom


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_all_that_is_written_has_contrast(theme: Theme) -> None:
    """WCAG asks for 4.5 below text, and for 3 below lines that carry a meaning."""
    assert contrast(theme.ink, theme.paper) >= 7
    assert contrast(theme.muted, theme.paper) >= 4.5
    inks = [ink_of(theme, place) for place in range(STEPS)]
    assert all(contrast(*pair) >= 4.5 for pair in zip(inks, theme.ramp, strict=True))
    assert contrast(theme.accent, theme.paper) >= 3 and contrast(theme.thin, theme.paper) >= 3
    assert contrast(theme.warn, theme.alert) >= 4.5 and contrast(theme.warn, theme.paper) >= 4.5
    assert contrast(theme.ink, theme.card) >= 7


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_run_one_way_also_in_grey(theme: Theme) -> None:
    away = [contrast(colour, theme.paper) for colour in theme.ramp]
    assert away == sorted(away) and away[-1] / away[0] > 6
    assert len(theme.ramp) == STEPS


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_steps_of_the_ramp() -> None:
    assert [step(share) for share in (-0.1, 0.0, 0.0999, 0.1, 0.95, 1.0, 1.5)] == [
        *(0, 0, 0, 1, 9, 9, 9)
    ]


def test_the_style_has_both_papers() -> None:
    light, _, dark = style().partition("@media screen and (prefers-color-scheme: dark)")
    for rules, theme in ((light, LIGHT), (dark, DARK)):
        assert all(colour in rules for colour in (theme.paper, theme.ink, *theme.ramp))
        assert all(f".h{place} rect" in rules for place in range(STEPS))


def test_a_picture_has_a_name_and_tips() -> None:
    root = parsed(a_map(), "lorakit inspect: style")
    assert (root.get("role"), root.get("aria-label")) == ("img", "lorakit inspect: style")
    assert root.findtext(f"{SVG}title") == "lorakit inspect: style"
    assert any(title.text == "tip" for title in root.iter(f"{SVG}title"))


def test_the_curve_goes_through_its_points() -> None:
    root = parsed(a_chart(16))
    (main,) = (path for path in root.iter(f"{SVG}path") if path.get("class") == "main")
    places = [tuple(map(float, p.split())) for p in re.split("[ML]", main.get("d", "")) if p]
    steps = [right[0] - left[0] for left, right in pairwise(places)]
    assert places[0][0] + 4 * (places[1][0] - places[0][0]) == pytest.approx(places[-1][0], abs=1)
    assert all(step > 0 for step in steps) and len(places) == 16
    full = 220 * (places[0][1] - places[-1][1]) / (16 / 17 - 1 / 2) / 220
    assert full == pytest.approx(220, abs=1)


@pytest.mark.parametrize("most", [2, 3, 16, 100, 128, 3072])
@pytest.mark.parametrize("room", [60, 360])
def test_numbers_of_an_axis_do_not_touch(most: int, room: int) -> None:
    found = ticks(most, room)
    assert found == sorted(set(found)) and found[-1] == most
    assert len(found) > 1 or room == 60


@pytest.mark.parametrize("text", ["a" * 99, "W" * 99, "日本語" * 30, "…", "a b" * 40])
def test_what_is_cut_fits_and_keeps_both_ends(text: str) -> None:
    short = cut(text, 120)
    assert width(short) <= 120
    assert short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short)
    assert all(width(line) <= 120 for line in wrapped(text, 120, lines=3))
    assert len(wrapped(text, 120, lines=3)) <= 3


def test_wrapping_loses_no_word_where_there_is_room() -> None:
    text = "Rank 12 of 32 keeps 99 % of the change: lorakit resize style.safetensors --rank 12"
    lines = wrapped(text, 200, lines=9)
    assert " ".join(lines) == text and len(lines) > 2


def test_text_from_files_cannot_become_markup() -> None:
    assert escaped(NASTY) == (
        "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; ?[31m? &quot;quotes&quot;"
    )
    cells = {NASTY: {NASTY: Cell(text=NASTY, heat=1.0, tip=NASTY)}}
    nasty = Heatmap(
        title=NASTY, columns=(NASTY,), rows=cells, total={}, ends=(NASTY, NASTY), note=NASTY
    )
    picture = heatmap(nasty)
    said = "".join(parsed(picture, NASTY).itertext())
    assert '<script>alert("1")</script> & ?[31m? "quotes"' in said
    table = Table(title=NASTY, columns=(NASTY,), rows=((NASTY,),))
    section = Section(
        title=NASTY,
        lead=NASTY,
        command=NASTY,
        warnings=(NASTY,),
        figures=(picture, nasty),
        folded=(table, nasty),
    )
    text = page(NASTY, [section], table)
    assert "<script" not in text and text.count("&lt;script&gt;") > 20


def test_a_page_loads_nothing() -> None:
    section = Section(title="a", figures=(a_table(), a_chart()), folded=(a_table(),))
    facts = Table(title="About the files", columns=("", "a"), rows=(("kind", "lora"),))
    text = page("a", [section, section], facts)
    assert POLICY.startswith("default-src 'none'") and POLICY in text
    for loaded in ("src=", "href", "url(", "@import", "<script", "http:", "https:"):
        assert loaded not in text, loaded
    assert text.count("<svg") == 2 and text.count("<section") == 3
    svg = document(a_chart(), "a").replace("http://www.w3.org/2000/svg", "")
    for loaded in ("src=", "href", "url(", "@import", "<script", "http"):
        assert loaded not in svg, loaded


def test_the_same_picture_has_the_same_bytes() -> None:
    assert document(beside([a_map(), a_chart()]), "a") == document(
        beside([a_map(), a_chart()]), "a"
    )


def test_a_map_in_a_page_is_a_table_that_can_be_read_aloud() -> None:
    root = ET.fromstring(heattable(a_table()))
    table = root.find("table")
    assert table is not None and root.get("tabindex") == "0", "a keyboard can scroll it"
    assert root.get("aria-label") == table.findtext("caption") == "Share of the change, %"
    heads = [th.text for th in table.iter("th") if th.get("scope") == "col"]
    assert heads == ["attn1", "modulation", "attn+mlp", "TE2", "all"]
    rows = {
        row.findtext("th"): row
        for row in table.iter("tr")
        if row.find("th[@scope='row']") is not None
    }
    assert list(rows) == ["OUT00", "OUT01", "OUT02", "OUT03", "all"]
    second = rows["OUT01"].findall("td")
    assert [cell.text for cell in second] == ["10.0", "11.1", None, "13.3", "14.4"]
    assert [cell.get("class") for cell in second] == ["h0", "h2", None, "h7", "bar"]
    assert second[0].get("title") == "tip" and second[4].get("style") == "--p:25.0%"
    assert [cell.text for cell in rows["all"].findall("td")] == ["0.5", "1.5", "2.5", "3.5", None]


def test_files_beside_each_other_have_their_rows_in_step() -> None:
    one = Section(title="a", figures=(a_table(), a_chart()))
    other = Section(title="b", figures=(a_table(),))
    facts = Table(title="About the files", columns=("", "a", "b"), rows=(("kind", "x", "y"),))
    several, single = page("a, b", [one, other], facts), page("a", [one], facts)
    assert several.count("--rows: 4") == 2 and several.count("\n<div></div>\n</div>") == 1
    assert 'class="several"' in several and 'class="single"' in single


def test_a_grid_has_columns_as_wide_as_the_widest() -> None:
    small, large = (Picture(width=size, height=size, body="<g/>") for size in (10, 30))
    found = grid([[small, large], [large, small]], gap=5, aside=7)
    assert (found.width, found.height) == (67, 65)
    assert re.findall(r"translate\(([^)]*)\)", found.body) == ["0 0", "37 0", "0 35", "37 35"]


def test_what_is_printed_is_light() -> None:
    text = page("a", [Section(title="a")], Table(title="t", columns=(), rows=()))
    assert "@media (prefers-color-scheme" not in text
    assert text.count("@media screen and (prefers-color-scheme: dark)") == 2


def outline(text: str) -> list[tuple[str, str]]:
    """Return a picture's elements and its words, without what rounding may change: numbers."""
    return [
        (element.tag, re.sub(r"[-\d.]+", "0", element.text or ""))
        for element in ET.fromstring(text).iter()
    ]


def test_the_pictures_in_the_docs_are_those_of_today() -> None:
    """`python docs/pictures.py` draws them anew."""
    spec = util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.pictures().items():
        stored = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert len(stored) < 64_000 and outline(text) == outline(stored), name
        assert "/" not in re.sub(r"</|/>|http://www.w3.org/2000/svg", "", stored), "no path"
