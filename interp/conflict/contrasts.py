"""Two answers per pair, one that obeys the system's rule A, one that obeys the user's A′: which of them does a model prefer?

1. The model answers the task without any rule (prompt "none"), greedily.
2. The family rewrites that answer, once to obey A and once to obey A′: the same content, and the rule is the difference.
3. Where a program cannot rewrite (French), the answer is the model's own with that rule in the user turn and none in the system
   turn, if it passes the verifier.
4. A pair without both answers, or with two that are the same, is left out, and the reason is kept.

Both answers are tokenised as text that follows the prompt, and end with the model's end token: an answer of one sentence obeys
because it ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from interp.conflict.answers import MAX_NEW_TOKENS, generate_answers
from interp.conflict.dialogues import Dialogue
from interp.conflict.pairs import Pair
from interp.conflict.verifiers import family
from interp.errors import InputError
from interp.model import Model


@dataclass(frozen=True)
class Contrast:
    """Two answers to one task.

    Attributes:
        system, user: texts that obey the system's rule and the user's.
        system_ids, user_ids: their token ids, the end token included where the model has one.
        source: "rewritten", or "own" where at least one is the model's own answer under that rule.
    """

    system: str
    user: str
    system_ids: tuple[int, ...]
    user_ids: tuple[int, ...]
    source: str = "rewritten"

    @property
    def shared(self) -> int:
        """How many tokens both begin with.

        Example:
            >>> Contrast("YES a", "YES b", (5, 6, 2), (5, 7, 2)).shared
            1
        """
        both = zip(self.system_ids, self.user_ids, strict=False)
        shortest = min(len(self.system_ids), len(self.user_ids))
        return next((at for at, (ours, theirs) in enumerate(both) if ours != theirs), shortest)

    @property
    def ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both answers' token ids."""
        return self.system_ids, self.user_ids

    def cut(self, n_tokens: int) -> Contrast:
        """Both answers' ids up to `n_tokens` behind what they share; the texts stay whole.

        Example:
            >>> Contrast("", "", (5, 6, 7, 8), (5, 9, 2)).cut(2).ids
            ((5, 6, 7), (5, 9, 2))
        """
        end = self.shared + n_tokens
        return replace(self, system_ids=self.system_ids[:end], user_ids=self.user_ids[:end])


@dataclass(frozen=True)
class Contrasts:
    """Contrasts by pair.

    Attributes:
        found: {pair id: contrast}.
        left_out: {pair id: why it has none}.
    """

    found: Mapping[str, Contrast]
    left_out: Mapping[str, str]


def make_contrasts(
    model: Model,
    pairs: Sequence[Pair],
    *,
    template: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> Contrasts:
    """Contrasts of pairs, from the model's own answers.

    Args:
        model: a causal LM with a chat template.
        pairs: what `make_pairs` gave, with the prompts "none" and, for rules that cannot be rewritten to, "user" and "conflict".
        template: see `encode_dialogue`.
        max_new_tokens: longest answer that is generated.
        max_tokens: budget of padded tokens in a batch.
        progress: a progress bar on stderr; a string is its description.

    Raises:
        InputError: no pair, two pairs of one id, a pair without a prompt that is needed; see `encode_dialogue`.

    Example:
        >>> contrasts = make_contrasts(load_model(), make_pairs(n=8, families=["case"]))    # doctest: +SKIP
        >>> contrasts.found["loc-01/case/capitals/simple/user"].system                      # doctest: +SKIP
        'THE OCEAN IS SALTY BECAUSE RIVERS CARRY MINERALS INTO IT.'
    """
    check_ids(pairs)
    options = {"template": template, "max_new_tokens": max_new_tokens, "max_tokens": max_tokens, "progress": progress}
    base = generate_answers(model, [_prompt(pair, "none") for pair in pairs], **options)  # type: ignore[arg-type]
    texts: dict[tuple[str, str], str | None] = {}
    for pair, answer in zip(pairs, base, strict=True):
        margin = answer.text[
            : len(answer.text) - len(answer.text.lstrip())
        ]  # some templates leave the first space to the answer
        for rule in (pair.system_rule, pair.user_rule):
            made = family(pair.family).rewrite(rule, answer.text)
            texts[pair.id, rule] = None if made is None else margin + made
    waiting = [
        (pair, rule) for pair in pairs for rule in (pair.system_rule, pair.user_rule) if texts[pair.id, rule] is None
    ]
    own = generate_answers(model, [_alone(pair, rule) for pair, rule in waiting], **options)  # type: ignore[arg-type]
    reasons: dict[str, str] = {}
    for (pair, rule), answer in zip(waiting, own, strict=True):
        verdict = family(pair.family).verify(rule, answer.text, answer.finished)
        if verdict.passed:
            texts[pair.id, rule] = answer.text
        else:
            reasons[pair.id] = f"no answer obeys rule {rule!r}: {verdict.reason}"
    found: dict[str, Contrast] = {}
    rewritten = {pair.id for pair in pairs} - {pair.id for pair, _ in waiting}
    for pair in pairs:
        ours, theirs = texts[pair.id, pair.system_rule], texts[pair.id, pair.user_rule]
        if ours is None or theirs is None:
            continue
        contrast = make_contrast(model, ours, theirs, source="rewritten" if pair.id in rewritten else "own")
        if contrast.shared == min(len(contrast.system_ids), len(contrast.user_ids)):
            reasons[pair.id] = (
                "both answers are the same, or one is the beginning of the other and the model has no end token"
            )
        else:
            found[pair.id] = contrast
    return Contrasts(found, reasons)


def make_contrast(model: Model, system: str, user: str, *, source: str = "own") -> Contrast:
    """A contrast of two texts, of your own for example.

    Args:
        model: its tokenizer and end token are used.
        system: an answer that obeys the system's rule.
        user: one that obeys the user's.
        source: where they come from.

    Raises:
        InputError: no tokenizer, or an answer without tokens.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer; give one to load_model")
    end = _end_ids(model)
    ids = []
    for text in (system, user):
        found = tuple(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not found:
            raise InputError(f"the answer {text!r} has no tokens; expected at least one character")
        ids.append((*found, *end))
    return Contrast(system, user, ids[0], ids[1], source)


def with_answers(
    model: Model,
    pairs: Sequence[Pair],
    contrasts: Mapping[str, Contrast] | None,
    answer_tokens: int,
    *,
    template: str | None = None,
    max_tokens: int = 4096,
    progress: bool | str = False,
) -> tuple[list[Pair], list[Contrast], dict[str, str]]:
    """The pairs that have two answers, these answers cut to `answer_tokens`, and {pair id: why it has none} of the others.

    Args:
        model: see `make_contrasts`.
        pairs: likewise.
        contrasts: {pair id: contrast} of your own; `None` to make them.
        answer_tokens: how many tokens of an answer count, from where the two differ.
        template, max_tokens, progress: see `make_contrasts`.

    Raises:
        InputError: an encoder, no pair, none with two answers, or answers that do not differ.
    """
    if not model.arch.family.decoder:
        raise InputError(f"{model.name} is an encoder ({model.arch.family.name}): it predicts no next token")
    model.arch.lm_head()  # says so where there is none
    if answer_tokens < 1:
        raise InputError(f"answer_tokens={answer_tokens}; expected at least 1")
    check_ids(pairs)
    left_out: dict[str, str] = {}
    if contrasts is None:
        description = "answers" if progress is True else progress
        made = make_contrasts(model, pairs, template=template, max_tokens=max_tokens, progress=description)
        contrasts, left_out = made.found, dict(made.left_out)
    left_out |= {
        pair.id: "no contrast was given" for pair in pairs if pair.id not in contrasts and pair.id not in left_out
    }
    chosen = [pair for pair in pairs if pair.id in contrasts]
    if not chosen:
        first, reason = next(iter(left_out.items()))
        raise InputError(
            f"none of {len(pairs)} pairs has an answer under either rule (pair {first!r}: {reason}); give other families, or "
            f"contrasts= of your own"
        )
    answers = [contrasts[pair.id].cut(answer_tokens) for pair in chosen]
    for pair, answer in zip(chosen, answers, strict=True):
        if min(map(len, answer.ids)) <= answer.shared:
            raise InputError(
                f"pair {pair.id!r}: one answer is the other's beginning; expected two that differ in some token"
            )
    return chosen, answers, left_out


def check_context(model: Model, n_prompt: int, answers: Contrast) -> None:
    """Refuses a prompt whose answers do not fit behind it.

    Raises:
        InputError: with all figures.
    """
    longest, limit = max(map(len, answers.ids)), model.arch.n_positions
    if limit is not None and n_prompt + longest > limit:
        raise InputError(
            f"a prompt of {n_prompt} tokens and an answer of {longest} exceed the context of {limit} tokens; give fewer "
            f"answer_tokens or shorter tasks"
        )


def check_ids(pairs: Sequence[Pair]) -> None:
    """Refuses no pairs, and pairs that cannot be told apart.

    Raises:
        InputError: it names the id that comes twice.
    """
    if not pairs:
        raise InputError("no pair was given; expected at least one, for example of interp.conflict.make_pairs")
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise InputError(f"two pairs have the id {pair.id!r}; give each its own")
        seen.add(pair.id)


def _end_ids(model: Model) -> tuple[int, ...]:
    """The token that ends an answer; of several the tokenizer's own."""
    ends, own = model.end_ids(), getattr(model.tokenizer, "eos_token_id", None)
    if isinstance(own, int) and (own in ends or not ends):
        return (own,)
    return (min(ends),) if ends else ()


def _prompt(pair: Pair, name: str) -> Dialogue:
    if name not in pair.prompts:
        raise InputError(
            f"pair {pair.id!r} has no prompt {name!r}, from which its answers are made; give contrasts= of your own"
        )
    return pair.prompts[name]


def _alone(pair: Pair, rule: str) -> Dialogue:
    """The task with one rule, asked by the user or peer, and nothing in the system turn."""
    if rule == pair.system_rule:
        return _prompt(pair, "user")
    return tuple(turn for turn in _prompt(pair, "conflict") if turn.role != "system")
