"""What a model is asked, and which tokens of the question are explained.

| task | the model reads | classes |
|---|---|---|
| `Verbalizer` | few-shot prompt, text in a template | label words, one token each, at the last position |
| `NextToken` | the text | the vocabulary at the last position |
| `Continuation` | the text | the vocabulary, at each token of a given continuation |
| `Classifier` | the text | the classes of a model with a classification head, such as an encoder |

1. A task encodes examples: token ids of the whole input, and the positions of the text's own tokens (`Encoded`). A token that
   holds a piece of the text is explained, also where it begins with the template's space.
2. The text is found through the tokenizer's character offsets. Without them (slow tokenizers) prompt, text and rest are
   tokenised apart, and a tokenizer that joins them otherwise is refused.
3. *Units* are tokens, or words: tokens that no white space parts.

The few-shot prompt and the template are never explained; special tokens (BOS, [CLS]) only with `special=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InputError
from interp.model import Model

UNITS = ("tokens", "words")


@dataclass(frozen=True)
class Example:
    """A text to explain.

    Attributes:
        text: a string, or token ids.
        label: the gold class, by name or index; the continuation's text for `Continuation` and `NextToken`; or `None`.
    """

    text: str | Sequence[int]
    label: str | int | None = None


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


@dataclass(frozen=True)
class Verbalizer:
    """Classification by a label word after the text.

    Attributes:
        labels: {class: label word}; a word is one token of the model, mostly with its leading space.
        template: how a text is written, with {text} once; the label word follows.
        shots: (text, class) examples that go before.
        instruction: goes before all.
        separator: between shots.

    Example:
        >>> Verbalizer({"no": " no", "yes": " yes"}, shots=[("A gem.", "yes")]).prompt()
        ('A gem. => yes\\n', ' =>')
    """

    labels: dict[str, str]
    template: str = "{text} =>"
    shots: Sequence[tuple[str, str]] = ()
    instruction: str = ""
    separator: str = "\n"
    name: str = field(default="verbalizer", init=False)

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise InputError(f"labels={self.labels!r}; expected at least two classes")
        if self.template.count("{text}") != 1:
            raise InputError(f"template={self.template!r}; expected {{text}} in it once")
        unknown = [label for _, label in self.shots if label not in self.labels]
        if unknown:
            raise InputError(f"a shot has the class {unknown[0]!r}; expected one of {', '.join(self.labels)}")

    def prompt(self) -> tuple[str, str]:
        """What stands before and after the text."""
        before, after = self.template.split("{text}")
        shots = "".join(f"{before}{text}{after}{self.labels[label]}{self.separator}" for text, label in self.shots)
        return self.instruction + shots + before, after

    def choices(self, model: Model) -> tuple[int, ...]:
        """The label words' token ids.

        Raises:
            InputError: a word is not one token, or two classes have the same word.
        """
        found = []
        for label, word in self.labels.items():
            ids = _tokenizer(model)(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                pieces = [model.decode([token], skip_special_tokens=False) for token in ids]
                raise InputError(
                    f"the label word {word!r} of class {label!r} is {len(ids)} tokens ({pieces}); expected one: choose another "
                    f"word, mostly one with a leading space, or explain a given continuation with Continuation()"
                )
            found.append(int(ids[0]))
        if len(set(found)) < len(found):
            raise InputError(f"labels={self.labels!r}; two classes have the same label word")
        return tuple(found)


@dataclass(frozen=True)
class NextToken:
    """The next token: the predicted one, or an example's label, which is one token."""

    name: str = field(default="next_token", init=False)


@dataclass(frozen=True)
class Continuation:
    """A given continuation of one or more tokens: every example's label."""

    name: str = field(default="continuation", init=False)


@dataclass(frozen=True)
class Classifier:
    """A model with a classification head.

    Attributes:
        labels: names of the classes; by default the config's.
        reads: whose row of attention the head reads: "first" ([CLS]), "last" or "mean" of all; by default "first"
            for encoders and "last" for decoders.
    """

    labels: tuple[str, ...] | None = None
    reads: str | None = None
    name: str = field(default="classifier", init=False)

    def __post_init__(self) -> None:
        if self.reads not in (None, "first", "last", "mean"):
            raise InputError(f"reads={self.reads!r}; expected 'first', 'last' or 'mean'")


Task = Verbalizer | NextToken | Continuation | Classifier


def default_task(model: Model) -> Task:
    """`NextToken` for causal language models, `Classifier` for models with a classification head.

    Raises:
        InputError: the model has neither.
    """
    if _has_classes(model):
        return Classifier()
    if model.arch.family.decoder:
        return NextToken()
    raise InputError(
        f"{model.name} ({type(model.hf).__name__}) has no classification head; load a class such as "
        f"AutoModelForSequenceClassification and give it to load_model with its tokenizer"
    )


def class_names(model: Model, task: Task) -> tuple[str, ...]:
    """Names of the classes; none where the classes are the vocabulary.

    Raises:
        InputError: a classifier's names are not as many as its classes.
    """
    if isinstance(task, Verbalizer):
        return tuple(task.labels)
    if not isinstance(task, Classifier):
        return ()
    config = model.hf.config
    n_classes = int(config.num_labels)
    named = task.labels or tuple(str(config.id2label[at]) for at in range(n_classes))
    if len(named) != n_classes:
        raise InputError(f"labels={named!r}; the model has {n_classes} classes")
    return named


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
    if isinstance(examples, (str, Example)) or not len(examples):
        raise InputError("no examples were given; expected a list of texts, (text, label) pairs or Examples")
    _check_task(model, task)
    names = class_names(model, task)
    encoded = []
    for at, given in enumerate(examples):
        example = _example(at, given)
        ids, inside, text = _input(model, task, at, example)
        read, gold = _gold(model, task, at, example, names, ids)
        kept = [place for place in inside if special or not _is_special(model, ids[place])]
        if not kept:
            raise InputError(f"example {at} has no tokens to explain: {text!r:.60}")
        groups = _words(model, ids, kept) if units == "words" else [(place,) for place in range(len(kept))]
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
        if not _has_classes(model):
            raise InputError(f"{model.name} ({type(model.hf).__name__}) has no classification head for Classifier()")
    elif not isinstance(task, (Verbalizer, NextToken, Continuation)):
        raise InputError(f"task={task!r}; expected a Verbalizer, NextToken, Continuation or Classifier")
    elif not model.arch.family.decoder or _has_classes(model):
        raise InputError(
            f"{model.name} ({type(model.hf).__name__}) has no LM head to ask for a {task.name}; use Classifier()"
        )


def _has_classes(model: Model) -> bool:
    architecture = type(model.hf).__name__
    return architecture.endswith("ForSequenceClassification") or bool(getattr(model.hf, "is_classifier", False))


def _example(at: int, given: Any) -> Example:
    if isinstance(given, Example):
        return given
    if (
        isinstance(given, tuple)
        and len(given) == 2
        and (given[1] is None or isinstance(given[1], (str, int)))
        and not isinstance(given[0], int)
    ):
        return Example(*given)
    if isinstance(given, str) or (hasattr(given, "__len__") and all(isinstance(one, int) for one in given)):
        return Example(given)
    raise InputError(f"example {at} is {given!r:.60}; expected a text, token ids, a (text, label) pair or an Example")


def _input(model: Model, task: Task, at: int, example: Example) -> tuple[list[int], list[int], str]:
    """Token ids of the whole input, which of them are the text's, and the text."""
    before, after = task.prompt() if isinstance(task, Verbalizer) else ("", "")
    if not isinstance(example.text, str):
        own = [int(token) for token in example.text]
        if not own:
            raise InputError(f"example {at} is empty; expected at least one token")
        if max(own) >= model.arch.vocab_size or min(own) < 0:
            raise InputError(f"example {at} has token id {max(own)}, outside the vocabulary of {model.arch.vocab_size}")
        first, last = (_plain(model, part) if part else [] for part in (before, after))
        text = model.decode(own, skip_special_tokens=False) if model.tokenizer is not None else str(own)
        return [*first, *own, *last], list(range(len(first), len(first) + len(own))), text
    text = example.text
    if not text.strip():
        raise InputError(f"example {at} is empty; expected at least one character that is not white space")
    tokenizer = _tokenizer(model)
    whole = before + text + after
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(whole, return_offsets_mapping=True, verbose=False)
        start, end = len(before), len(before) + len(text)
        ids = list(made["input_ids"])
        inside = [
            place
            for place, (left, right) in enumerate(made["offset_mapping"])
            if (
                left < end and right > start and right > left and text[max(left, start) - start : right - start].strip()
            )
            or (left == right and not before)  # special tokens have no characters
        ]
        return ids, inside, text
    ids = list(tokenizer(whole, verbose=False)["input_ids"])
    first, both = (
        list(tokenizer(part, verbose=False)["input_ids"]) if part else [] for part in (before, before + text)
    )
    if ids[: len(first)] != first or ids[: len(both)] != both:
        raise InputError(
            f"example {at}: {type(tokenizer).__name__} joins tokens across the end of the prompt or of the text, and gives no "
            f"character offsets; use a fast tokenizer, or give token ids"
        )
    return ids, list(range(len(first), len(both))), text


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
    return [*ids, *tokens[:-1]], tuple(tokens)


def _words(model: Model, ids: Sequence[int], positions: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of neighbouring tokens that no white space parts: what is decoded up to a token tells where a word begins."""
    groups: list[list[int]] = []
    before = ""
    for place, position in enumerate(positions):
        first = positions[place - 1] + 1 != position if place else True
        text = model.decode([ids[at] for at in positions[: place + 1]], skip_special_tokens=False)
        new = text[len(before) :]
        if first or not new.strip() or new[0].isspace() or before[-1:].isspace() or _is_special(model, ids[position]):
            groups.append([place])
        else:
            groups[-1].append(place)
        before = text
    return [tuple(group) for group in groups]


def _check_length(model: Model, at: int, one: Encoded) -> None:
    limit = model.arch.n_positions
    if limit is not None and len(one.ids) > limit:
        raise InputError(
            f"example {at} is {len(one.ids)} tokens with its prompt; the model's context is {limit} tokens: shorten it"
        )


def _is_special(model: Model, token: int) -> bool:
    return model.tokenizer is not None and token in set(model.tokenizer.all_special_ids)


def _plain(model: Model, text: str) -> list[int]:
    return list(_tokenizer(model)(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer; give one to load_model, or token ids")
    return model.tokenizer
