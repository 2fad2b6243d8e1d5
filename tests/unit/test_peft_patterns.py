"""PEFT's patterns: as PEFT reads them, but none that takes for ever."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import peftpatterns
from lorakit.errors import AdapterError
from lorakit.peftpatterns import Patterns

PARTS = ("down_blocks", "0", "attn", "to_q", "to", "a")
PATHS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    PATHS,
    PATHS.map(lambda path: f"^{re.escape(path)}"),
    PATHS.map(re.escape),
    st.sampled_from([".*to_q", r"down_blocks\.\d+\.attn", "t[ao]", "(attn|to)", "a?", "^0", ".*"]),
)


def as_peft(patterns: dict[str, float], path: str) -> float | None:
    """Return the first pattern's value, as PEFT's `get_pattern_key` finds it."""
    hits = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", path))
    return next(hits, None)


@given(patterns=st.lists(PATTERNS, max_size=5, unique=True), path=PATHS)
def test_the_first_that_matches_the_end_wins(patterns: list[str], path: str) -> None:
    values = {pattern: float(place) for place, pattern in enumerate(patterns)}
    assert Patterns.of(values).value(path, None) == as_peft(values, path)


def test_what_no_pattern_matches_has_the_default() -> None:
    found = Patterns.of({"to_q": 3.0, "to_k": None})
    assert found.value("attn.to_v", 7.0) == 7.0
    assert found.value("attn.to_q", 7.0) == 3.0
    assert found.value("attn.to_k", 7.0) is None


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*", "(.*)*x", "(a{9}){9}", r"(a)\1", "(?=a)", ".*.*.*x", "(", "a{99999999999}",
     "(?#", "[", "*", r"\2"],
)  # fmt: skip
def test_an_expression_that_may_take_years_is_refused(pattern: str) -> None:
    begun = time.monotonic()
    with pytest.raises(AdapterError, match=r"plain patterns.*merge it with PEFT"):
        Patterns.of({pattern: 1.0})
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("pattern", [r"\(a\)*", "[)*+]x", "a+b*", r"layers\.\d+\.\d+", "(a|b)c?"])
def test_an_expression_that_cannot_is_taken(pattern: str) -> None:
    Patterns.of({pattern: 1.0}).value("a.b", None)


def test_the_slowest_that_are_taken_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peftpatterns._Clock, "__init__", lambda self: setattr(self, "left", 0.2))
    found = Patterns.of({f".*.*x{number}": 1.0 for number in range(10_000)})
    begun = time.monotonic()
    with pytest.raises(AdapterError, match="take longer"):
        while time.monotonic() - begun < 20:
            found.value(".".join("a" * 150), None)
    assert time.monotonic() - begun < 10


def test_a_path_without_end_is_refused() -> None:
    with pytest.raises(AdapterError, match="at most 300 letters"):
        Patterns.of({"a": 1.0}).value("a" * 301, None)
    assert Patterns.of({}).value("a" * 301, 2.0) == 2.0


def test_ten_thousand_paths_of_their_own_are_fast() -> None:
    paths = [f"down_blocks.{number}.attn.to_q" for number in range(10_000)]
    found = Patterns.of({f"^{re.escape(path)}": float(i) for i, path in enumerate(paths)})
    begun = time.monotonic()
    assert [found.value(path, None) for path in paths] == [float(i) for i in range(10_000)]
    assert time.monotonic() - begun < 2
