"""What mkdocs does not do by itself; mkdocs.yml calls it.

- The navigation takes whole folders.
- A file of the repository that a page names, a test above all, is a page of the site too.
- A page that asks another host for something, or that the site would read otherwise than the
  repository does, is an error.
"""

import logging
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".toml": "toml"}
CODE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
LINK = re.compile(r"\]\(([^)#:\s]+)")
NAMED = re.compile(r"(?<![\[`])`((?:tests|examples|lorakit|benchmarks|docs)/[\w/.-]+\.py)`(?!\])")
BETWEEN_WIDE_LETTERS = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])"
)
ASKED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\W?(?:https?:)?//.*?>")
SOURCE = """---
search: {{exclude: true}}
hide: [toc]
---
# {path}

```{language}
{text}
```
"""
log = logging.getLogger("mkdocs.hooks.lorakit")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that pages name, write the navigation out, offer the languages there are."""
    pages = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for path in sorted({path for uri, text in pages.items() for path in _named(text, uri)}):
        language, text = LANGUAGES[Path(path).suffix], (ROOT / path).read_text(encoding="utf-8")
        source = File.generated(
            config,
            f"source/{path}.md",
            content=SOURCE.format(path=path, language=language, text=text),
            inclusion=InclusionLevel.NOT_IN_NAV,
        )
        files.append(source)
    config.nav = list(written_out(config.nav or [], pages))
    if "ja/index.md" in pages:
        config.extra["alternate"] = [
            {"name": "English", "link": ".", "lang": "en"},
            {"name": "日本語", "link": "ja/", "lang": "ja"},
        ]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead what names a file of the repository to its page; end no line of Japanese by a space."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    for line in misread(markdown):
        log.warning("%s: a list or table needs an empty line before it: %s", uri, line)
    return _outside_code(markdown, lambda text: _led(BETWEEN_WIDE_LETTERS.sub("", text), uri))


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Warn of what a browser would ask another host for."""
    for found in ASKED.findall(output):
        log.warning("%s: asks another host: %s", page.file.src_uri, found)
    return output


def written_out(nav: Sequence[Any], pages: Mapping[str, str]) -> Iterator[Any]:
    """Replace the patterns of a navigation by the pages that they stand for.

    Args:
        nav: mkdocs' own, with patterns: `folder/*`, and `*` for what nothing else names.
        pages: path -> text.

    Yields:
        Items as mkdocs takes them, without pages that are not there.
    """
    named = {path for item in nav for path in _paths(item)}
    folders = tuple(path.removesuffix("*") for path in named if path.endswith("/*"))
    left = [p for p in sorted(pages) if p not in named and not p.startswith(folders)]
    yield from _items(nav, pages, left)


def _paths(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
        return
    for inner in item.values() if isinstance(item, dict) else item:
        yield from _paths(inner)


def _items(nav: Sequence[Any], pages: Mapping[str, str], left: Sequence[str]) -> Iterator[Any]:
    for item in nav:
        title, inner = next(iter(item.items())) if isinstance(item, dict) else ("", item)
        if isinstance(inner, str) and not inner.endswith("*"):
            if inner in pages:
                yield item
            continue
        found = _found(inner, pages, left)
        if title and found:
            yield {title: found}
        elif not title:
            yield from found


def _found(inner: Any, pages: Mapping[str, str], left: Sequence[str]) -> list[Any]:
    if not isinstance(inner, str):
        return list(_items(inner, pages, left))
    return list(left) if inner == "*" else _folder(inner.removesuffix("/*"), pages)


def _folder(folder: str, pages: Mapping[str, str]) -> list[Any]:
    """Return a folder's pages in the order in which its index links them, then its folders."""
    index = pages.get(f"{folder}/index.md", "")
    inside = [path for path in sorted(pages) if posixpath.dirname(path) == folder]
    inside.sort(key=lambda path: _place(index, posixpath.basename(path)))
    below = sorted({_below(folder, path) for path in pages} - {""})
    below.sort(key=lambda path: _place(index, f"{posixpath.basename(path)}/"))
    return inside + [{_title(inner, pages): _folder(inner, pages)} for inner in below]


def _below(folder: str, path: str) -> str:
    """Return the folder in a folder that a page is in, or nothing."""
    name, deeper, _ = path.removeprefix(f"{folder}/").partition("/")
    return f"{folder}/{name}" if path.startswith(f"{folder}/") and deeper else ""


def _place(index: str, name: str) -> int:
    found = index.find(f"]({name}")
    return -1 if name == "index.md" else found if found >= 0 else len(index)


def _title(folder: str, pages: Mapping[str, str]) -> str:
    heading = re.search(r"^# (.+)$", pages.get(f"{folder}/index.md", ""), re.M)
    return heading[1] if heading else posixpath.basename(folder)


def misread(markdown: str) -> Iterator[str]:
    """Yield the lines that begin a list or a table in the repository and not on the site."""
    for block in re.split(r"\n\s*\n", CODE.sub("", markdown)):
        first, *rest = block.strip("\n").splitlines() or [""]
        if not re.match(r" *(?:[-*|]|\d+\.|<)", first):
            yield from (line for line in rest if re.match(r"(?:- |\* |\||\d+\. )", line))


def _named(text: str, uri: str) -> Iterator[str]:
    """Yield the files of the repository that a page names, outside of code."""
    for part in CODE.split(text)[::2]:
        found = [_inside_root(target, uri) for target in LINK.findall(part)]
        for path in (*found, *NAMED.findall(part)):
            if path and Path(path).suffix in LANGUAGES and (ROOT / path).is_file():
                yield path


def _inside_root(target: str, uri: str) -> str:
    """Return the path in the repository that a link outside of the docs leads to, or nothing."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), target))
    return "" if path.startswith(("docs/", "../", "/")) and not path.endswith(".py") else path


def _led(text: str, uri: str) -> str:
    here = posixpath.dirname(uri)

    def link(found: re.Match[str]) -> str:
        path = _inside_root(found[1], uri)
        if path == "README.md":
            return f"]({posixpath.relpath('index.md', here)}"
        if Path(path).suffix in LANGUAGES and (ROOT / path).is_file():
            return f"]({posixpath.relpath(f'source/{path}.md', here)}"
        return found[0]

    def name(found: re.Match[str]) -> str:
        if not (ROOT / found[1]).is_file():
            return found[0]
        return f"[`{found[1]}`]({posixpath.relpath(f'source/{found[1]}.md', here)})"

    return NAMED.sub(name, LINK.sub(link, text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = CODE.split(markdown)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))
