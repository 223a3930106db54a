"""Examples as a model reads them, and which of their tokens are explained.

1. A task (`interp.agreement.tasks`) writes prompt, text and rest; the text's tokens are found through the tokenizer's character
   offsets. A token that holds a piece of the text is explained, also where it begins with the template's space.
2. Without offsets (slow tokenizers) prompt, text and rest are tokenised apart, and a tokenizer that joins them otherwise is
   refused.
3. *Units* are tokens, or words: tokens that no white space parts. A token of white space alone is explained only where the text
   is given as token ids.

The few-shot prompt and the template are never explained; special tokens (BOS, [CLS]) only with `special=True`. A token for
an unknown word is the text's own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interp.agreement.tasks import (
    Classifier,
    Continuation,
    Example,
    NextToken,
    Task,
    Verbalizer,
    class_names,
    has_classes,
    tokenizer_of,
)
from interp.errors import InputError
from interp.model import Model

UNITS = ("tokens", "words")


@dataclass(frozen=True)
class Encoded:
    """An example as the model reads it.

    Attributes:
        ids: the whole input.
        positions: which of them are explained, ascending.
        units: groups of indices into `positions`, one per unit, in order.
        names: the units' text.
        text: what was given, decoded where it was token ids.
        gold: the gold class's index, or the token ids of the continuation, or `None`.
        n_reads: how many last positions are read; 0 for a classifier.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    text: str
    gold: tuple[int, ...] | None
    n_reads: int


def encode_examples(
    model: Model, task: Task, examples: Sequence[Any], *, units: str = "tokens", special: bool = False
) -> list[Encoded]:
    """Examples as the model reads them.

    Args:
        model: what `load_model` gave.
        task: what it is asked.
        examples: texts, (text, label) pairs, or `Example`s.
        units: "tokens" or "words".
        special: whether special tokens are explained too.

    Raises:
        InputError: no examples, an empty text, one longer than the context (with both lengths), a label that is no class,
            a continuation without a label, a text whose tokens cannot be told from the template's.
    """
    if units not in UNITS:
        raise InputError(f"units={units!r}; expected one of {', '.join(UNITS)}")
    if isinstance(examples, (str, Example)) or not hasattr(examples, "__len__") or not len(examples):
        raise InputError("no examples were given; expected a list of texts, (text, label) pairs or Examples")
    _check_task(model, task)
    names = class_names(model, task)
    special_ids = _special_ids(model)
    encoded = []
    for at, given in enumerate(examples):
        example = _example(at, given)
        ids, inside, text, spans = _input(model, task, at, example)
        read, gold = _gold(model, task, at, example, names, ids)
        kept = [place for place in inside if special or ids[place] not in special_ids]
        if not kept:
            raise InputError(f"example {at} has no tokens to explain: {text!r:.60}")
        groups: list[tuple[int, ...]] = [(place,) for place in range(len(kept))]
        if units == "words":
            parted = _parted_in_text(text, kept, spans) if spans else _parted_when_decoded(model, ids, kept)
            groups = _words(ids, kept, parted, special_ids)
        pieces = [
            model.decode([ids[kept[one]] for one in group], skip_special_tokens=False)
            if model.tokenizer
            else " ".join(str(ids[kept[one]]) for one in group)
            for group in groups
        ]
        n_reads = 0 if isinstance(task, Classifier) else 1 + len(read) - len(ids)
        encoded.append(Encoded(tuple(read), tuple(kept), tuple(groups), tuple(pieces), text, gold, n_reads))
        _check_length(model, at, encoded[-1])
    return encoded


def _check_task(model: Model, task: Task) -> None:
    if isinstance(task, Classifier):
        if not has_classes(model):
            raise InputError(f"{model.name} ({type(model.hf).__name__}) has no classification head for Classifier()")
        if model.hf.config.num_labels < 2:
            raise InputError(
                f"{model.name} ({type(model.hf).__name__}) has one class; expected at least two to tell apart"
            )
    elif not isinstance(task, (Verbalizer, NextToken, Continuation)):
        raise InputError(f"task={task!r}; expected a Verbalizer, NextToken, Continuation or Classifier")
    elif not model.arch.family.decoder or has_classes(model):
        raise InputError(
            f"{model.name} ({type(model.hf).__name__}) has no LM head to ask for a {task.name}; use Classifier()"
        )


def _example(at: int, given: Any) -> Example:
    pair = isinstance(given, tuple) and len(given) == 2 and _whole_number(given[0]) is None
    text, label = (given.text, given.label) if isinstance(given, Example) else given if pair else (given, None)
    ids = [] if isinstance(text, str) or not hasattr(text, "__len__") else [_whole_number(one) for one in text]
    number = _whole_number(label)
    if not (isinstance(text, str) or (hasattr(text, "__len__") and None not in ids)) or not (
        label is None or isinstance(label, str) or number is not None
    ):
        raise InputError(
            f"example {at} is {given!r:.60}; expected a text, token ids, a (text, label) pair or an Example"
        )
    return Example(text if isinstance(text, str) else ids, label if number is None else number)  # type: ignore[arg-type]


def _whole_number(value: Any) -> int | None:
    try:
        return operator.index(value)  # also numpy's and torch's integers
    except TypeError:
        return None


def _input(
    model: Model, task: Task, at: int, example: Example
) -> tuple[list[int], list[int], str, dict[int, tuple[int, int]]]:
    """Token ids of the whole input, which of them are the text's, the text, and where it is known their characters in it."""
    before, after = task.prompt() if isinstance(task, Verbalizer) else ("", "")
    if not isinstance(example.text, str):
        own = list(example.text)
        if not own:
            raise InputError(f"example {at} is empty; expected at least one token")
        if max(own) >= model.arch.vocab_size or min(own) < 0:
            outside = max(own) if min(own) >= 0 else min(own)
            raise InputError(f"example {at} has token id {outside}, outside the vocabulary of {model.arch.vocab_size}")
        first, last = (_opening(model, before) if before else []), (_plain(model, after) if after else [])
        text = model.decode(own, skip_special_tokens=False) if model.tokenizer is not None else str(own)
        return [*first, *own, *last], list(range(len(first), len(first) + len(own))), text, {}
    text = example.text
    if not text.strip():
        raise InputError(f"example {at} is empty; expected at least one character that is not white space")
    tokenizer = tokenizer_of(model)
    whole = before + text + after
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(whole, return_offsets_mapping=True, verbose=False)
        spans, inside = {}, []
        for place, offsets in enumerate(made["offset_mapping"]):
            left, right = (min(max(at - len(before), 0), len(text)) for at in offsets)
            if text[left:right].strip():
                spans[place] = (left, right)
            if place in spans or (offsets[0] == offsets[1] and not before):  # special tokens have no characters
                inside.append(place)
        return list(made["input_ids"]), inside, text, spans
    ids = list(tokenizer(whole, verbose=False)["input_ids"])
    first, both = (
        list(tokenizer(part, verbose=False)["input_ids"]) if part else [] for part in (before, before + text)
    )
    if ids[: len(first)] != first or ids[: len(both)] != both:
        raise InputError(
            f"example {at}: {type(tokenizer).__name__} joins tokens across the end of the prompt or of the text, and gives no "
            f"character offsets; use a fast tokenizer, or give token ids"
        )
    return ids, list(range(len(first), len(both))), text, {}


def _gold(
    model: Model, task: Task, at: int, example: Example, names: tuple[str, ...], ids: list[int]
) -> tuple[list[int], tuple[int, ...] | None]:
    """What the model reads (the continuation but its last token behind the text), and the gold class or continuation."""
    label = example.label
    if label is None:
        if isinstance(task, Continuation):
            raise InputError(f"example {at} has no label; Continuation() explains a given one: (text, continuation)")
        return ids, None
    if isinstance(task, (Verbalizer, Classifier)):
        if isinstance(label, str) and label in names:
            return ids, (names.index(label),)
        if isinstance(label, int) and 0 <= label < len(names):
            return ids, (label,)
        raise InputError(
            f"example {at} has the label {label!r}; expected one of {', '.join(names)}, or an index of them"
        )
    tokens = [label] if isinstance(label, int) else _plain(model, label)
    if not tokens or (isinstance(task, NextToken) and len(tokens) > 1):
        raise InputError(
            f"example {at}: the continuation {label!r} is {len(tokens)} tokens; expected "
            f"{'one, or Continuation() for more' if tokens else 'at least one'}"
        )
    if not 0 <= tokens[0] < model.arch.vocab_size:
        raise InputError(
            f"example {at} has the label {label!r}, outside the vocabulary of {model.arch.vocab_size} tokens"
        )
    return [*ids, *tokens[:-1]], tuple(tokens)


def _words(
    ids: Sequence[int], positions: Sequence[int], parted: Sequence[bool], special_ids: set[int]
) -> list[tuple[int, ...]]:
    """Groups of neighbouring tokens that no white space parts; a special token is a group by itself."""
    groups: list[list[int]] = []
    for place, position in enumerate(positions):
        before = positions[place - 1] if place else -1
        alone = ids[position] in special_ids or ids[before] in special_ids
        if not place or before + 1 != position or alone or parted[place]:
            groups.append([place])
        else:
            groups[-1].append(place)
    return [tuple(group) for group in groups]


def _parted_in_text(text: str, positions: Sequence[int], spans: dict[int, tuple[int, int]]) -> list[bool]:
    """Whether white space stands between a token and the one before."""
    parted, end = [], 0
    for position in positions:
        left, right = spans.get(position, (end, end))
        piece = text[left:right]
        start = right - len(piece.lstrip())
        parted.append(any(character.isspace() for character in text[end:start]))
        end = left + len(piece.rstrip())
    return parted


def _parted_when_decoded(model: Model, ids: Sequence[int], positions: Sequence[int]) -> list[bool]:
    """The same without character offsets: what is decoded up to a token tells what it adds."""
    parted, before = [], ""
    for place in range(len(positions)):
        text = model.decode([ids[at] for at in positions[: place + 1]], skip_special_tokens=False)
        new = text[len(before) :]  # nothing where a token completes a character
        parted.append(new[:1].isspace() or before[-1:].isspace())
        before = text
    return parted


def _check_length(model: Model, at: int, one: Encoded) -> None:
    limit = model.arch.n_positions
    if limit is not None and len(one.ids) > limit:
        raise InputError(
            f"example {at} is {len(one.ids)} tokens with its prompt; the model's context is {limit} tokens: shorten it"
        )


def _special_ids(model: Model) -> set[int]:
    """Ids of BOS, [CLS] and the like; that of unknown words only where it is one of them too."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return set()
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = {getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "cls", "sep")}
    return {token for token in tokenizer.all_special_ids if token != unknown or token in others}


def _opening(model: Model, text: str) -> list[int]:
    """Token ids of what an input begins with, special tokens in front of it included."""
    plain, whole = _plain(model, text), list(tokenizer_of(model)(text, verbose=False)["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    start = next((at for at in starts if whole[at : at + len(plain)] == plain), None)
    return plain if start is None else whole[: start + len(plain)]


def _plain(model: Model, text: str) -> list[int]:
    return list(tokenizer_of(model)(text, add_special_tokens=False, verbose=False)["input_ids"])
