"""Tables and lists as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Return rows of cells as aligned text; the first ``left`` columns are left-aligned.

    >>> print(table([("a", 1), ("bcd", 23)]))
    a      1
    bcd   23
    """
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "   ".join(
            str(cell).ljust(width) if i < left else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def shorten(entries: Iterable[str]) -> str:
    """Return the first five entries, separated by commas, and dots if there are more.

    >>> shorten("abcdefg")
    'a, b, c, d, e, ...'
    """
    entries = list(entries)
    return ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
