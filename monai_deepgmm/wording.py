"""Names, counts and lists in messages: on one line, and short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

_LISTED = 6  # names in a message


def shown(name: str | PathLike[str]) -> str:
    """A name or text on one line: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def counted(number: int, noun: str) -> str:
    """``1 patient``, ``2 patients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(shown, names[:_LISTED])) + more


def spans(numbers: Iterable[int]) -> str:
    """Rising numbers, such as those of slices; three or more that follow one another as ``4 to 9``."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs)
    return ", ".join(word for words in told for word in words)
