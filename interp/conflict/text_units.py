"""Sentences and words of an answer, and whether it loops: what verifiers and preferences count."""

from __future__ import annotations

import re

DISTINCT_TRIGRAMS = 0.5
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|No|approx)\.(?=\s)|(?<=\b[A-Z])\.(?=\s)")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_MARKER = re.compile(r"^\s*(?:(?:\d{1,2}[.)]|[-*•#>]+)\s+)+")


def sentences(text: str) -> list[str]:
    """Sentences of a text, ends included; what follows the last end is one more, and so is every line and list item.

    Example:
        >>> sentences("It rains. Dr. No is 3.5 m tall! Yes")
        ['It rains.', 'Dr. No is 3.5 m tall!', 'Yes']
    """
    found = []
    for line in text.splitlines():
        bare = " ".join(_MARKER.sub("", line).split())
        guarded = _ABBREVIATION.sub(lambda match: match.group().replace(".", "\0"), bare)
        found += re.split(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=\S)", guarded)
    return [part.replace("\0", ".") for part in found if any(char.isalnum() for char in part)]


def words(text: str) -> list[str]:
    """Words of a text; numbers count, "don't" is one.

    Example:
        >>> words("I don't own 3 well-known maps.")
        ['I', "don't", 'own', '3', 'well-known', 'maps']
    """
    return _WORD.findall(text)


def repeats(text: str) -> bool:
    """Whether an answer loops: fewer than half of its word trigrams differ.

    Example:
        >>> repeats("the cat and " * 9), repeats("A cat sat on the mat and looked at the old dog.")
        (True, False)
    """
    some = words(text.lower())
    trigrams = list(zip(some, some[1:], some[2:], strict=False))
    return len(trigrams) > 0 and len(set(trigrams)) < DISTINCT_TRIGRAMS * len(trigrams)
