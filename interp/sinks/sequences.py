"""Token sequences of one length from documents, with the variants that decide what is a sink.

1. Documents are tokenized without special tokens (one that is spelled out in a text stays text). Those too short for a
   sequence are joined, in shuffled order, with an empty line between; token ids are joined as they are.
2. Each is cut into disjoint pieces of `length` tokens, taken in random order. The first begins at a random one of the
   lines that leave room for as many pieces as fit; the others at a line without indentation if one is near, else at a
   word (where no word begins within `length` tokens: anywhere). Token ids are cut anywhere.
3. A document's second piece is taken when every document has given one: pieces of one document are not independent, and
   intervals that resample texts take them to be. A warning says when that happens.
4. Variants, in this order: the tokens are shuffled; the first is replaced; what stands before the text (`bos`) has
   taken the place of the last ones. Length, documents and places stay, so that a difference is the variant's alone.

The embedded model, SmolLM2-135M-Instruct, adds no token by itself (`bos="auto"` is the bare text). Its bos_token is
`<|im_start|>` (id 1), which opens a chat turn. In pretraining `<|endoftext|>` (id 0) stood between documents: after an
article and this token the next article's first token costs 7.6 nats, after `<|im_start|>` 19.4, after an empty line
15.1 (48 editorials). So `bos="<|endoftext|>"` is what most of its training looked like. Units: tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from interp.errors import InputError
from interp.sinks.domains import Document, read_domain

if TYPE_CHECKING:
    from interp.model import Model

Bos = Literal["auto"] | bool | str | int
_SEPARATOR = "\n\n"  # between short documents that are joined
_AT_ONCE = 64  # documents tokenized in one call
_Starts = tuple[np.ndarray, np.ndarray]  # tokens where lines and words begin, ascending
_Unit = tuple[int, list[int], _Starts]  # a document's index (of joined ones the first), its tokens


def sequences(
    model: Model,
    documents: Sequence[Document] | str,
    length: int = 256,
    n: int = 64,
    *,
    bos: Bos = "auto",
    first: str | int | None = None,
    shuffle: bool = False,
    per_document: bool = True,
    seed: int = 0,
) -> list[list[int]]:
    """Sequences of equal length from documents.

    Args:
        model: whose tokenizer and context are used. Without a tokenizer, documents must be token ids.
        documents: texts, or all of them token ids without special tokens.
        length: tokens of every sequence, what `bos` adds included.
        n: number of sequences.
        bos: what stands before the text. "auto": what the tokenizer itself adds there. True: that, and the tokenizer's
            bos token if it is not among it (its eos token where there is no bos). False: nothing. A token as text or
            id: that token alone.
        first: a token, as text or id, in place of the first text token.
        shuffle: put each sequence's text tokens in random order.
        per_document: take as few pieces of one document as the domain allows. False: of all pieces any, so that long
            documents give more.
        seed: of the choice of documents and places, and of the shuffling.

    Returns:
        n lists of `length` token ids. With `per_document`, a larger n adds sequences and changes none.

    Raises:
        InputError: too little text (how many tokens there are and are needed), a length that exceeds the context or
            holds no text token, a `bos` or `first` that is not one token, no bos token to add, an empty document, texts
            among token ids, an id outside the vocabulary.

    Example:
        >>> rows = sequences(model, ["One two three four five six."], 4, 1, bos="<|endoftext|>")  # doctest: +SKIP
        >>> model.decode(rows[0], skip_special_tokens=False)                               # doctest: +SKIP
        '<|endoftext|>One two three'
    """
    prefix = _prefix(model, bos)
    replacement = None if first is None else _token(model, first, "first")
    _check_sizes(model, length, n, len(prefix), seed)
    pieces = _pieces(model, _checked(model, documents), length, n, per_document, seed)
    rows = []
    for row, piece in enumerate(pieces):
        text = piece[: length - len(prefix)]
        if shuffle:
            # A stream of its own, so that shuffling does not change which pieces are taken.
            text = np.random.default_rng([seed, 1, row]).permutation(text).tolist()
        if replacement is not None:
            text = [replacement, *text[1:]]
        rows.append([*prefix, *text])
    return rows


def domain_sequences(
    model: Model,
    domains: Sequence[str] | str,
    length: int = 256,
    n: int = 64,
    *,
    bos: Bos = "auto",
    first: str | int | None = None,
    shuffle: bool = False,
    per_document: bool = True,
    seed: int = 0,
) -> dict[str, list[list[int]]]:
    """Sequences of several domains, ready for `interp.sinks.scan`.

    Args:
        model: see `sequences`.
        domains: names of built-in domains and lines such as "mine=path/*.txt" (`interp.sinks.read_domain`).
        length, n: of each domain.
        bos, first, shuffle, per_document, seed: see `sequences`.

    Returns:
        {domain: n lists of `length` token ids}, in the order given.

    Raises:
        InputError: no domain, a name twice, and what `read_domain` and `sequences` raise, with the domain's name.

    Example:
        >>> domain_sequences(model, ["code", "editorials", "mine=notes/*.md"], 256, 64)   # doctest: +SKIP
    """
    specs = [domains] if isinstance(domains, str) else list(domains)
    if not specs:
        raise InputError("no domain was given; expected at least one, such as 'code'")
    names = [spec.partition("=")[0].strip() for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"domain {twice[0]!r} was given {names.count(twice[0])} times; give each a name of its own")
    options: Any = {"bos": bos, "first": first, "shuffle": shuffle, "per_document": per_document, "seed": seed}
    found = {}
    for spec in specs:
        name, documents = read_domain(spec, model, length=length, n=n, seed=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found[name] = sequences(model, documents, length, n, **options)
            except InputError as error:
                raise InputError(f"domain {name!r}: {error}") from None
        for warning in caught:
            warnings.warn(f"domain {name!r}: {warning.message}", warning.category, stacklevel=2)
    return found


def _checked(model: Model, documents: Any) -> list[str] | list[list[int]]:
    """The documents as a list of one kind, none empty, ids within the vocabulary."""
    listed = [documents] if isinstance(documents, str) else list(documents)
    if not listed:
        raise InputError("no documents were given; expected at least one")
    for row, document in enumerate(listed):
        if not hasattr(document, "__len__"):
            raise InputError(f"document {row} is {document!r}; expected a text or a sequence of token ids")
        if len(document) == 0:
            raise InputError(f"document {row} is empty; remove it")
        if isinstance(document, str) != isinstance(listed[0], str):
            raise InputError(f"documents 0 and {row}: one is text, one token ids; give all as one or the other")
    if isinstance(listed[0], str):
        if model.tokenizer is None:
            raise InputError("the model has no tokenizer; give token ids, or a tokenizer to load_model")
        return listed
    size = model.arch.vocab_size
    ids = [[int(token) for token in document] for document in listed]
    for row, tokens in enumerate(ids):
        if min(tokens) < 0 or max(tokens) >= size:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise InputError(f"document {row} has token id {wrong}, outside the model's vocabulary of {size}")
    return ids


def _check_sizes(model: Model, length: int, n: int, before: int, seed: int) -> None:
    if n < 1 or seed < 0:
        raise InputError(f"n={n} and seed={seed}; expected at least 1 sequence and a seed of at least 0")
    if length <= before:
        raise InputError(f"length={length} with {before} tokens before the text; expected at least {before + 1}")
    limit = model.arch.n_positions
    if limit is not None and length > limit:
        raise InputError(f"length={length} exceeds the model's context of {limit} tokens; use a smaller length")


def _prefix(model: Model, bos: Bos) -> list[int]:
    """What stands before the text."""
    if bos is False:
        return []
    if bos is not True and bos != "auto":
        return [_token(model, bos, "bos")]
    own = _own_prefix(model)
    if bos == "auto":
        return own
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model.tokenizer, name, None)
        if token is not None:
            return own if token in own else [token, *own]
    raise InputError(
        f"bos=True, but the tokenizer of {model.name} has neither a bos nor an eos token; name a token, such as "
        f'bos="<|endoftext|>", or use bos=False'
    )


def _own_prefix(model: Model) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text."""
    if model.tokenizer is None:
        return []
    alone = model.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = model.tokenizer("a")["input_ids"]
    at = next((at for at in range(len(whole)) if whole[at : at + len(alone)] == alone), 0)
    return list(whole[:at])


def _token(model: Model, token: str | int, argument: str) -> int:
    """The id of one token given as text or id."""
    size = model.arch.vocab_size
    if isinstance(token, int) and not isinstance(token, bool):
        if not 0 <= token < size:
            raise InputError(f"{argument}={token} is outside the model's vocabulary of {size}")
        return token
    if not isinstance(token, str):
        raise InputError(f"{argument}={token!r}; expected a token as text or id")
    if model.tokenizer is None:
        raise InputError(f"{argument}={token!r}, but the model has no tokenizer; give the token's id")
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"] if token else []
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if len(ids) == 1 and (ids[0] != unknown or token == model.tokenizer.unk_token):
        return ids[0]
    # SentencePiece's line break, for example, is one token that no text by itself gives.
    if token in model.tokenizer.get_vocab():
        return model.tokenizer.get_vocab()[token]
    shown = model.tokenizer.convert_ids_to_tokens(ids)
    raise InputError(
        f"{argument}={token!r} is not one token of {model.name}'s tokenizer, which gives {shown}; give another, or "
        f"an id"
    )


def _pieces(
    model: Model, documents: list[str] | list[list[int]], length: int, n: int, per_document: bool, seed: int
) -> list[list[int]]:
    """n disjoint pieces of `length` text tokens."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(documents)).tolist()
    found: list[list[list[int]]] = []
    tokens = 0
    for row, ids, starts in _units(model, documents, shuffled, length):
        tokens += len(ids)
        if len(ids) >= length:
            found.append(_cut(ids, starts, length, np.random.default_rng([seed, 0, row])))
        if per_document and len(found) == n:
            break
    if per_document:  # the first piece of every document, then the second …
        pieces = [piece for turn in zip_longest(*found) for piece in turn if piece is not None]
    else:
        every = list(chain(*found))
        pieces = [every[at] for at in rng.permutation(len(every)).tolist()]
    if len(pieces) < n:
        raise InputError(
            f"too little text: {len(documents)} documents with {tokens:,} tokens give {len(pieces)} sequences of "
            f"{length}; {n} need at least {n * length:,} tokens: give more text, or a smaller length or n"
        )
    if per_document and len(found) < n:
        warnings.warn(
            f"{len(found)} documents of at least {length} tokens give {n} sequences: some share a document, so that "
            f"intervals over texts are too narrow; give more documents, or a smaller n",
            stacklevel=3,
        )
    return pieces[:n]


def _units(model: Model, documents: list[str] | list[list[int]], order: list[int], length: int) -> Iterator[_Unit]:
    """Documents of at least `length` tokens, then the short ones joined; the last may be too short."""
    short: list[tuple[int, int]] = []
    for at in range(0, len(order), _AT_ONCE):
        rows = order[at : at + _AT_ONCE]
        for row, (ids, starts) in zip(rows, _tokenize(model, [documents[row] for row in rows]), strict=True):
            if len(ids) >= length:
                yield row, ids, starts
            else:
                short.append((row, len(ids)))
    waiting: list[int] = []
    tokens = 0
    for at, (row, size) in enumerate(short, start=1):
        waiting.append(row)
        tokens += size
        if tokens >= length or at == len(short):
            parts: Any = [documents[row] for row in waiting]
            joined = _SEPARATOR.join(parts) if isinstance(parts[0], str) else list(chain(*parts))
            ids, starts = _tokenize(model, [joined])[0]
            if len(ids) >= length or at == len(short):  # tokens may merge across a join
                yield waiting[0], ids, starts
                waiting, tokens = [], 0


def _tokenize(model: Model, documents: list[Any]) -> list[tuple[list[int], _Starts]]:
    """Tokens of some documents, and where their lines and words begin."""
    if not isinstance(documents[0], str):
        return [(ids, _anywhere(ids)) for ids in documents]
    fast = bool(getattr(model.tokenizer, "is_fast", False))
    made = model.tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=fast,
        verbose=False,  # or it says that a document exceeds the context
    )
    if not fast:
        return [(ids, _anywhere(ids)) for ids in made["input_ids"]]
    spans = zip(documents, made["input_ids"], made["offset_mapping"], strict=True)
    return [(ids, _starts(text, offsets)) for text, ids, offsets in spans]


def _anywhere(ids: list[int]) -> _Starts:
    """Ids alone, and tokenizers without offsets, do not say where words begin."""
    return np.arange(len(ids)), np.arange(len(ids))


def _starts(text: str, spans: Sequence[tuple[int, int]]) -> _Starts:
    lines, words = [], []
    for token, (begin, end) in enumerate(spans):
        if (
            begin < end
            and not text[begin:end].isspace()
            and (begin == 0 or text[begin - 1].isspace() or text[begin].isspace())
        ):
            words.append(token)
            if begin == 0 or (text[begin - 1] == "\n" and not text[begin].isspace()):
                lines.append(token)
    return np.array(lines, dtype=np.int64), np.array(words, dtype=np.int64)


def _cut(ids: list[int], starts: _Starts, length: int, rng: np.random.Generator) -> list[list[int]]:
    """Disjoint pieces, in random order; at least one of at least `length` tokens."""
    found = []
    lines = starts[0][starts[0] <= len(ids) % length]
    at: int | None = int(rng.choice(lines)) if len(lines) else 0
    while at is not None:
        found.append(ids[at : at + length])
        at = _next_start(at + length, starts, length, len(ids) - length)
    return [found[i] for i in rng.permutation(len(found)).tolist()] if found else [ids[:length]]


def _next_start(at: int, starts: _Starts, length: int, last: int) -> int | None:
    """The first place from `at` to `last` where a piece may begin."""
    lines, words = starts
    for candidates, reach in ((lines, length // 8), (words, length)):
        after = candidates[np.searchsorted(candidates, at) :]
        if len(after) and after[0] <= min(at + reach, last):
            return int(after[0])
    # Scripts without spaces have no words to tear, as far as we can see.
    spaced = bool(((words >= at) & (words <= at + length)).any())
    return None if spaced or at > last else at
