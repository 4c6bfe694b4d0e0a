"""Rules: which leaves get what, by patterns of their paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jaxcompress._paths import leaves_with_paths

__all__ = ["Patterns", "assign", "matched"]

Patterns = Sequence[str]
T = TypeVar("T")


def assign(params: Any, rules: Mapping[str, T | None]) -> dict[str, T]:
    """`{path: value}` of the first rule whose pattern matches each path in full.

    Patterns are regular expressions; rules are tried in their order, and a value of
    None leaves its leaves alone.

    Raises:
      ValueError: a pattern is no regular expression, or matches no path at all; the
        paths there are, are named.
      TypeError: `rules` is not a mapping.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(
            'rules map patterns of paths to specs, as in {".*kernel": jc.quantize.int8()}; '
            f"got {type(rules).__name__}"
        )
    compiled = [(_compile(pattern), value) for pattern, value in rules.items()]
    paths = [path for path, _ in leaves_with_paths(params)]
    for pattern, _ in compiled:
        if not any(pattern.fullmatch(path) for path in paths):
            raise ValueError(
                f"the rule {pattern.pattern!r} matches none of the paths "
                + ", ".join(map(repr, paths))
            )
    first = {
        path: next((value for pattern, value in compiled if pattern.fullmatch(path)), None)
        for path in paths
    }
    return {path: value for path, value in first.items() if value is not None}


def matched(params: Any, patterns: Patterns) -> set[str]:
    """The paths that match one of `patterns`; raises as `assign` does."""
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(f"patterns are a list of regular expressions; got {patterns!r}")
    return set(assign(params, dict.fromkeys(patterns, True)))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
