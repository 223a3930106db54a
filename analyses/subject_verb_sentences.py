"""Sentence beginnings that end right before a verb, in pairs in which subject and attractor change roles.

A *pair* is two beginnings of equal length with the same two nouns at the same positions. In the one the first noun is
the subject, in the other the second:

    | frame | the first noun is the subject | the second noun is the subject |
    |---|---|---|
    | preposition | And the keys near the cabinet | Near the keys, the cabinet |
    | adverb | And the keys near the cabinet probably | Near the keys, the cabinet probably |
    | clause | The keys near the teacher | The keys that the teacher |
    | relative | The keys that the teacher lost | The keys that the teacher probably |

So whatever depends on positions and nouns alone, such as a score that prefers early tokens, the last token or plurals,
names the subject in exactly one of a pair's two sentences. In the frame `clause` these differ in a single token.

All four combinations of singular and plural are there equally often, with and without an adjective before the second
noun. Verbs inside clauses are past tense, so that nothing but the nouns carries number. The words are our own
(data/agreement_words.jsonl); those that a tokenizer cuts so that a pair would not match are not used with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from analyses.flow_faithfulness import start_ids
from analyses.neuron_clamping import read_jsonl
from analyses.sink_heads import document_start
from interp.errors import InputError
from interp.model import Model

ORDERS = ("first", "second")  # which noun is the subject
NUMBERS = ("singular", "plural")
ROLES = ("subject", "attractor")
# frame: (the first noun is the subject, the second is); {0} and {1} are the nouns.
FRAMES = {
    "preposition": ("{lead} the {0} {place} the {adjective}{1}", "{Place} the {0}, the {adjective}{1}"),
    "adverb": (
        "{lead} the {0} {place} the {adjective}{1} {adverb}",
        "{Place} the {0}, the {adjective}{1} {adverb}",
    ),
    "clause": ("The {0} {place} the {adjective}{1}", "The {0} that the {adjective}{1}"),
    "relative": ("The {0} that the {adjective}{1} {past}", "The {0} that the {adjective}{1} {adverb}"),
}
OF_PERSONS = ("clause", "relative")  # frames whose second noun is a person: it acts
KINDS = ("thing", "person", "place", "lead", "adverb", "past", "adjective", "neutral")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
_TRIES = 200  # draws of words before a frame is given up

Words = Mapping[str, Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
class Sentence:
    """A beginning that ends right before the verb.

    Attributes:
        pair: which pair it belongs to.
        frame: a key of `FRAMES`.
        order: "first" or "second": which noun is the subject.
        template: the text with {0} and {1} for the nouns.
        words: the first and the second noun as they stand there.
        others: both in their other number.
        numbers: of the first and the second noun: "singular" or "plural".
        adjective: whether one stands before the second noun.
        ids: token ids, the document start included.
        nouns: positions of the first and of the second noun's tokens.
    """

    pair: int
    frame: str
    order: str
    template: str
    words: tuple[str, str]
    others: tuple[str, str]
    numbers: tuple[str, str]
    adjective: bool
    ids: tuple[int, ...]
    nouns: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def text(self) -> str:
        """As it is read, without the document start."""
        return self.template.format(*self.words)

    @property
    def congruent(self) -> bool:
        """Whether both nouns have the same number."""
        return self.numbers[0] == self.numbers[1]

    def noun(self, role: str) -> int:
        """0 or 1: which noun is the "subject" or the "attractor"."""
        subject = ORDERS.index(self.order)
        return subject if role == "subject" else 1 - subject

    def replaced(self, role: str, word: str) -> str:
        """The text with another word as the "subject" or the "attractor"."""
        words = list(self.words)
        words[self.noun(role)] = word
        return self.template.format(*words)


def read_words() -> dict[str, list[dict[str, str]]]:
    """{kind: rows of data/agreement_words.jsonl}."""
    found: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for row in read_jsonl("agreement_words.jsonl"):
        found[row["kind"]].append(row)
    return found


def generate(model: Model, n_pairs: int = 128, *, words: Words | None = None, seed: int = 0) -> list[Sentence]:
    """Pairs of sentences, the first and the second order after each other.

    Args:
        model: whose tokenizer is used.
        n_pairs: how many pairs; frames, numbers and adjectives take turns, so that a multiple of 32 is balanced.
        words: {kind: rows with "word", of nouns also "plural"}; our own by default.
        seed: of the choice of words.

    Returns:
        2 · n_pairs sentences; no pair twice.

    Raises:
        InputError: no tokenizer, fewer than one pair, or too few words that the tokenizer cuts alike in both orders.
    """
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer; sentences cannot be made")
    if n_pairs < 1:
        raise InputError(f"n_pairs={n_pairs}; expected at least 1")
    words = read_words() if words is None else words
    encode, rng = Encoder(model), np.random.default_rng(seed)
    # Frames change fastest, so that a number of pairs that is no multiple of 32 leaves out no frame.
    cells = list(product((False, True), NUMBERS, NUMBERS, FRAMES))
    found: list[Sentence] = []
    seen: set[tuple[str, ...]] = set()
    for pair in range(n_pairs):
        adjective, first, second, frame = cells[pair % len(cells)]
        for _ in range(_TRIES):
            made = _draw(encode, words, rng, pair, frame, (first, second), adjective)
            texts = tuple(sentence.text for sentence in made)
            if made and texts not in seen:
                seen.add(texts)
                found += made
                break
        else:
            raise InputError(
                f"no new pair of the frame {frame!r} after {_TRIES} draws of words: there are too few, or the "
                f"tokenizer of {model.name} cuts them differently in the two sentences; give generate other words, or "
                f"ask for {pair} pairs"
            )
    return found


def _draw(
    encode: Encoder,
    words: Words,
    rng: np.random.Generator,
    pair: int,
    frame: str,
    numbers: tuple[str, str],
    adjective: bool,
) -> list[Sentence]:
    """One pair, or nothing where tokens do not match."""

    def any_of(kind: str) -> Mapping[str, str]:
        return words[kind][int(rng.integers(len(words[kind])))]

    first, second = any_of("thing"), any_of("person" if frame in OF_PERSONS else "thing")
    place = any_of("place")["word"]
    filled = {kind: any_of(kind)["word"] for kind in ("lead", "adverb", "past", "adjective")}
    filled |= {"place": place, "Place": place.capitalize(), "adjective": f"{filled['adjective']} " if adjective else ""}
    if first == second:
        return []
    forms = [(noun["word"], noun["plural"]) for noun in (first, second)]
    at = [NUMBERS.index(number) for number in numbers]
    nouns, others = ((forms[0][a], forms[1][b]) for a, b in (at, [1 - one for one in at]))
    made = []
    for order, text in zip(ORDERS, FRAMES[frame], strict=True):
        template = text.format("{0}", "{1}", **filled)
        placed = encode.placed(template, nouns)
        if placed is None:
            return []
        made.append(Sentence(pair, frame, order, template, nouns, others, numbers, adjective, *placed))
    same = len(made[0].ids) == len(made[1].ids) and made[0].nouns == made[1].nouns
    return made if same else []


class Encoder:
    """Texts as token ids behind the document start, and where their words are.

    Attributes:
        start: token ids of the document start.
    """

    def __init__(self, model: Model) -> None:
        self.tokenizer = model.tokenizer
        self.start = tuple(start_ids(model, document_start(model)))

    def __call__(self, text: str) -> tuple[int, ...]:
        """Token ids, the document start included."""
        return (*self.start, *self._bare(text))

    @property
    def blank(self) -> int:
        """The token that blanks out another: " _", of several pieces the last."""
        return self._bare(" _")[-1]

    def placed(
        self, template: str, words: Sequence[str]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]] | None:
        """Token ids, and the positions of both words' tokens; `None` where a word's border is inside a token."""
        ids = self(template.format(*words))
        groups = []
        for at, word in enumerate(words):
            before = template[: template.index(f" {{{at}}}")].format(*words)
            left, right = self(before), self(f"{before} {word}")
            if ids[: len(left)] != left or ids[: len(right)] != right or len(left) == len(right):
                return None
            groups.append(tuple(range(len(left), len(right))))
        return ids, (groups[0], groups[1])

    def next_token(self, text: str, word: str) -> int | None:
        """First token of a word behind a text; `None` where it changes the text's own tokens."""
        before, after = self(text), self(text + word)
        return after[len(before)] if after[: len(before)] == before and len(after) > len(before) else None

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def verb_tokens(encode: Encoder) -> dict[str, tuple[int, int]]:
    """{"is/are": (token of the singular, token of the plural), …}: the verbs that the tokenizer tells apart.

    Raises:
        InputError: it tells none apart.
    """
    found: dict[str, tuple[int, int]] = {}
    for verbs in VERBS:
        singular, plural = (encode.next_token("The", verb) for verb in verbs)
        if singular is not None and plural is not None and singular != plural:
            found["/".join(verb.strip() for verb in verbs)] = (singular, plural)
    if not found:
        raise InputError(
            "the tokenizer begins the singular and the plural of every verb alike; nothing can be measured"
        )
    return found


def digest(sentences: Sequence[Sentence]) -> str:
    """16 hex digits of the sentences' tokens and positions: by them a result says which sentences it is of."""
    values: Any = [[one.ids, one.nouns, one.order, one.others] for one in sentences]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
