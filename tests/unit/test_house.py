"""The house: who may import whom, what loads no torch, how large a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lorakit"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    "errors": 0,
    "progress": 0,
    "version": 0,
    "names": 1,
    "compute": 1,
    "linalg": 2,
    "tensorfile": 3,
    "adapters": 4,
    "methods": 4,
    "pictures": 4,
    "report": 4,
    "peftpatterns": 1,
    "peftconfig": 4,
    "peftfolder": 5,
    "lorafile": 6,
    "models": 6,
    "fusing": 7,
    "saving": 8,
    "operations": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
"""A room imports only from rooms of a lower level, and from itself."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_point_down(path: Path) -> None:
    here = room(path)
    for name in imported(path):
        if not name.startswith("lorakit."):
            continue
        there = name.split(".")[1]
        assert there == here or LEVELS[there] < LEVELS[here], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_holds_one_idea_in_under_400_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    assert ast.get_docstring(ast.parse(text)), "every file says what it holds"


@pytest.mark.parametrize(
    ("rooms", "foreign"),
    [
        (("names",), {"torch", "numpy", "safetensors"}),
        (tuple(set(LEVELS) - {"cli", "__init__", "__main__"}), {"click", "rich"}),
        (("linalg",), {"safetensors"}),
    ],
)
def test_a_room_knows_only_its_own_tools(rooms: tuple[str, ...], foreign: set[str]) -> None:
    for path in FILES:
        if room(path) in rooms:
            tops = {name.split(".")[0] for name in imported(path)}
            assert not tops & foreign, f"{path.name} imports {tops & foreign}"


def test_only_the_named_packages_are_imported() -> None:
    allowed = {"torch", "safetensors", "numpy", "click", "rich", "lorakit"} | set(
        sys.stdlib_module_names
    )
    for path in FILES:
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


@pytest.mark.parametrize(
    "code",
    [
        "import lorakit",
        "import lorakit.cli",
        "import lorakit.cli as c; c.lorakit.main(['--help'], standalone_mode=False)",
        "import lorakit.operations.inspect",
        "import lorakit.tensorfile.header",
    ],
)
def test_help_and_headers_load_no_torch(code: str) -> None:
    check = f"{code}\nimport sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_loads() -> None:
    import lorakit

    for name in lorakit.__all__:
        assert getattr(lorakit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lorakit.nothing  # noqa: B018
