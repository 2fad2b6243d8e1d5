"""--json: what docs/json.md says, key by key, and the same object that Python gets."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.linalg.ranks import RankRule
from tests.helpers import ran, run

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null",
         dict: "object", list: "list", tuple: "list"}  # fmt: skip
SAME_AS_TOTAL = ("blocks", "rows")
"""Of compare: what has the keys of `total`."""


@dataclass(frozen=True)
class Schema:
    """The table of a section: path -> types."""

    types: dict[str, set[str]]

    def spelled(self, path: str, key: str) -> str:
        """Return a key below a path as the table has it: `.*` where any key may stand."""
        anything = f"{path}.*" if path else "*"
        return anything if anything in self.types else f"{path}.{key}" if path else key


def section(title: str) -> Schema:
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \|", text, re.M)
    assert found, title
    return Schema({path: set(kinds.split(" or ")) for path, kinds in found})


def leaves(value: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the type of every value."""
    if path:
        yield path, NAMES[type(value)]
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from leaves(inside, schema, schema.spelled(path, key))
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from leaves(inside, schema, f"{path}[]")


def told(bodies: list[Any], title: str) -> None:
    """Check JSON against a section, both ways."""
    schema = section(title)
    seen: dict[str, set[str]] = {}
    for body in bodies:
        for path, kind in leaves(body, schema):
            seen.setdefault(path, set()).add(kind)
    for path, kinds in seen.items():
        allowed = schema.types.get(path, {"object"} if path.endswith("[]") else set())
        # What is a number may happen to be whole.
        kinds = {"number" if k == "integer" and "integer" not in allowed else k for k in kinds}
        assert kinds <= allowed, f"{title}: {path} is {kinds}, the page says {allowed or 'nothing'}"
    never = set(schema.types) - set(seen)
    assert not never, f"{title}: the page has {never}, no command does"


def without(body: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in keys}


def compared(body: dict[str, Any]) -> dict[str, Any]:
    """Check that blocks and rows have the keys of `total`, and leave them out."""
    for row in body["blocks"]:
        assert row.keys() == body["total"].keys()
    for row in body["rows"]:
        assert row.keys() == {*body["total"], "module"}
    return body | {name: [] for name in SAME_AS_TOTAL}


def test_writing_commands(sd15: Path, slim_tuned: Path, slim_lora: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "a.safetensors", "--overwrite"]
    against = ["resize", slim_lora, "--against", sd15, "--threshold", -2.4]
    bodies = [
        ran("merge", f"{slim_lora}:0.5", "--verify", *out),
        ran("merge", slim_lora, slim_lora, "--analyze", *out),
        ran("merge", slim_lora, "--into", sd15, "--verify", *out),
        ran("merge", slim_lora, "--dry-run", *out),
        ran("extract", sd15, slim_tuned, "--rank", 2, *out),
        ran(*against, *out),
        ran("cut-blocks", slim_lora, "--keep", "MID", *out),
        ran("convert", slim_lora, "--to", "diffusers", *out),
    ]
    foreign = {**ran(*against, *out), "unmatched": ["a: key"], "lost": {"key": 0.5}}
    # What compare prints has a section of its own.
    told([{**one, "analysis": one["analysis"] and {}} for one in (*bodies, foreign)],
         "Writing commands")  # fmt: skip
    (analysis,) = (one["analysis"] for one in bodies if one["analysis"])
    assert analysis == ran("compare", slim_lora, slim_lora)


def test_inspect(sd15: Path, slim_lora: Path, tmp_path: Path) -> None:
    found = ran("inspect", slim_lora, "--against", sd15, "--spectrum")
    header, model = ran("inspect", slim_lora), ran("inspect", sd15)
    odd = {name: ["a"] for name in ("dead", "unmeasured", "not_finite", "unclaimed", "unmatched")}
    told(
        [found, header, {**model, "architecture": None}, {**found, **odd, "faults": ["a"]}],
        "inspect",
    )
    several = json.loads(run("inspect", slim_lora, sd15, "--json").stdout)
    assert several == [header, model], "a list of what each gives alone"


def test_compare(
    sd15: Path, slim_tuned: Path, slim_lora: Path, make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_lora("sd1", rank=4, alpha=2, seed=3)
    cut, mix = tmp_path / "cut.safetensors", tmp_path / "mix.safetensors"
    ran("cut-blocks", slim_lora, "--keep", "MID,OUT03", "-o", cut)
    ran("resize", slim_lora, "--rank", 1, "-o", tmp_path / "small.safetensors")
    ran("merge", f"{slim_lora}:0.4", f"{other}:0.5", "-o", mix)
    bodies = [
        ran("compare", slim_lora, cut, "--rank", 2),
        ran("compare", slim_lora, tmp_path / "small.safetensors"),
        ran("compare", slim_lora, other, mix),
        ran("compare", sd15, slim_tuned, f"{sd15}+{slim_lora}"),
        ran("compare", sd15, slim_tuned),
    ]
    told([{**compared(one), "notes": ["a"]} for one in bodies], "compare")


def test_metadata(slim_lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    shown = [ran("metadata", "show", slim_lora)]
    edits = [
        ran("metadata", "set", slim_lora, "a=b", "-o", out),
        ran("metadata", "remove", out, "a", "--in-place"),
        ran("metadata", "hash", out, "--in-place"),
    ]
    told(shown, "metadata show")
    told(edits, "metadata set, remove, hash --in-place")
    told([ran("metadata", "hash", slim_lora)], "metadata hash")
    same = lorakit.edit_metadata(slim_lora, values={"a": "b"}, output=out, overwrite=True)
    assert same.as_dict() == edits[0]
    assert lorakit.edit_metadata(out, remove=["a"]).as_dict() == edits[1]
    assert lorakit.edit_metadata(out, hashes=True).as_dict() == edits[2]
    assert lorakit.metadata_hashes(out).as_dict() == ran("metadata", "hash", out)
    assert lorakit.read_metadata(out) == ran("metadata", "show", out)["metadata"]


WRITTEN = ("output", "output_bytes", "verified", "plan", "analysis")
"""What a command adds: a function writes nothing."""


@pytest.mark.parametrize(
    "name", ["merge", "into", "extract", "subtract", "resize", "against", "cut", "convert"]
)
def test_a_command_prints_the_report_that_python_gets(
    name: str, sd15: Path, slim_tuned: Path, slim_lora: Path, tmp_path: Path
) -> None:
    lora, base, tuned = (
        lorakit.load_lora(slim_lora),
        lorakit.open_source(sd15),
        lorakit.open_source(slim_tuned),
    )
    rule = RankRule(rank=2)
    cases: dict[str, tuple[list[object], Any]] = {
        "merge": (["merge", f"{slim_lora}:0.5"], lambda: lorakit.merge([(lora, 0.5)])),
        "into": (["merge", slim_lora, "--into", sd15], lambda: lorakit.apply(base, [(lora, 1.0)])),
        "extract": (
            ["extract", sd15, slim_tuned, "--rank", 2],
            lambda: lorakit.extract(base, tuned, rule=rule, choice=lorakit.Choice(convs=False)),
        ),
        "subtract": (
            ["extract", f"{slim_lora}:0.5", slim_lora],
            lambda: lorakit.subtract([(lora, 0.5)], [(lora, 1.0)], dialect="kohya"),
        ),
        "resize": (["resize", slim_lora, "--rank", 2], lambda: lorakit.resize(lora, rule=rule)),
        "against": (
            ["resize", slim_lora, "--against", sd15, "--threshold", -2.4],
            lambda: lorakit.resize(lora, rule=RankRule(threshold=-2.4), against=base),
        ),
        "cut": (
            ["cut-blocks", slim_lora, "--drop", "BASE"],
            lambda: lorakit.cut_blocks(
                lora, blocks={b: float(b != "BASE") for b in lora.blocks.blocks}
            ),
        ),
        "convert": (
            ["convert", slim_lora, "--to", "diffusers"],
            lambda: lorakit.convert(lora, dialect="diffusers"),
        ),
    }
    arguments, function = cases[name]
    _, report = function()
    found = ran(*arguments, "-o", tmp_path / "a.safetensors")
    same = json.loads(json.dumps(report.as_dict()))
    assert without(found, *WRITTEN) == without(same, *WRITTEN)
    assert all(same[key] is None for key in WRITTEN) and found["output"]
    assert found["rows"], "there is something to compare"


def test_inspect_and_compare_print_what_python_gets(
    sd15: Path, slim_tuned: Path, slim_lora: Path
) -> None:
    lora = lorakit.load_lora(slim_lora)
    base, tuned = lorakit.open_source(sd15), lorakit.open_source(slim_tuned)
    looked = lorakit.inspect(slim_lora, blocks=True, spectrum=True, against=base)
    pairs = [
        (looked, ["inspect", slim_lora, "--spectrum", "--against", sd15]),
        (lorakit.inspect(slim_lora), ["inspect", slim_lora]),
        (
            lorakit.compare([(lora, 0.7), (lora, -1.0)]),
            ["compare", f"{slim_lora}:0.7", f"{slim_lora}:-1"],
        ),
        (lorakit.compare_models([base, tuned]), ["compare", sd15, slim_tuned]),
    ]
    for found, arguments in pairs:
        assert json.loads(json.dumps(found.as_dict())) == ran(*arguments), arguments


def test_several_loras_give_a_list_of_what_each_gives_alone(
    slim_lora: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(slim_lora.read_bytes())
    done = run("resize", slim_lora, twin, "--rank", 2, "-o", tmp_path / "all", "--json")
    alone = ran("resize", slim_lora, "--rank", 2, "-o", tmp_path / "one.safetensors")
    reports = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and len(reports) == 2
    assert all(without(one, "output") == without(alone, "output") for one in reports)


def test_the_page_can_be_wrong() -> None:
    with pytest.raises(AssertionError, match="the page says nothing"):
        told([{"schema": 1, "new": 2}], "metadata show")
    with pytest.raises(AssertionError, match=r"schema is .'string'., the page says"):
        told([{"schema": "1"}], "metadata show")
    with pytest.raises(AssertionError, match="no command does"):
        told([{"schema": 1}], "metadata show")
