"""The command line's LORA and MODEL strings."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorakit.errors import SpecError

Exists = Callable[[str], bool]

LARGEST = 1e30
"""Of a strength, an alpha, a scale: squares of what it multiplies still fit float64."""
_PLUS = re.compile(r"(?<![:=])(?<!\d[eE])\+")
_DRIVE = re.compile(r"(?:\\\\[?.]\\)?[A-Za-z]:(?=[\\/])")
"""What a path on a Windows drive begins with; also where it is written for paths of any length."""
_TIMED = ("start", "stop", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """A LoRA at strengths: `PATH[:STRENGTH][:te=S][:unet=S][:lbw=PRESET|CSV][:lbwe=RULES]`."""

    path: str
    strength: float = 1.0
    te: float | None = None
    unet: float | None = None
    lbw: str | None = None
    lbwe: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model with LoRAs on it: `PATH[+LORA]...`."""

    path: str
    loras: tuple[LoraSpec, ...] = ()


def parse_lora(text: str, *, exists: Exists) -> LoraSpec:
    """Read a LORA argument; a path that exists is taken whole first.

    Raises:
        SpecError: a field is unknown, or a strength is no finite number.
    """
    end = _path_end(text, ":", exists)
    return lora_spec(text[:end], _fields(text[end:]), text)


def parse_model(text: str, *, exists: Exists) -> ModelSpec:
    """Read a MODEL argument.

    Raises:
        SpecError: the model has a strength, or a LoRA cannot be read.
    """
    first, *loras = parse_sum(text, exists=exists)
    if first != LoraSpec(path=first.path):
        raise SpecError(f"'{text}': a model has no strength; write strengths behind the LoRAs.")
    return ModelSpec(path=first.path, loras=tuple(loras))


def parse_sum(text: str, *, exists: Exists) -> tuple[LoraSpec, ...]:
    """Read a sum `A[:…]+B[:…]`; a `+` inside a path that exists does not split it.

    Raises:
        SpecError: a path is missing, or a field cannot be read.
    """
    return tuple(lora_spec(path, fields, text) for path, fields in _split_terms(text, exists))


def format_lora(spec: LoraSpec) -> str:
    """Write a LORA argument."""
    fields = [spec.path]
    if spec.strength != 1.0:
        fields.append(_shortest(spec.strength))
    for name in ("te", "unet", "lbw", "lbwe"):
        value = getattr(spec, name)
        if value is not None:
            number = isinstance(value, float)
            fields.append(f"{name}={_shortest(value) if number else value}")
    return ":".join(fields)


def _shortest(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def lora_spec(path: str, fields: list[str], text: str) -> LoraSpec:
    """Read the fields behind a path; a tag's second number is the UNet's strength.

    Raises:
        SpecError: a field is unknown, given twice, or no finite number; or there is no path.
    """
    if not path:
        raise SpecError(f"'{text}': expected PATH[:STRENGTH], found no path.")
    numbers: list[float] = []
    named: dict[str, str] = {}
    for field in _joined_rules(fields):
        name, sign, value = field.partition("=")
        name = name.strip()
        if not sign:
            numbers.append(_number(field, text))
        elif name in _TIMED:
            raise SpecError(
                f"'{text}': {name}= acts during sampling and cannot be baked into a file."
            )
        elif name not in ("te", "unet", "lbw", "lbwe") or name in named:
            raise SpecError(
                f"'{text}': {field} is unknown or given twice; use te=, unet=, lbw=, lbwe=."
            )
        else:
            named[name] = value
    if len(numbers) > 2:
        raise SpecError(f"'{text}': expected at most two strengths, found {len(numbers)}.")
    te, unet = (_number(named[key], text) if key in named else None for key in ("te", "unet"))
    if len(numbers) == 2:
        te = numbers[0] if te is None else te
        unet = numbers[1] if unet is None else unet
    return LoraSpec(
        path=path,
        strength=numbers[-1] if numbers else 1.0,
        te=te,
        unet=unet,
        lbw=named.get("lbw"),
        lbwe=named.get("lbwe"),
    )


def _joined_rules(fields: list[str]) -> list[str]:
    """Join what belongs to lbwe=, whose rules hold colons themselves."""
    for place, field in enumerate(fields):
        if field.strip().startswith("lbwe="):
            return [*fields[:place], ":".join(fields[place:])]
    return fields


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise SpecError(
            f"'{text}': '{value}' is no strength and no file of that name exists."
        ) from None
    if not abs(number) <= LARGEST:
        raise SpecError(
            f"'{text}': expected a finite strength of at most {LARGEST:g}, found {value}."
        )
    return number


def _split_terms(text: str, exists: Exists) -> Iterator[tuple[str, list[str]]]:
    """Split a sum into paths and their fields; in a field a + may also be a sign."""
    while True:
        end = _path_end(text, ":+", exists)
        plus = _PLUS.search(text, end)
        yield text[:end], _fields(text[end : plus.start() if plus else None])
        if plus is None:
            return
        text = text[plus.end() :]


def _fields(text: str) -> list[str]:
    return text.removeprefix(":").split(":") if text else []


def _path_end(text: str, separators: str, exists: Exists) -> int:
    """Return where the longest path ends that exists and that a separator or the end follows.

    Where none exists, it is the first separator, a drive's colon apart.
    """
    drive = _DRIVE.match(text)
    first = drive.end() if drive else 0
    ends = [place for place, letter in enumerate(text) if letter in separators and place >= first]
    ends.append(len(text))
    return next((end for end in reversed(ends) if end and exists(text[:end])), ends[0])
