"""Concepts as single tokens: which spellings of a word the tokenizer has, and which it cuts into pieces.

A concept is one or more tokens. From one word the usual spellings are tried: with and without a leading space, lower
case, capitalised, upper case, plural. Spellings that are several tokens are dropped and named with their pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from interp.errors import InputError


@dataclass(frozen=True)
class Concept:
    """A concept's tokens.

    Attributes:
        name: how the user wrote it.
        token_ids: the single-token spellings' ids, each once, in the order tried.
        tokens: their texts.
        dropped: spellings that are several tokens, with their pieces.
    """

    name: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]

    @property
    def word(self) -> str:
        """The bare word, for looking it up in generated text."""
        return self.name.strip().lower()


def spellings(word: str) -> list[str]:
    """Usual spellings of a word, the given one first, each once.

    Example:
        >>> spellings(" dog")
        [' dog', 'dog', ' Dog', 'Dog', ' DOG', 'DOG', ' dogs', 'dogs', ' Dogs', 'Dogs']
    """
    bare = word.strip()
    forms = [
        bare.lower(),
        bare.lower().capitalize(),
        bare.upper(),
        plural(bare.lower()),
        plural(bare.lower()).capitalize(),
    ]
    tried = [word, *(lead + form for form in forms for lead in (" ", ""))]
    return list(dict.fromkeys(tried))


def plural(word: str) -> str:
    """The regular English plural.

    Example:
        >>> plural("city"), plural("box"), plural("dog")
        ('cities', 'boxes', 'dogs')
    """
    if word.endswith("y") and len(word) > 1 and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def find_concept(
    concept: str | Sequence[str],
    encode: Callable[[str], Sequence[int]],
    token: Callable[[int], str],
    *,
    variants: bool = True,
    unknown: int | None = None,
) -> Concept:
    """A concept's single tokens.

    Args:
        concept: a word such as " dog" (a leading space matters to the tokenizer), or several strings that are all meant.
        encode: text to token ids, without special tokens.
        token: token id to text.
        variants: also try the usual spellings of a single word; several strings are taken as they are.
        unknown: the id that stands for "not in the vocabulary".

    Raises:
        InputError: empty, or no spelling is a single token (the pieces of what was given are named).
    """
    given = [concept] if isinstance(concept, str) else list(concept)
    if not given or any(not word.strip() for word in given):
        raise InputError(f"concept {concept!r} is empty; expected a word such as ' dog'")
    tried = spellings(given[0]) if variants and isinstance(concept, str) else given
    kept: dict[int, str] = {}
    dropped: dict[str, tuple[str, ...]] = {}
    for spelling in tried:
        ids = list(encode(spelling))
        if len(ids) == 1 and ids[0] != unknown:
            kept.setdefault(ids[0], token(ids[0]))
        else:
            dropped[spelling] = tuple(token(i) for i in ids)
    if not kept:
        pieces = ", ".join(repr(piece) for piece in dropped[given[0]])
        raise InputError(
            f"concept {given[0]!r} is not a single token of this tokenizer; its pieces are {pieces}. Give a word that is one "
            f"token, or a list of tokens"
        )
    return Concept(given[0], tuple(kept), tuple(kept.values()), dropped)


def concept_of(model: Any, concept: str | Sequence[str] | Concept, *, variants: bool = True) -> Concept:
    """`find_concept` with a model's tokenizer; a `Concept` passes through."""
    if isinstance(concept, Concept):
        return concept
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("the model has no tokenizer, so a concept cannot be looked up; give one to load_model")
    return find_concept(
        concept,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda i: tokenizer.decode([i], clean_up_tokenization_spaces=False),
        variants=variants,
        unknown=tokenizer.unk_token_id,
    )
