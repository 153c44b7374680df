"""Text from data, models and files, made safe for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with everything escaped that could move the cursor or change colours; line breaks and tabs stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else ascii(sign)[1:-1] for sign in text)


def one_line(text: str) -> str:
    """The text on a single line."""
    return printable(" ".join(text.split()))


def short_count(number: float) -> str:
    """``7.1 B`` for 7,062,902,784: a large number as people say it."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,.0f}"


def short_bytes(number: float) -> str:
    """``13.5 GB``."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
