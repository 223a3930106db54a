"""Dialogues with named pieces: rendered by a chat template, and every token told which piece it belongs to.

1. A dialogue is a few turns; a turn is made of pieces, each of a kind: the system rule, the task, the user rule, or other text.
2. The tokenizer's chat template (or one that is given) renders it, ready for the answer.
3. Pieces are found again in the rendered text, in order, and the tokenizer's offsets say which tokens they are. The first
   position is the "sink", whatever it holds; what belongs to no piece is the "template".

A template may refuse a system turn, merge it into the user's, strip or rewrite text. Whatever it does, either all pieces are
found in order and told apart, or an error says what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from interp.errors import InputError
from interp.model import Model

# What a piece can be; "other" text counts as template.
PIECES = ("system_rule", "user_rule", "task", "other")
# What a position can be: they cover the prompt, and no two overlap.
SPANS = ("sink", "system_rule", "user_rule", "task", "template")

# For models without a template of their own, and for those whose template knows no system turn.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
# What begins the next turn, which a model that was not trained on the template may write itself.
NEXT_TURN = {"chatml": ("<|im_end|>", "<|im_start|>"), "plain": ("\nSystem:", "\nUser:", "\nAssistant:")}


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
        role: "system", "user" or "assistant".
        pieces: (kind, text) pairs, kinds of `PIECES`; their texts follow each other without anything between.
    """

    role: str
    pieces: tuple[tuple[str, str], ...]

    @property
    def content(self) -> str:
        """The turn's text."""
        return "".join(text for _, text in self.pieces)


Dialogue = tuple[Turn, ...]


@dataclass(frozen=True)
class Encoded:
    """A dialogue's tokens, ready for the answer.

    Attributes:
        ids: token ids.
        spans: {kind: positions} for each of `SPANS`; some may be empty. Together they are all positions.
    """

    ids: tuple[int, ...]
    spans: dict[str, tuple[int, ...]]

    @property
    def suffix(self) -> int:
        """How many tokens follow the last piece: the template's end of turn and beginning of the answer. At least 1."""
        pieces = [max(self.spans[kind]) for kind in SPANS[1:4] if self.spans[kind]]
        return max(1, len(self.ids) - 1 - max(pieces, default=len(self.ids) - 2))


def encode_dialogue(model: Model, dialogue: Sequence[Turn], *, template: str | None = None) -> Encoded:
    """Token ids of a dialogue and what each of them belongs to.

    Args:
        model: its tokenizer must be a fast one, which knows the offsets of its tokens.
        dialogue: turns.
        template: a Jinja chat template, or the name of one of `TEMPLATES`; by default the tokenizer's own.

    Returns:
        The prompt, up to where the answer begins. A token that reaches into two pieces counts to the one that has more of it.

    Raises:
        InputError: no tokenizer or no offsets; no chat template; a template that refuses the system turn, drops or rewrites a
            piece, or merges turns; an empty piece; a prompt longer than the context.

    Example:
        >>> turns = (Turn("system", (("system_rule", "Answer in French."),)), Turn("user", (("task", "Who are you?"),)))
        >>> encode_dialogue(load_model(), turns).spans["task"]                           # doctest: +SKIP
        (14, 15, 16, 17)
    """
    text, pieces = render(model, dialogue, template=template)
    encoding = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
    if template is not None and _adds_bos(model.tokenizer) and ids[:1] != [model.tokenizer.bos_token_id]:
        # The model's own template writes its special tokens itself; others know nothing of them.
        ids, offsets = [model.tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    limit = model.arch.n_positions
    if limit is not None and len(ids) > limit:
        raise InputError(
            f"a dialogue of {len(ids)} tokens; the model's context is {limit} tokens: shorten its task or rules"
        )
    kinds = ["template"] * len(ids)
    for at, (start, end) in enumerate(offsets):
        shares: dict[str, int] = {}
        for kind, first, last in pieces:  # a dialogue may have several pieces of a kind
            shares[kind] = shares.get(kind, 0) + max(0, min(end, last) - max(start, first))
        best = max(shares, key=lambda kind: shares[kind], default="other")
        if shares.get(best, 0) > 0 and best != "other":
            kinds[at] = best
    kinds[0] = "sink"
    lost = [kind for kind in dict.fromkeys(kind for kind, _, _ in pieces) if kind != "other" and kind not in kinds]
    if lost:
        raise InputError(
            f"no token belongs to the {_named(lost[0])}; it is too short to be told apart from its neighbours"
        )
    return Encoded(tuple(ids), {span: tuple(at for at, kind in enumerate(kinds) if kind == span) for span in SPANS})


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]


def render(
    model: Model, dialogue: Sequence[Turn], *, template: str | None = None
) -> tuple[str, list[tuple[str, int, int]]]:
    """A dialogue's text, and where its pieces are.

    Returns:
        (text, [(kind, first character, one after the last)]).

    Raises:
        InputError: see `encode_dialogue`.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer; give one to load_model")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer of {model.name} does not know its tokens' offsets; load its fast version")
    for turn in dialogue:
        for kind, piece in turn.pieces:
            if kind not in PIECES:
                raise InputError(f"a piece of kind {kind!r}; expected one of {', '.join(PIECES)}")
            if kind != "other" and not piece.strip():
                raise InputError(f"an empty {_named(kind)} in the {turn.role} turn")
    text = _apply(model, dialogue, template)
    openings = _openings(model, dialogue, template)
    found: list[tuple[str, int, int]] = []
    at = 0
    ends: list[int] = []
    for number, turn in enumerate(dialogue):
        if found and turn.pieces:
            ends.append(found[-1][2])
        if openings is not None:
            opening = text.find(openings[number], at)
            at = opening + len(openings[number]) if opening >= 0 else at
        for kind, piece in turn.pieces:
            wanted = piece.strip()
            if not wanted:
                continue
            start = text.find(wanted, at)
            if start < 0:
                raise InputError(
                    f"the {_named(kind)} {wanted!r:.60} is not in the prompt that the chat template makes, at least not in "
                    f"its place: the template drops or rewrites it; give template='chatml', 'plain' or a template of yours"
                )
            at = start + len(wanted)
            found.append((kind, start, at))
    merged = [end for end in ends if text[end : next(start for _, start, _ in found if start >= end)].strip() == ""]
    if merged:
        raise InputError(
            f"the chat template of {model.name} merges turns: nothing stands between a turn that ends with "
            f"{text[max(0, merged[0] - 30) : merged[0]]!r} and the next; give template='chatml', 'plain' or a template of yours"
        )
    return text, found


def _openings(model: Model, dialogue: Sequence[Turn], template: str | None) -> list[str] | None:
    """What the template writes before each turn's text, so that a piece is not found in the template's own words.

    Read off a rendering with marks for texts; `None` where the template loses or doubles a mark.
    """
    marks = [f"\ue000{number}\ue001" for number in range(len(dialogue))]
    marked = [Turn(turn.role, (("other", mark),)) for turn, mark in zip(dialogue, marks, strict=True)]
    rest, openings = _apply(model, marked, template), []
    if any(rest.count(mark) != 1 for mark in marks):
        return None
    for mark in marks:
        opening, found, rest = rest.partition(mark)
        if not found:
            return None
        openings.append(opening)
    return openings


def _apply(model: Model, dialogue: Sequence[Turn], template: str | None) -> str:
    from jinja2 import TemplateError

    tokenizer: Any = model.tokenizer
    chosen = TEMPLATES.get(template or "", template)
    if not (chosen or getattr(tokenizer, "chat_template", None)):
        raise InputError(
            f"{model.name} has no chat template; give template='chatml', 'plain' or a Jinja template of yours"
        )
    messages = [{"role": turn.role, "content": turn.content} for turn in dialogue]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=chosen, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(turn.role for turn in dialogue)
        raise InputError(
            f"the chat template of {model.name} refuses turns of {roles} ({error}); if it knows no system turn, give "
            f"template='chatml' or 'plain'"
        ) from error


def _named(kind: str) -> str:
    return kind.replace("_", " ")
