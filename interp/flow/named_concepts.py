"""Concepts that a prompt names: where its tokens say them, and whether an answer says them too.

A concept is a word or several ("hot-air balloon"). It is found in any case, as whole words, with a simple plural or
possessive of its last word: owl, owls, owl's; cherry, cherries; knife, knives. Nothing else counts, neither synonyms
nor irregular plurals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from interp.errors import InputError
from interp.flow.positions import Group
from interp.model import Model


def mentions(text: str, concept: str) -> bool:
    """Whether a text names a concept.

    Example:
        >>> [mentions(text, "cherry") for text in ("Two Cherries.", "cherry-red", "a cherrytree")]
        [True, True, False]
    """
    return _pattern(concept).search(text) is not None


def concept_positions(model: Model, ids: Sequence[int], prompt: str, concepts: Sequence[str]) -> list[Group]:
    """The tokens of each concept in a prompt.

    Args:
        model: what `load_model` gave, with a tokenizer.
        ids: the prompt's tokens, as `Model.encode` gave them, chat template and all.
        prompt: its text: a concept is looked for in this part of the tokens, not in the template.
        concepts: words of the prompt.

    Returns:
        Per concept the positions of all tokens that carry a part of it, wherever the prompt names it.

    Raises:
        InputError: a concept that the prompt does not name, two concepts that share a token.
    """
    spans = _spans(model, ids)
    whole = model.decode(ids, skip_special_tokens=False)
    begin = whole.rfind(prompt.strip())
    part = (0, len(whole)) if begin < 0 else (begin, begin + len(prompt.strip()))
    groups: list[Group] = []
    for concept in concepts:
        found = [match.span() for match in _pattern(concept).finditer(whole, *part)]
        if not found:
            raise InputError(
                f"the prompt {prompt!r} does not name {concept!r}; name each concept as the prompt writes it"
            )
        groups.append(
            tuple(at for at, (start, end) in enumerate(spans) if any(start < high and low < end for low, high in found))
        )
    for first, one in enumerate(groups):
        for second in range(first):
            if set(one) & set(groups[second]):
                raise InputError(
                    f"{concepts[second]!r} and {concepts[first]!r} share a token of the prompt {prompt!r}; give "
                    f"concepts that it names apart"
                )
    return groups


def _spans(model: Model, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Where each token's characters are in the decoded text; tokens that hold bytes of one character share it."""
    ends = [len(model.decode(ids[:count], skip_special_tokens=False)) for count in range(1, len(ids) + 1)]
    # Bytes that do not make a character yet are decoded as signs of their own, which go again.
    for at in range(len(ends) - 2, -1, -1):
        ends[at] = min(ends[at], ends[at + 1])
    spans: list[tuple[int, int]] = []
    for start, end in zip([0, *ends], ends, strict=False):
        spans.append((start, end) if end > start or not spans else spans[-1])
    return spans


def _pattern(concept: str) -> re.Pattern[str]:
    words = concept.split()
    if not words:
        raise InputError(f"the concept {concept!r} has no letters; expected a word of the prompt")
    *before, last = (re.escape(word) for word in words)
    forms = [rf"{last}(?:e?s)?"]
    for ending, plural in (("y", "ies"), ("fe", "ves"), ("f", "ves")):
        if last.lower().endswith(ending):
            forms.append(last[: -len(ending)] + plural)
            break
    joined = r"[\s-]+".join([*before, f"(?:{'|'.join(forms)})"])
    return re.compile(rf"(?<!\w){joined}(?!\w)", re.IGNORECASE)
