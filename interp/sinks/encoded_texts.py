"""Texts of named domains as token ids, checked once, with the domain's name in every message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from interp.errors import InputError
from interp.model import Model

Texts = Sequence[str | Sequence[int]]


def encode_domains(
    model: Model,
    texts: Mapping[str, Texts] | Texts,
    *,
    length: int | None = None,
    shortest: int = 1,
    chat: bool = False,
) -> dict[str, list[list[int]]]:
    """Token ids of each domain.

    Args:
        model: what `load_model` gave.
        texts: {domain: texts}, or texts of one domain, which is then called "texts".
        length: cut every text to this many tokens; by default texts are taken whole.
        shortest: fewest tokens that a text may have.
        chat: wrap texts in the chat template.

    Raises:
        InputError: no domain, a domain without texts, a text that is empty, too short (which, and how many are) or too long.
    """
    if isinstance(texts, str):
        texts = [texts]
    given: dict[Any, Any] = dict(texts) if isinstance(texts, Mapping) else {"texts": texts}
    if not given:
        raise InputError("no domain was given; expected {domain: texts} with at least one")
    if length is not None and length < shortest:
        raise InputError(f"length={length}; expected at least {shortest} token{'s' if shortest > 1 else ''}")
    encoded: dict[str, list[list[int]]] = {}
    for name, entries in given.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"a domain's name must be a string, got {name!r}")
        entries = [entries] if isinstance(entries, str) else list(entries)
        if not entries:
            raise InputError(f"domain {name!r} has no texts; expected at least one")
        try:
            encoded[name] = model.encode(entries, chat=chat, length=length)
            _check_length(encoded[name], shortest if length is None else length)
        except InputError as error:
            raise InputError(f"domain {name!r}: {error}") from None
    return encoded


def _check_length(entries: Sequence[Sequence[int]], least: int) -> None:
    short = {row: len(ids) for row, ids in enumerate(entries) if len(ids) < least}
    if short:
        row, have = next(iter(short.items()))
        raise InputError(
            f"{len(short)} of {len(entries)} texts are shorter than the {least} tokens needed (text {row} has {have}); join or "
            f"drop them"
        )


def digests(domains: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, str]:
    """16 hex digits of each domain's token ids: by them a result says which texts it is of."""
    return {name: hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for name, ids in domains.items()}
