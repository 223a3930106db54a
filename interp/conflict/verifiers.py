"""Families of rules that a program can check: did the answer obey?

A family has two rules that no answer can obey both, and three methods: `verify` says whether an answer obeys a rule and why;
`rewrite` makes an answer obey a rule where a program can do that; `rules` names them. A family of your own is one class with
these and a JSON Lines file of wordings (`interp.conflict.wordings`):

    class Rhyme:
        name, rules = "rhyme", ("rhymed", "unrhymed")
        def verify(self, rule, answer, finished=True): ...
        def rewrite(self, rule, answer): return None
    interp.conflict.register(Rhyme(), "rhyme.jsonl")

The eight families here are those of FocalLoRA's released data (public code of the group of Wan et al., arXiv 2509.23188), with
bounds that answers of some sixty tokens can meet: ten and thirty words for its 50 and 300, one sentence and three for its ten
and five.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from interp.conflict.text_units import sentences, words
from interp.errors import InputError


@dataclass(frozen=True)
class Verdict:
    """Whether an answer obeys a rule, and why not or how.

    Attributes:
        passed: whether it obeys, as far as it goes.
        reason: in words.
        decided: False where a cut-off answer fails only for what it might still have said.
    """

    passed: bool
    reason: str
    decided: bool = True


@runtime_checkable
class Family(Protocol):
    """What a family of rules has to have; see the module."""

    @property
    def name(self) -> str:
        """One word."""
        ...

    @property
    def rules(self) -> tuple[str, str]:
        """The names of the two opposed rules."""
        ...

    def verify(self, rule: str, answer: str, finished: bool = True) -> Verdict:
        """Whether `answer` obeys `rule`; `finished`: it ended by itself and was not cut off."""
        ...

    def rewrite(self, rule: str, answer: str) -> str | None:
        """The same content in an answer that obeys `rule`; `None` where a program cannot make it."""
        ...


Check = Callable[[str, bool], Verdict]
Rewrite = Callable[[str], str | None]


@dataclass(frozen=True)
class CheckedFamily:
    """A family of two checks.

    Attributes:
        name: of the family.
        checks: {rule: check of (answer, finished)}.
        rewrites: {rule: rewrite}; a rule without one cannot be rewritten to.
    """

    name: str
    checks: dict[str, Check]
    rewrites: dict[str, Rewrite]

    @property
    def rules(self) -> tuple[str, str]:
        """The names of the two opposed rules."""
        first, second = self.checks
        return first, second

    def verify(self, rule: str, answer: str, finished: bool = True) -> Verdict:
        """Whether `answer` obeys `rule`. An empty answer obeys none.

        Raises:
            InputError: no such rule.
        """
        check_rule(self, rule)
        if not any(char.isalnum() for char in answer):
            return Verdict(False, "no letter and no digit", decided=finished)
        return self.checks[rule](answer.strip(), finished)

    def rewrite(self, rule: str, answer: str) -> str | None:
        """The same content in an answer that passes, or `None`.

        Raises:
            InputError: no such rule.
        """
        check_rule(self, rule)
        made = self.rewrites[rule](answer.strip()) if rule in self.rewrites else None
        return made if made is not None and self.verify(rule, made).passed else None


def check_rule(family: Family, rule: str) -> None:
    """Refuses a rule that a family does not have.

    Raises:
        InputError: it names those that there are.
    """
    if rule not in family.rules:
        raise InputError(f"family {family.name!r} has no rule {rule!r}; its rules are {', '.join(family.rules)}")


_ITEM = re.compile(r"^[ \t]*(?:\d{1,2}[.)]|[-*•])[ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*(\d{1,2})[.)][ \t]+\S", re.MULTILINE)
_QUOTES = '"“”„«»'


def _all_letters(upper: bool) -> Check:
    name = "capital" if upper else "small"

    def check(answer: str, finished: bool) -> Verdict:
        letters = [char for char in answer if char.isupper() or char.islower()]
        wrong = [char for char in letters if char.isupper() != upper]
        if not letters:
            return Verdict(False, "no letters", decided=finished)
        return Verdict(not wrong, f"{len(letters) - len(wrong)} of {len(letters)} letters are {name}")

    return check


def _digits(least: int, most: int | None) -> Check:
    def check(answer: str, finished: bool) -> Verdict:
        n = sum(char.isdigit() for char in answer)
        passed = n >= least and (most is None or n <= most)
        return Verdict(passed, f"{n} digits", decided=finished or n >= least)

    return check


def _without_digits(answer: str) -> str | None:
    kept = [sentence for sentence in sentences(answer) if not any(char.isdigit() for char in sentence)]
    return " ".join(kept) or None


def _with_digits(answer: str) -> str | None:
    some = sentences(answer)[:3]
    if len(some) < 2:
        return None
    counted = [f"Point {number}: {sentence}" for number, sentence in enumerate(some, 1)]
    return " ".join([f"Here are {len(some)} points.", *counted])  # three digits at least


def _json(answer: str, finished: bool) -> Verdict:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
    except ValueError as error:
        return Verdict(False, f"no JSON: {error}", decided=finished or not answer.startswith(("{", "```")))
    if not isinstance(value, dict):
        return Verdict(False, f"JSON, and no object: {type(value).__name__}")
    return Verdict("answer" in value, "a JSON object" + ("" if "answer" in value else ' without the key "answer"'))


def _prose(answer: str, finished: bool) -> Verdict:
    signs = [sign for sign in ("{", "}", "```", "[{") if sign in answer]
    return Verdict(not signs, f"holds {signs[0]!r}" if signs else "no sign of JSON")


# Function words that the other language does not have; content words and accents are shared by names and loans.
_FRENCH_WORDS = """
le la les des une un est et du dans que qui pour avec sur ce cette aux nous vous sont au en par il elle je ne pas se son sa ses
leur leurs plus mais ou où être c'est d'un d'une l'on qu'il n'est peut comme ces mon ma votre notre à
"""
_ENGLISH_WORDS = """
the and is of to in that it for with as are this be by an or from which you your can they their was were have has not but will
if when we our its at these those there what how more a i
"""
_FRENCH, _ENGLISH = frozenset(_FRENCH_WORDS.split()), frozenset(_ENGLISH_WORDS.split())


def _language(french: bool) -> Check:
    def check(answer: str, finished: bool) -> Verdict:
        # French elides: "l'eau" is "l" and "eau"; "l'", "d'", "qu'" and so on are French function words.
        elided = len(re.findall(r"\b(?:l|d|j|n|s|c|qu|m|t)['’](?=\w)", answer.lower()))
        found = [word.replace("’", "'") for word in words(answer.lower())]
        theirs, ours = sum(word in _FRENCH for word in found) + elided, sum(word in _ENGLISH for word in found)
        reason = f"{theirs} French and {ours} English function words of {len(found)} words"
        mine, other = (theirs, ours) if french else (ours, theirs)
        return Verdict(mine >= 1 and mine >= 0.15 * len(found) and other <= 0.25 * mine, reason)

    return check


def _numbered(answer: str, finished: bool) -> Verdict:
    numbers = [int(number) for number in _NUMBERED.findall(answer)]
    started = bool(_NUMBERED.match(answer)) and numbers == list(range(1, len(numbers) + 1))
    passed = started and len(numbers) >= 2
    begun = started or answer in ("1", "1.", "1)")
    reason = f"items numbered {numbers[:8]}" if numbers else "no numbered items"
    return Verdict(passed, reason, decided=finished or passed or not begun)


def _paragraph(answer: str, finished: bool) -> Verdict:
    if _ITEM.search(answer):
        return Verdict(False, "has list items")
    return Verdict("\n" not in answer, "several lines" if "\n" in answer else "one paragraph")


def _make_list(answer: str) -> str | None:
    some = [re.sub(r"^(?:\d{1,2}[.)]|[-*•])\s+", "", sentence) for sentence in sentences(_flat(answer))][:3]
    return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(some, 1)) if len(some) > 1 else None


def _flat(answer: str) -> str:
    """One paragraph, list markers taken off."""
    lines = (re.sub(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+", "", line).strip() for line in answer.splitlines())
    return " ".join(line for line in lines if line)


def _quoted(answer: str, finished: bool) -> Verdict:
    pairs = {'"': '"', "“": "”", "«": "»", "„": "“"}
    closed = len(answer) > 2 and answer[-1] == pairs.get(answer[0])
    if not closed and not finished and answer[0] in pairs:
        return Verdict(False, "opened, and cut off before it was closed", decided=False)
    return Verdict(closed, "begins and ends with quotation marks" if closed else "not wholly within quotation marks")


def _unquoted(answer: str, finished: bool) -> Verdict:
    n = sum(char in _QUOTES for char in answer)
    return Verdict(n == 0, f"{n} quotation marks")


def _strip_quotes(answer: str) -> str:
    return "".join(char for char in answer if char not in _QUOTES)


def _sentences(least: int, most: int | None) -> Check:
    def check(answer: str, finished: bool) -> Verdict:
        n = len(sentences(answer))
        too_many = most is not None and n > most
        if most is not None and not finished and not too_many:
            return Verdict(False, f"cut off after {n} sentences: not known to end in time", decided=False)
        return Verdict(n >= least and not too_many, f"{n} sentences", decided=finished or n >= least)

    return check


def _words(least: int, most: int | None) -> Check:
    def check(answer: str, finished: bool) -> Verdict:
        n = len(words(answer))
        too_many = most is not None and n > most
        if most is not None and not finished and not too_many:
            return Verdict(False, f"cut off after {n} words: not known to end in time", decided=False)
        return Verdict(n >= least and not too_many, f"{n} words", decided=finished or n >= least)

    return check


def _first_words(answer: str) -> str | None:
    first = sentences(_flat(answer))[:1]
    if not first:
        return None
    some = words(first[0])
    if len(some) <= FEW_WORDS:
        return first[0]
    return " ".join(some[:FEW_WORDS]) + "."


FEW_WORDS, MANY_WORDS, SEVERAL_SENTENCES, SOME_DIGITS = 10, 30, 3, 3

_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        CheckedFamily(
            "case",
            {"capitals": _all_letters(True), "small": _all_letters(False)},
            {"capitals": str.upper, "small": str.lower},
        ),
        CheckedFamily(
            "digits",
            {"digits": _digits(SOME_DIGITS, None), "no-digits": _digits(0, 0)},
            {"digits": _with_digits, "no-digits": _without_digits},
        ),
        CheckedFamily(
            "json",
            {"json": _json, "prose": _prose},
            {
                "json": lambda answer: json.dumps({"answer": " ".join(sentences(answer)[:2])}, ensure_ascii=False),
                "prose": lambda answer: _flat(re.sub(r"[{}\[\]`]", "", answer)),
            },
        ),
        CheckedFamily(
            "language", {"french": _language(True), "english": _language(False)}, {"english": lambda answer: answer}
        ),
        CheckedFamily("list", {"list": _numbered, "paragraph": _paragraph}, {"list": _make_list, "paragraph": _flat}),
        CheckedFamily(
            "quotation",
            {"quoted": _quoted, "unquoted": _unquoted},
            {"quoted": lambda answer: f'"{_strip_quotes(answer)}"', "unquoted": _strip_quotes},
        ),
        CheckedFamily(
            "sentences",
            {"one-sentence": _sentences(1, 1), "several-sentences": _sentences(SEVERAL_SENTENCES, None)},
            {
                "one-sentence": lambda answer: next(iter(sentences(_flat(answer))), None),
                "several-sentences": _flat,
            },
        ),
        CheckedFamily(
            "words",
            {"few-words": _words(1, FEW_WORDS), "many-words": _words(MANY_WORDS, None)},
            {"few-words": _first_words, "many-words": lambda answer: answer},
        ),
    )
}
BUILT_IN = tuple(_FAMILIES)


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        InputError: there is none; it names those that there are.

    Example:
        >>> family("case").verify("capitals", "HELLO There").reason
        '6 of 10 letters are capital'
    """
    if name not in _FAMILIES:
        raise InputError(f"no family {name!r}; there are {', '.join(_FAMILIES)}: interp.conflict.register adds one")
    return _FAMILIES[name]


def family_names() -> list[str]:
    """All families, built-in ones first."""
    return list(_FAMILIES)


def add_family(new: Family) -> None:
    """Make a family known; one of the same name is replaced, unless it is built in.

    Raises:
        InputError: it lacks something, its rules are not two different names, or the name is a built-in one.
    """
    if not isinstance(new, Family):
        raise InputError(f"{type(new).__name__} is no family: it needs name, rules, verify and rewrite")
    name, rules = new.name, new.rules
    if not isinstance(name, str) or not name or name in BUILT_IN:
        raise InputError(f"a family named {name!r}; expected a name that no built-in family has")
    if len(rules) != 2 or len(set(rules)) != 2 or not all(isinstance(rule, str) and rule for rule in rules):
        raise InputError(f"family {name!r} has rules {rules!r}; expected two different names")
    _FAMILIES[name] = new
