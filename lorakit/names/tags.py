"""The web UI's tags: `<lora:style:0.8:lbw=OUTALL>`, alone or in a prompt."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unicodedata import normalize

from lorakit.errors import SpecError
from lorakit.names.specs import LoraSpec, lora_spec

_TAG = re.compile(r"<lora:([^<>]*)>")
_WEIGHTS = re.compile(r"[^=]*,[^=]*|(?!nan$|inf$|infinity$)[^=,\d.+-][^=,]*", re.IGNORECASE)
_OLD_NAME = re.compile(r"^w=")
_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")


def parse_tag(text: str, find: Callable[[str], str]) -> LoraSpec:
    """Read a pasted tag; `find` turns a name into a path.

    `<lora:NAME:TE:UNET:lbw=…:lbwe=…>`: one number is both strengths; `w=` and a bare word or vector
    behind the numbers are older spellings of `lbw=`.

    Raises:
        SpecError: it is no tag, or a field cannot be baked into a file.
    """
    found = _TAG.fullmatch(text.strip())
    if found is None:
        raise SpecError(f"'{text}': expected one tag such as <lora:style:0.8>.")
    name, *fields = found[1].split(":")
    return lora_spec(find(name), list(_current(fields)), text)


def _current(fields: Iterable[str]) -> Iterator[str]:
    """Spell older fields as now; what follows lbwe= belongs to its rules."""
    rules = False
    for field in fields:
        rules = rules or field.startswith("lbwe=")
        older = not rules and _WEIGHTS.fullmatch(field)
        yield f"lbw={field}" if older else _OLD_NAME.sub("lbw=", field)


def parse_prompt(prompt: str, find: Callable[[str], str]) -> list[LoraSpec]:
    """Read all the tags of a prompt, in order.

    Raises:
        SpecError: there is none, or one cannot be read.
    """
    specs = [parse_tag(found[0], find) for found in _TAG.finditer(prompt)]
    if not specs:
        raise SpecError("The prompt holds no <lora:…> tag.")
    return specs


def composed(name: str) -> str:
    """Return a name with accents joined to their letters: macOS stores them apart."""
    return normalize("NFC", name)


def find_lora(name: str, *folders: Path) -> str:
    """Find a LoRA by the name that tags use: the file's name without its suffix, in any subfolder.

    Raises:
        SpecError: there is none, or several.
    """
    for folder in folders:
        if not folder.is_dir():
            raise SpecError(f"{folder}: expected a folder of LoRAs; give --lora-dir.")
    below = (file for folder in folders for file in folder.rglob("*"))
    named = {file for file in below if composed(file.stem) == composed(name)}
    files = sorted(file for file in named if file.is_file())
    for suffix in _SUFFIXES:
        found = [file for file in files if file.suffix == suffix]
        if len(found) > 1:
            raise SpecError(f"'{name}' is the name of several files: {found[0]} and {found[1]}.")
        if found:
            return str(found[0])
    places = ", ".join(str(folder) for folder in folders)
    raise SpecError(f"'{name}': no LoRA of that name in {places}; give --lora-dir.")
