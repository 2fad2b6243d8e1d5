"""PEFT's patterns of module paths, with limits: they come from a file and are regular expressions.

A crafted expression takes years to match. Only those are tried that cannot do worse than the third
power of a path's length, and all of them together get a few seconds.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lorakit.errors import AdapterError

SECONDS = 20.0
"""Time for all matching of one file; plain names take a millisecond a thousand."""
LONGEST = 300
"""Letters of a module's path: more than twice those of the longest that is known."""
_LITERAL = re.compile(r"(?P<start>\^?)(?P<body>(?:[\w/-]|\\[^\w])+)\$?")
_ESCAPED, _CLASS = re.compile(r"\\(?P<what>.)", re.DOTALL), re.compile(r"\[\^?\]?[^]]*\]")
_REPEATS = re.compile(r"[*+{]")
_MOST_REPEATS, _MOST_SEARCHED = 2, 3

Hit = tuple[int, float | None]
"""A pattern's place among the others, and its value."""


@dataclass(slots=True, kw_only=True)
class _Clock:
    left: float = SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Values by pattern; the first that matches the end of a path wins.

    Args:
        exact: value and place by path.
        ends: likewise by the end of a path.
        others: expressions with their places and values, in order.
    """

    exact: Mapping[str, Hit]
    ends: Mapping[str, Hit]
    others: tuple[tuple[re.Pattern[str], Hit], ...]
    clock: _Clock = field(default_factory=_Clock)

    @staticmethod
    def of(values: Mapping[str, float | None]) -> "Patterns":
        """Read patterns.

        Raises:
            AdapterError: one is no regular expression, or one that is not tried.

        Source: PEFT 0.21.2, `get_pattern_key`.
            - expressions that can take very long are refused
        """
        exact: dict[str, Hit] = {}
        ends: dict[str, Hit] = {}
        others = []
        for place, (pattern, value) in enumerate(values.items()):
            literal = _LITERAL.fullmatch(pattern)
            if literal is None:
                others.append((_compiled(pattern), (place, value)))
                continue
            table = exact if literal["start"] else ends
            table.setdefault(_ESCAPED.sub(r"\g<what>", literal["body"]), (place, value))
        return Patterns(exact=exact, ends=ends, others=tuple(others))

    def value(self, path: str, default: float | None) -> float | None:
        """Return the value for a path, the default where no pattern matches.

        Raises:
            AdapterError: the path is too long, or the patterns take too long.
        """
        if not (self.exact or self.ends or self.others):
            return default
        if len(path) > LONGEST:
            raise AdapterError(
                f"expected a path of at most {LONGEST} letters, found {len(path)}; merge it with "
                "PEFT first"
            )
        hits = [table[end] for end, table in self._plain(path) if end in table]
        first = min(hits, default=None)
        begun = time.monotonic()
        for pattern, hit in self.others:
            if first is not None and first[0] < hit[0]:
                break
            if pattern.match(path):
                first = hit
            if time.monotonic() - begun > self.clock.left:
                raise AdapterError(
                    f"has patterns in its configuration that take longer than {SECONDS:.0f} s to "
                    "match; merge it with PEFT first"
                )
        self.clock.left -= time.monotonic() - begun
        return default if first is None else first[1]

    def _plain(self, path: str) -> Iterator[tuple[str, Mapping[str, Hit]]]:
        yield path, self.exact
        end = path
        while end:
            yield end, self.ends
            end = end.partition(".")[2]


def can_take_years(pattern: str) -> bool:
    """Tell whether the time to search a short text for a pattern may grow without bound.

    A part that repeats must not repeat itself, and few parts may; a `.*` at either end says nothing
    where a text is searched. What is no regular expression takes no time.
    """
    plain = _CLASS.sub("c", _ESCAPED.sub(_harmless, pattern))
    plain = plain.removeprefix("(?i)").replace("(?:", "(").removeprefix(".*").removesuffix(".*")
    return _is_nested(plain) or len(_REPEATS.findall(plain)) > _MOST_SEARCHED


def _is_nested(plain: str) -> bool:
    return re.search(r"\)[*+{]|\(\?|#", plain) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    plain = _CLASS.sub("c", _ESCAPED.sub(_harmless, pattern))
    wild = _is_nested(plain) or len(_REPEATS.findall(plain)) > _MOST_REPEATS
    try:
        if not wild:
            return re.compile(rf"(?:.*\.)?(?:{pattern})$")
        why = "one that can take very long"
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error)
    raise AdapterError(
        f"expected plain patterns in its configuration, found {pattern[:60]!r}, {why}; merge it "
        "with PEFT first"
    )


def _harmless(escape: re.Match[str]) -> str:
    """A reference to a group repeats what the group holds; every other escape is one letter."""
    return "(?" if escape["what"].isdigit() else "x"
