"""The reference of the Python API, made of the public names' signatures and docstrings.

A docstring is a sentence, paragraphs, then sections: Args, Returns, Raises, Source, Cost.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import NamedTuple

import lorakit
from lorakit import errors

HEAD = """# Python reference

This page is generated from signatures and docstrings by `docs/generate.py`; CI fails if it is out
of date, or if a public name or one of its arguments is not explained. [From Python](python.md)
shows how they go together.

ΔW is the change that a LoRA makes to a weight, σ are its singular values, ‖·‖ is the Frobenius
norm. What stands behind the `*` of a signature is given by name. A `Stack` is a sequence of pairs,
a `LoraFile` and its strength: a number or a `Strength`. `Progress` is called with (what, done,
total). `LINEAR` is the signed sum.
"""
CHAPTERS: Mapping[str, tuple[str, ...]] = {
    "Read and write": ("load_lora", "save_lora", "open_source", "save_model"),
    "Merge, extract, cut": (
        *("merge", "apply", "extract", "subtract", "resize", "yardsticks"),
        *("cut_blocks", "convert"),
    ),
    "Look": ("inspect", "compare", "compare_models"),
    "Metadata": ("read_metadata", "edit_metadata", "metadata_hashes"),
    "How it is to be done": ("Strength", "Method", "RankRule", "Choice", "Output", "Compute"),
    "What carries the data": ("LoraFile", "TensorSource", "Report"),
}
NO_ENTRY = ("__version__",)
INSIDE = ("Architecture", "ModuleName", "Addend", "Entry", "Extent")
"""What signatures name, and nobody needs to know for it."""
SECTIONS = ("Args", "Returns", "Raises", "Source", "Cost")
WIDTH = 96


class Thing(NamedTuple):
    """A function or a class, its source as a tree and its docstring by sections."""

    name: str
    value: object
    tree: ast.FunctionDef | ast.ClassDef
    doc: Mapping[str, str]


def api_page() -> str:
    """Return the page: a chapter for each group of names, then what else they speak of."""
    names = [name for chapter in CHAPTERS.values() for name in chapter]
    if set(names) | set(NO_ENTRY) != set(lorakit.__all__):
        odd = sorted(set(lorakit.__all__) ^ {*names, *NO_ENTRY})
        raise SystemExit(f"docs/api.py: {', '.join(odd)} is in no chapter, or no public name")
    public = {name: thing(name, getattr(lorakit, name)) for name in names}
    others = spoken_of(public)
    known = {*public, *others}
    parts = [HEAD]
    for title, members in CHAPTERS.items():
        parts += [f"## {title}\n", *(entry(public[name], known) for name in members)]
    parts += ["## What else they speak of\n", *(entry(one, known) for one in others.values())]
    return "\n".join([*parts, failures()])


def thing(name: str, value: object) -> Thing:
    """Find the source and the docstring of a name, and check that they agree."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))  # type: ignore[arg-type]
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef | ast.ClassDef):
        raise SystemExit(f"docs/api.py: {name} is neither a function nor a class")
    doc = sections(inspect.getdoc(value) or "")
    if not doc[""]:
        raise SystemExit(f"docs/api.py: {name} has no docstring")
    odd = set(explained(doc.get("Args", ""))) ^ {argument for argument, _, _ in taken(tree)}
    if odd and ("Args" in doc or isinstance(tree, ast.FunctionDef)):
        raise SystemExit(f"docs/api.py: {name} takes and explains not the same: {sorted(odd)}")
    return Thing(name, value, tree, doc)


def sections(docstring: str) -> dict[str, str]:
    """Take a docstring apart; what comes before the first section has the key ""."""
    found = {"": ""}
    name = ""
    for line in docstring.splitlines():
        head = re.fullmatch(rf"({'|'.join(SECTIONS)}):(.*)", line)
        if head:
            name = head[1]
            found[name] = head[2].strip()
        else:
            found[name] += f"\n{line}"
    return {name: textwrap.dedent(text).strip() for name, text in found.items()}


def explained(section: str) -> dict[str, str]:
    """Read the entries of a section, `name: meaning`, whose further lines are indented."""
    found: dict[str, str] = {}
    for line in section.splitlines():
        head = re.fullmatch(r"(\w+): (.*)", line)
        if head:
            found[head[1]] = head[2]
        elif line.strip():
            found[list(found)[-1]] += f" {line.strip()}"
    return found


def taken(tree: ast.FunctionDef | ast.ClassDef) -> list[tuple[str, str, str]]:
    """Return the parameters of a function or a dataclass: name, type and default."""
    if isinstance(tree, ast.ClassDef):
        return list(_fields(tree))
    inner = tree.args
    plain = [*inner.posonlyargs, *inner.args]
    none: list[ast.expr | None] = [None] * (len(plain) - len(inner.defaults))
    defaults = [*none, *inner.defaults, *inner.kw_defaults]
    return [
        (argument.arg, _type(argument.annotation), "" if default is None else ast.unparse(default))
        for argument, default in zip([*plain, *inner.kwonlyargs], defaults, strict=True)
        if argument.arg not in ("self", "cls")
    ]


def _fields(tree: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = "" if node.value is None else ast.unparse(node.value)
            factory = re.fullmatch(r"field\(default_factory=(\w+)\)", default)
            default = "{}" if factory and factory[1] == "dict" else default
            yield node.target.id, _type(node.annotation), default


def _type(annotation: ast.expr | None) -> str:
    """Write a type as it stands in the source, a quoted one without its quotes."""
    return "" if annotation is None else ast.unparse(annotation).replace("'", "")


def members(tree: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return the public methods and properties of a class."""
    inner = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node for node in inner if not node.name.startswith("_")]


def spoken_of(public: Mapping[str, Thing]) -> dict[str, Thing]:
    """Return lorakit's classes that the public names speak of, and those that these do."""
    found: dict[str, Thing] = {}
    waiting = list(public.values())
    while waiting:
        one = waiting.pop(0)
        for name in _types(one.tree):
            value = _meaning(str(getattr(one.value, "__module__", "")), name)
            if inspect.isclass(value) and name not in (*public, *found, *INSIDE):
                found[name] = thing(name, value)
                waiting.append(found[name])
    return found


def _types(tree: ast.FunctionDef | ast.ClassDef) -> list[str]:
    texts = [kind for _, kind, _ in taken(tree)]
    inner = [tree] if isinstance(tree, ast.FunctionDef) else members(tree)
    texts += [_type(node.returns) for node in inner]
    return sorted({name for text in texts for name in re.findall(r"\b[A-Za-z]\w*", text)})


def _meaning(module: str, name: str) -> object:
    """Return what a name in a module of lorakit stands for, if only type checkers import it too."""
    home = import_module(module)
    value = getattr(home, name, None)
    for node in ast.walk(ast.parse(inspect.getsource(home))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            inside = str(node.module).startswith("lorakit")
            value = getattr(import_module(str(node.module)), name) if inside else None
    return value if str(getattr(value, "__module__", "")).startswith("lorakit.") else None


def entry(one: Thing, known: set[str]) -> str:
    """Return the section of a name: signature, text, arguments, what comes back, failures."""
    parts = [f"### {one.name}", _signature(one.name, one.tree), one.doc[""]]
    if "Args" in one.doc:
        lines = explained(one.doc["Args"]).items()
        parts.append("\n".join(f"- `{name}`: {meaning}" for name, meaning in lines))
    if isinstance(one.tree, ast.ClassDef) and (shown := members(one.tree)):
        parts.append("**Members**\n\n" + "\n".join(map(_member, shown)))
    if "Returns" in one.doc:
        parts.append(f"**Returns** {one.doc['Returns']}")
    if "Raises" in one.doc:
        lines = explained(one.doc["Raises"]).items()
        raised = "\n".join(f"- [`{name}`](#errors): {meaning}" for name, meaning in lines)
        parts.append(f"**Raises**\n\n{raised}")
    parts += [f"**{name}** {one.doc[name]}" for name in ("Source", "Cost") if name in one.doc]
    linked = [name for name in _types(one.tree) if name in known and name != one.name]
    if linked:
        parts.append("See " + ", ".join(f"[`{name}`](#{name.lower()})" for name in linked) + ".")
    return "\n\n".join(parts) + "\n"


def _signature(name: str, tree: ast.FunctionDef | ast.ClassDef) -> str:
    """Write a call as Python would, a line each argument where it is long."""
    wanted = [_argument(*argument) for argument in taken(tree)]
    back = ""
    if isinstance(tree, ast.FunctionDef):
        back = f" -> {_type(tree.returns)}"
        by_name = len(tree.args.kwonlyargs)
    else:
        keywords = any("kw_only" in ast.unparse(decorator) for decorator in tree.decorator_list)
        by_name = len(wanted) if keywords else 0
    if by_name:
        wanted.insert(len(wanted) - by_name, "*")
    if not wanted and isinstance(tree, ast.ClassDef):
        return f"```py\nclass {name}\n```"
    line = f"{name}({', '.join(wanted)}){back}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {argument},\n" for argument in wanted) + f"){back}"
    return f"```py\n{line}\n```"


def _argument(name: str, kind: str, default: str) -> str:
    typed = f"{name}: {kind}" if kind else name
    return f"{typed} = {default}".replace("'", '"') if default else typed


def _member(node: ast.FunctionDef) -> str:
    """Return a line for a method or a property, of its first sentence."""
    meaning = sections(ast.get_docstring(node) or "")[""].partition("\n\n")[0].replace("\n", " ")
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        return f"- `.{node.name}: {_type(node.returns)}`: {meaning}"
    wanted = ", ".join(_argument(*argument) for argument in taken(node))
    return f"- `.{node.name}({wanted}) -> {_type(node.returns)}`: {meaning}"


def failures() -> str:
    """Return the section of the errors: each with its sentence."""
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    lines = [f"- `lorakit.errors.{kind.__name__}`: {inspect.getdoc(kind)}" for kind in kinds]
    return "\n".join(["## Errors\n", *lines, ""])
